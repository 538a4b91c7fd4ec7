"""Rows of a parquet file, through pyarrow, which is asked for only where such a file is used."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

from ernie45.errors import ConfigError
from ernie45.training.data.sources import digest_of_value

_KEPT_GROUPS = 4
"""Row groups that stay decoded: shuffled reading jumps between them."""
_FOOTER_BYTES = 1 << 16


class ParquetRows:
    """Rows of a parquet file; columns become keys, empty cells are left out."""

    def __init__(self, path: Path) -> None:
        """Read the footer. Raises: ConfigError without pyarrow, or if the file is no parquet."""
        try:
            # By name, since the library ships no annotations and need not be there when types are checked.
            pyarrow, parquet = (import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
        except ImportError as error:
            raise ConfigError(
                f"{path}: parquet files are read through pyarrow, which is not installed: `pip install pyarrow`, or"
                " write the rows as .jsonl"
            ) from error
        try:
            self._file = parquet.ParquetFile(path)
        except pyarrow.ArrowException as error:
            raise ConfigError(f"{path} is no parquet file that can be read: {error}") from error
        metadata = self._file.metadata
        sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self._starts = list(accumulate(sizes, initial=0))
        self._path = path
        self._groups: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        self._lock = Lock()
        self._digest = _footer_digest(path)

    @property
    def digest(self) -> str:
        """See `Source`: of size, time of change and footer, which holds statistics of the columns."""
        return self._digest

    def __len__(self) -> int:
        return self._starts[-1]

    def origin(self, idx: int) -> str:
        """See `Source`; rows count from 1, as lines do."""
        return f"{self._path}:{idx + 1}"

    def read(self, idx: int) -> Mapping[str, Any]:
        """See `Source`."""
        group = bisect_right(self._starts, idx) - 1
        with self._lock:
            row = self._rows(group)[idx - self._starts[group]]
        return {key: value for key, value in row.items() if value is not None}

    def row_digest(self, idx: int) -> bytes:
        """See `Source`."""
        return digest_of_value(self.read(idx))

    def _rows(self, group: int) -> list[dict[str, Any]]:
        if group not in self._groups:
            self._groups[group] = self._file.read_row_group(group).to_pylist()
            if len(self._groups) > _KEPT_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group]


def _footer_digest(path: Path) -> str:
    found = path.stat()
    with path.open("rb") as file:
        file.seek(max(0, found.st_size - _FOOTER_BYTES))
        digest = hashlib.blake2b(file.read(), digest_size=16)
    digest.update(f"{found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()
