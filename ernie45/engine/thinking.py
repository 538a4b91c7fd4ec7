"""Where a thought begins and ends, and how long it may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ernie45.errors import RequestError
from ernie45.processing.tokenizer import Tokenizer

_BEGIN, _END = "<think>", "</think>"


@dataclass(frozen=True, kw_only=True)
class ThoughtMarkers:
    """The tokens around a thought; None where the vocabulary has no such token."""

    begin: int | None
    end: int | None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ThoughtMarkers:
        """The markers that the tokenizer knows as one token each."""
        return cls(begin=tokenizer.special_tokens.get(_BEGIN), end=tokenizer.special_tokens.get(_END))


class Thought:
    """Follows one output. The prompt may have opened the thought already."""

    def __init__(self, markers: ThoughtMarkers, prompt: Sequence[int], budget: int | None) -> None:
        """Raises: RequestError if there is a budget and no token that could end a thought."""
        if budget is not None and markers.end is None:
            raise RequestError(
                f"reasoning_max_tokens is {budget}, but the tokenizer has no {_END} token to end a thought with: leave it out"
            )
        self._markers, self._budget = markers, budget
        last = next((token for token in reversed(prompt) if token in (markers.begin, markers.end)), None)
        self._open = last is not None and last == markers.begin
        self._length = 0
        self.num_tokens = 0
        """Output tokens that belong to thoughts, markers not counted."""
        self.num_answer_tokens = 0
        """Output tokens that do not, markers not counted."""

    @property
    def forced(self) -> int | None:
        """The token that must come next, because the thought has used up its budget."""
        spent = self._open and self._budget is not None and self._length >= self._budget
        return self._markers.end if spent else None

    def push(self, token: int) -> None:
        """Take the next output token."""
        if token == self._markers.end:
            self._open = False
        elif token == self._markers.begin:
            self._open, self._length = True, 0
        elif self._open:
            self._length += 1
            self.num_tokens += 1
        else:
            self.num_answer_tokens += 1
