"""Which kind of rows a file holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ernie45.errors import ConfigError, RequestError
from ernie45.training.data.config import DataConfig
from ernie45.training.data.sources import open_source

RowKind = Literal["pretrain", "sft", "preference", "kto"]
_MAX_LOOKED_AT = 100


def told_kind(config: DataConfig) -> RowKind:
    """Tell from the keys of the first row that can be read. Raises: ConfigError if they say nothing."""
    source = open_source(config.train[0])
    for idx in range(min(len(source), _MAX_LOOKED_AT)):
        try:
            kind = _kind(source.read(idx))
        except RequestError:
            continue
        if kind is not None:
            return kind
    raise ConfigError(f"{config.train[0].path}: its first rows have the keys of no known form: say which kind (--rows)")


def _kind(row: Mapping[str, Any]) -> RowKind | None:
    if "ids" in row or "text" in row:
        return "pretrain"
    if "rejected" in row or "response" in row:
        return "preference"
    if isinstance(row.get("label"), bool):
        return "kto"
    return "sft" if row.keys() & {"messages", "src", "instruction"} else None
