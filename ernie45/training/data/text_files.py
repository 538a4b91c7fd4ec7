"""Text files by the places of their rows: JSON lines, whole files, and paragraphs.

A scan remembers where every row begins and on which line, 28 bytes for each, so that rows can be read in any order from
files that would not fit into memory.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ernie45.errors import ConfigError, RequestError
from ernie45.training.data.config import TextUnit
from ernie45.training.data.sources import digest_of

Span = tuple[int, int, int]
"""First byte, number of bytes, number of the first line."""


class SpanRows:
    """Rows that lie somewhere in files."""

    def __init__(
        self,
        paths: list[Path],
        spans: Callable[[Iterator[bytes]], Iterator[Span]],
        parse: Callable[[str], Mapping[str, Any]],
    ) -> None:
        """Scan the files once.

        Args: spans: finds the rows, given the lines of a file. parse: makes a row of its text, or raises RequestError.
        """
        self._paths = paths
        self._parse = parse
        self._file, self._line = array("I"), array("q")
        self._offset, self._size = array("q"), array("q")
        digest = hashlib.blake2b(digest_size=16)
        for idx, path in enumerate(paths):
            with path.open("rb") as file:
                for offset, size, line in spans(_digested(file, digest)):
                    self._file.append(idx)
                    self._offset.append(offset)
                    self._size.append(size)
                    self._line.append(line)
            digest.update(b"\0end of file\0")
        self._digest = digest.hexdigest()

    @property
    def digest(self) -> str:
        """See `Source`: of all bytes."""
        return self._digest

    def __len__(self) -> int:
        return len(self._file)

    def origin(self, idx: int) -> str:
        """See `Source`."""
        return f"{self._paths[self._file[idx]]}:{self._line[idx]}"

    def read(self, idx: int) -> Mapping[str, Any]:
        """See `Source`."""
        data = self._bytes(idx)
        try:
            text = data.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise RequestError(f"no UTF-8: byte 0x{data[error.start]:02x} at byte {error.start} of the row") from error
        return self._parse(text)

    def row_digest(self, idx: int) -> bytes:
        """See `Source`."""
        return digest_of(self._bytes(idx).strip())

    def _bytes(self, idx: int) -> bytes:
        # Opened for every row: no handle to share between threads, and 10 us against milliseconds of tokenising.
        with self._paths[self._file[idx]].open("rb") as file:
            file.seek(self._offset[idx])
            return file.read(self._size[idx])


def json_lines(path: Path) -> SpanRows:
    """A file with a JSON object on every line that is not blank."""
    return SpanRows([path], _lines, _json_object)


def text_documents(path: Path, unit: TextUnit) -> SpanRows:
    """Plain text: a file, or the .txt files in a folder and below. Raises: ConfigError if a folder has none."""
    paths = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not paths:
        raise ConfigError(f"{path} holds no .txt file: name a file, or put texts there")
    return SpanRows(paths, _whole if unit == "file" else _paragraphs, _as_text)


def _digested(lines: Iterator[bytes], digest: Any) -> Iterator[bytes]:
    for line in lines:
        digest.update(line)
        yield line


def _lines(lines: Iterator[bytes]) -> Iterator[Span]:
    offset = 0
    for number, line in enumerate(lines, 1):
        if not line.isspace():
            yield offset, len(line), number
        offset += len(line)


def _whole(lines: Iterator[bytes]) -> Iterator[Span]:
    yield 0, sum(map(len, lines)), 1


def _paragraphs(lines: Iterator[bytes]) -> Iterator[Span]:
    first: Span | None = None
    offset = 0
    for number, line in enumerate(lines, 1):
        if line.isspace():
            if first is not None:
                yield first
            first = None
        elif first is None:
            first = (offset, len(line), number)
        else:
            first = (first[0], first[1] + len(line), first[2])
        offset += len(line)
    if first is not None:
        yield first


def _json_object(text: str) -> Mapping[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(f"no JSON: {error.msg} at character {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets nested too deeply
        raise RequestError(f"no JSON that can be read: {error}") from error
    if not isinstance(row, dict):
        raise RequestError(f"the row is a JSON {type(row).__name__}, expected an object")
    return row


def _as_text(text: str) -> Mapping[str, Any]:
    return {"text": text.replace("\r\n", "\n").rstrip("\n")}
