"""What comes out of a generation, piece by piece. No torch here: the server's process reads these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]
FinishDetail = Literal["loop"]


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Log-probability of one token, before masks, penalties, temperature and filters."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most probable alternatives as (id, log-probability), best first."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one step adds to an output; the last piece carries the finish reason."""

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or end token that was met."""
    finish_detail: FinishDetail | None = None
    """`loop`: broken off because the output repeats itself."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole output."""

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    stop_reason: str | int | None = None
    finish_detail: FinishDetail | None = None


def join(pieces: Sequence[Piece], num_prompt: int) -> Completion:
    """The whole output that pieces make, the last of which ends it."""
    last = pieces[-1]
    assert last.finish_reason is not None, "a finished output ends with its reason"
    return Completion(
        text="".join(piece.text for piece in pieces),
        ids=tuple(i for piece in pieces for i in piece.ids),
        finish_reason=last.finish_reason,
        prompt_tokens=num_prompt,
        logprobs=tuple(logprob for piece in pieces for logprob in piece.logprobs),
        stop_reason=last.stop_reason,
        finish_detail=last.finish_detail,
    )
