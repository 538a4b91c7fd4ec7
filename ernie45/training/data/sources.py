"""Files of rows behind one interface: how many rows there are, and any of them by its number.

Nothing is loaded that can be found again: text files are indexed by where their rows lie, token files are mapped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ernie45.errors import ConfigError, NotFoundError
from ernie45.training.data.config import SourceConfig

_ENDINGS = {".jsonl": "jsonl", ".json": "json", ".txt": "text", ".parquet": "parquet"}


class Source(Protocol):
    """Rows by their number."""

    @property
    def digest(self) -> str:
        """Changes when a row does."""
        ...

    def __len__(self) -> int: ...

    def origin(self, idx: int) -> str:
        """Where the row stands, as `file:line`."""
        ...

    def read(self, idx: int) -> Mapping[str, Any]:
        """The row: its JSON object; `{"text": ..}` of plain text; `{"ids": array}` of token files.

        Raises: RequestError for a row that cannot be read.
        """
        ...

    def row_digest(self, idx: int) -> bytes:
        """Eight bytes that follow from the row's content alone."""
        ...


def open_source(config: SourceConfig) -> Source:
    """Open what a configuration names.

    Raises: NotFoundError if nothing is there; ConfigError if its format cannot be told or it cannot be read at all;
        CheckpointError for damaged token files.
    """
    from ernie45.training.data.json_array import JsonArray
    from ernie45.training.data.parquet import ParquetRows
    from ernie45.training.data.text_files import json_lines, text_documents
    from ernie45.training.data.token_files import TokenFiles

    path = Path(config.path)
    if not path.exists():
        raise NotFoundError(f"there is no {path}")
    match file_format(config):
        case "jsonl":
            return json_lines(path)
        case "json":
            return JsonArray(path)
        case "text":
            return text_documents(path, config.text)
        case "parquet":
            return ParquetRows(path)
        case _:
            return TokenFiles(path)


def file_format(config: SourceConfig) -> str:
    """The format of a source, `auto` resolved. Raises: ConfigError if the ending says nothing."""
    path = Path(config.path)
    if config.format != "auto":
        return config.format
    if path.is_dir():
        return "tokens" if (path / "index.json").exists() else "text"
    if path.suffix.lower() not in _ENDINGS:
        raise ConfigError(
            f"{path} ends in {path.suffix or 'nothing'!r}, known are {', '.join(_ENDINGS)}: say what it is (format)"
        )
    return _ENDINGS[path.suffix.lower()]


class Subset:
    """Some rows of a source, in the order of the source."""

    def __init__(self, source: Source, share: tuple[float, float]) -> None:
        """Keep the rows whose digests, taken as numbers in [0, 1), lie in `share`: reads every row once."""
        self._source = source
        low, high = (round(edge * 2**64) for edge in share)
        chosen = (idx for idx in range(len(source)) if low <= int.from_bytes(source.row_digest(idx), "big") < high)
        self._rows = np.fromiter(chosen, dtype=np.int64)

    @property
    def digest(self) -> str:
        """See `Source`."""
        return f"{self._source.digest}:{hashlib.blake2b(self._rows.tobytes(), digest_size=8).hexdigest()}"

    def __len__(self) -> int:
        return len(self._rows)

    def origin(self, idx: int) -> str:
        """See `Source`."""
        return self._source.origin(int(self._rows[idx]))

    def read(self, idx: int) -> Mapping[str, Any]:
        """See `Source`."""
        return self._source.read(int(self._rows[idx]))

    def row_digest(self, idx: int) -> bytes:
        """See `Source`."""
        return self._source.row_digest(int(self._rows[idx]))


def digest_of(data: bytes) -> bytes:
    """Eight bytes for a row's content."""
    return hashlib.blake2b(data, digest_size=8).digest()


def digest_of_value(value: object) -> bytes:
    """The same of a JSON value, however it was written."""
    return digest_of(json.dumps(value, sort_keys=True, ensure_ascii=True, default=str).encode())
