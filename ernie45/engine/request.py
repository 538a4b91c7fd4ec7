"""What goes into the engine and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ernie45.engine.params import SamplingParams, check_range
from ernie45.engine.pieces import Piece, TokenLogprob
from ernie45.errors import RequestError

if TYPE_CHECKING:  # a mask is tensors, everything else here is free of torch
    from ernie45.engine.sampling import LogitsMask


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to continue."""

    id: str
    """Names the request in every event; not in use by another request that runs."""
    prompt: tuple[int, ...]
    """Token ids, from `prompts.prompt_ids`."""
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    """Larger goes first, and takes pages from smaller; -1000 to 1000."""
    tenant: str = ""
    """Whose request it is: tenants get equal shares, whatever the number of their requests."""
    cache_salt: str | None = None
    """Prompts share cached prefixes with those of equal salt; None = the tenant."""
    timeout_s: float | None = None
    """Seconds after `Engine.add` at which the request fails if it has not ended; None = never."""
    new_mask: Callable[[], LogitsMask] | None = None
    """Makes the mask of each choice; None = nothing is masked."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple(self.prompt))
        check_range("priority", self.priority, -1000, 1000)
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise RequestError(f"timeout_s is {self.timeout_s!r}, expected a positive number of seconds")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a request took, counted by the engine."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were found in the prefix cache (by the choice that began first)."""
    completion_tokens: int = 0
    """Of all choices that were generated."""
    reasoning_tokens: int = 0
    """Completion tokens inside thoughts."""
    drafted_tokens: int = 0
    """Guesses that were verified."""
    accepted_tokens: int = 0
    """Guesses that were right: completion tokens that took no step of their own."""


@dataclass(frozen=True, kw_only=True)
class PromptScores:
    """Log-probabilities of a prompt's tokens; comes before the first output. A prompt of one token has none, and no event."""

    request_id: str
    logprobs: tuple[TokenLogprob, ...]
    """Of every token but the first."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """A piece of one choice; the choice has ended when the piece carries a finish reason."""

    request_id: str
    index: int
    """0 to n - 1."""
    piece: Piece


EndKind = Literal["finished", "aborted", "failed"]
EndCause = Literal["request", "timeout", "internal"]


@dataclass(frozen=True, kw_only=True)
class End:
    """The last event of a request. Every request that `Engine.add` took has exactly one."""

    request_id: str
    kind: EndKind
    """finished: all choices have their finish reason. aborted: somebody called `abort`. failed: `reason` says why."""
    usage: Usage
    reason: str | None = None
    cause: EndCause | None = None
    """Of a failure: request = it asked for what turned out to be impossible; timeout; internal = everything else."""
    queue_s: float | None = None
    """Seconds from `Engine.add` to the first step that computed something of it; None if there was none."""


Event = PromptScores | Output | End
