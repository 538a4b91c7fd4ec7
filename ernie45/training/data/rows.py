"""What rows hold, whatever form they were written in; and rows that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Messages = tuple[Mapping[str, Any], ...]
"""Chat messages as `Tokenizer.render` takes them."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A dialogue that ends with an assistant's turn."""

    messages: Messages
    learnt: tuple[bool, ...]
    """Of every message: whether it is an answer to learn."""
    tools: tuple[Mapping[str, Any], ...] = ()
    origin: str = ""


@dataclass(frozen=True, kw_only=True)
class PreferenceRow:
    """Two ways to go on with a dialogue, each begun and ended by the assistant."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    score_chosen: float = 1.0
    score_rejected: float = 0.0
    tools: tuple[Mapping[str, Any], ...] = ()
    origin: str = ""


@dataclass(frozen=True, kw_only=True)
class KtoRow:
    """One way to go on with a dialogue, and whether it is wanted."""

    prompt: Messages
    completion: Messages
    desirable: bool
    tools: tuple[Mapping[str, Any], ...] = ()
    origin: str = ""


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that is left out because of what it says."""

    origin: str
    """`file:line`."""
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


class RowDroppedError(Exception):
    """A sound row that the configuration leaves out: control flow between encoding and the stream that counts."""

    def __init__(self, reason: str, size: int) -> None:
        """`reason`: a counter of `DataReport`, `too_long` or `nothing_learnt`. `size`: tokens of the row."""
        super().__init__(reason)
        self.reason = reason
        self.size = size
