"""The kinds of rows there are, by name, and which of them a file holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from ernie45.errors import ConfigError, RequestError
from ernie45.processing.tokenizer import Tokenizer
from ernie45.training.data.config import DataConfig
from ernie45.training.data.methods import kto_rows, preference_rows, pretrain_rows, sft_rows
from ernie45.training.data.sources import open_source
from ernie45.training.data.stream import PackedRows

RowKind = Literal["pretrain", "sft", "preference", "kto"]
_MAX_LOOKED_AT = 100


class _Opens(Protocol):
    def __call__(self, config: DataConfig, tokenizer: Tokenizer) -> PackedRows[Any, Any]: ...


OPENERS: dict[RowKind, _Opens] = {
    "pretrain": pretrain_rows,
    "sft": sft_rows,
    "preference": preference_rows,
    "kto": kto_rows,
}
"""What opens a stream of each kind."""


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
