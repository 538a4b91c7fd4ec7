"""Text files that a user names."""

from __future__ import annotations

import os
from pathlib import Path

from ernie45.errors import NotFoundError, RequestError

MAX_TEXT_BYTES = 1 << 30


def read_text(file: str | Path) -> str:
    """A UTF-8 text. Raises: NotFoundError; RequestError for one that is too large or of another encoding."""
    path = Path(os.path.expanduser(file))
    if not path.is_file():
        raise NotFoundError(f"there is no text file {path}")
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise RequestError(f"{path} has {path.stat().st_size} bytes, more than {MAX_TEXT_BYTES}: cut it")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}): convert it") from error
