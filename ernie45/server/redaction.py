"""Logs that hold no keys, whatever ends up in a message or a trace."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

_SECRET = re.compile(
    r"((?:bearer|x-api-key['\"]?\s*[:=,]?)\s*['\"]?)[^\s'\",)]{4,}|\b(?:ek|sk)-[\w-]{8,}", re.IGNORECASE
)
_HIDDEN = "[redacted]"


class RedactingFormatter(logging.Formatter):
    """Formats, then takes out the keys that it knows and whatever looks like one."""

    def __init__(self, fmt: str, keys: Sequence[str]) -> None:
        """Args: keys: the server's own."""
        super().__init__(fmt)
        self._keys = tuple(sorted(keys, key=len, reverse=True))

    def format(self, record: logging.LogRecord) -> str:
        """The line, trace included, without secrets."""
        text = super().format(record)
        for key in self._keys:
            text = text.replace(key, _HIDDEN)
        return _SECRET.sub(lambda found: (found[1] or "") + _HIDDEN, text)
