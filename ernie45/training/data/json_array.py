"""A JSON file with one array of rows; it is held in memory, and every row knows its line."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ernie45.errors import ConfigError, RequestError
from ernie45.training.data.sources import digest_of_value

_SPACE = re.compile(r"[ \t\r\n]*")


class JsonArray:
    """Rows of one JSON array."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises: ConfigError with the line if it is no array of JSON values."""
        data = path.read_bytes()
        self._path = path
        self._digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        try:
            text = data.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is no UTF-8: byte 0x{data[error.start]:02x} at {error.start}") from error
        self._rows: list[Any] = []
        self._lines: list[int] = []
        for line, row in _elements(text, path):
            self._lines.append(line)
            self._rows.append(row)

    @property
    def digest(self) -> str:
        """See `Source`: of all bytes."""
        return self._digest

    def __len__(self) -> int:
        return len(self._rows)

    def origin(self, idx: int) -> str:
        """See `Source`."""
        return f"{self._path}:{self._lines[idx]}"

    def read(self, idx: int) -> Mapping[str, Any]:
        """See `Source`."""
        row = self._rows[idx]
        if not isinstance(row, dict):
            raise RequestError(f"the row is a JSON {type(row).__name__}, expected an object")
        return row

    def row_digest(self, idx: int) -> bytes:
        """See `Source`."""
        return digest_of_value(self._rows[idx])


def _elements(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Every element with its line. Taken one by one, since a parser of the whole tells no places."""
    decoder = json.JSONDecoder()
    at, line = _skip(text, 0), 1
    _expect(text, at, "[", path)
    seen, at = 0, _skip(text, at + 1)
    if text[at : at + 1] == "]":
        _expect_end(text, at + 1, path)
        return
    while True:
        line, seen = line + text.count("\n", seen, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}:{line} is no JSON: {error}") from error
        yield line, value
        at = _skip(text, at)
        if text[at : at + 1] == "]":
            _expect_end(text, at + 1, path)
            return
        _expect(text, at, ",", path)
        at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space is not None, "matches nothing as well"
    return space.end()


def _expect(text: str, at: int, char: str, path: Path) -> None:
    if text[at : at + 1] != char:
        line = text.count("\n", 0, at) + 1
        found = repr(text[at]) if at < len(text) else "the end of the file"
        raise ConfigError(f"{path}:{line}: expected {char!r} of a JSON array, found {found}; is it jsonl?")


def _expect_end(text: str, at: int, path: Path) -> None:
    at = _skip(text, at)
    if at < len(text):
        raise ConfigError(
            f"{path}:{text.count(chr(10), 0, at) + 1}: {text[at]!r} stands behind the end of the JSON array"
        )
