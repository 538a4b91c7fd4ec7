"""An answer as a row of blocks: thought, text, call. Responses calls them items, Anthropic content blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from ernie45.processing.answer_parser import ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallBegun, ToolCallEnded
from ernie45.processing.answer_parser import Event as Part

Kind = Literal["thought", "text", "call"]


@dataclass(kw_only=True)
class Block:
    """One of them, as far as it is written."""

    index: int
    kind: Kind
    call_id: str = ""
    name: str = ""
    """Of the function that is called."""
    pieces: list[str] = field(default_factory=list)
    complete: bool = False
    """False at the end: the answer was cut inside of it."""

    @property
    def text(self) -> str:
        """The thought, the text, or the arguments as the model wrote them."""
        return "".join(self.pieces)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What happens to a block: it begins, grows by `text`, ends."""

    what: Literal["begin", "grow", "end"]
    block: Block
    text: str = ""


class Blocks:
    """Lays the parts of one choice out in blocks. Every block begins once and ends once, one behind the other."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None

    def push(self, parts: Iterable[Part]) -> list[Step]:
        """Add what has come; return what that does."""
        return [step for part in parts for step in self._add(part)]

    def finish(self, *, cut: bool) -> list[Step]:
        """The answer is over. Args: cut: a limit ended it, so that its last block may lack its end."""
        return self._end(complete=not cut)

    def _add(self, part: Part) -> list[Step]:
        match part:
            case ReasoningDelta():
                return self._grow("thought", part.text)
            case ContentDelta():
                return self._grow("text", part.text)
            case ToolCallBegun():
                return self._begin("call", call_id=part.id, name=part.name)
            case ArgumentsDelta():
                return self._grow("call", part.text)
            case ToolCallEnded():
                return self._end(complete=part.error is None)

    def _grow(self, kind: Kind, text: str) -> list[Step]:
        steps = [] if self._open is not None and self._open.kind == kind else self._begin(kind)
        assert self._open is not None, "it was begun"
        self._open.pieces.append(text)
        return [*steps, Step(what="grow", block=self._open, text=text)]

    def _begin(self, kind: Kind, call_id: str = "", name: str = "") -> list[Step]:
        steps = self._end(complete=True)
        self._open = Block(index=len(self.all), kind=kind, call_id=call_id, name=name)
        self.all.append(self._open)
        return [*steps, Step(what="begin", block=self._open)]

    def _end(self, *, complete: bool) -> list[Step]:
        if self._open is None:
            return []
        block, self._open = self._open, None
        block.complete = complete
        return [Step(what="end", block=block)]
