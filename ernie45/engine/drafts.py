"""Guesses at the next tokens: what followed the last few tokens when they stood in the sequence before (prompt lookup), or what
the model's multi-token prediction block says (computed by `runner.py`).

Guesses cost the network a row each and never change an output: the engine samples as always and keeps a guess where it
equals the sample (`sampling.py` says why that is exact rejection sampling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ernie45.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class NgramSpeculation:
    """Guess by looking up the last tokens in prompt and output."""

    max_tokens: int = 8
    """Most guesses per step and sequence."""
    max_ngram: int = 4
    """Longest ending that is looked up; the longest that is found decides."""
    min_ngram: int = 2
    """Shortest ending that is looked up."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens <= 64 or not 1 <= self.min_ngram <= self.max_ngram <= 16:
            raise ConfigError(
                f"speculation with max_tokens {self.max_tokens} and n-grams of {self.min_ngram} to {self.max_ngram}: expected "
                "1 to 64 tokens and 1 <= min_ngram <= max_ngram <= 16"
            )


@dataclass(frozen=True, kw_only=True)
class MtpSpeculation:
    """Guess with the model's multi-token prediction block, which runs along with every step."""

    max_tokens: int = 1
    """Guesses per step and sequence, 1 to 8. The published blocks are trained to look one token further; beyond that a block is fed
    with its own guesses."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens <= 8:
            raise ConfigError(f"speculation with max_tokens {self.max_tokens}: expected 1 to 8 for a prediction block")


class NgramDrafter:
    """The lookup table of one sequence. Guesses more after success and less after failure."""

    def __init__(self, what: NgramSpeculation) -> None:
        self._what = what
        self._behind: dict[tuple[int, ...], int] = {}  # n-gram: place of what followed it last
        self._indexed = 0
        self._length = what.max_tokens

    def propose(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Guesses at what follows `tokens`, which have only grown since the call before."""
        what = self._what
        sizes = range(what.min_ngram, what.max_ngram + 1)
        # An n-gram enters the table when the token behind it is known.
        for at in range(max(self._indexed, what.min_ngram), len(tokens)):
            for size in sizes:
                if size <= at:
                    self._behind[tuple(tokens[at - size : at])] = at
        self._indexed = max(self._indexed, len(tokens))
        for size in reversed(sizes):
            if size < len(tokens) and (at := self._behind.get(tuple(tokens[-size:]), -1)) >= 0:
                return tuple(tokens[at : at + self._length])
        return ()

    def learn(self, num_drafts: int, num_accepted: int) -> None:
        """Take the outcome of a step: all right doubles the number of guesses, a wrong one halves it."""
        if num_drafts:
            longer, shorter = min(2 * self._length, self._what.max_tokens), max(self._length // 2, 1)
            self._length = longer if num_accepted == num_drafts else shorter
