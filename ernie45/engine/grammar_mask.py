"""Grammars as the engine's masks: structured output (`processing/grammar.py`) for one choice of a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ernie45.engine.sampling import LogitsMask
from ernie45.errors import RequestError
from ernie45.processing.constraint import Constraint
from ernie45.processing.grammar import Grammars, Matcher
from ernie45.processing.tokenizer import Tokenizer


class GrammarMask:
    """Follows one output with a matcher: back to where they part, then forward."""

    def __init__(self, matcher: Matcher) -> None:
        """Takes a matcher that stands at its beginning, and owns it."""
        self._matcher = matcher
        self._bits = np.zeros((matcher.num_ids + 31) // 32, dtype=np.int32)
        self._followed: list[int] = []
        self._allowed: Tensor | None = None
        """The answer for what has been followed, once it is known."""

    def allowed(self, output: Sequence[int]) -> Tensor:
        """Ids that continue a satisfying answer, bool (tokenizer's vocabulary,); not to be written to.

        Raises: RequestError if the grammar turns out too complex, or the vocabulary cannot spell what it wants.
        """
        self._follow(output)
        if self._allowed is None:
            self._matcher.mask(self._bits)
            bits = np.unpackbits(self._bits.view(np.uint8), count=self._matcher.num_ids, bitorder="little")
            self._allowed = torch.from_numpy(bits.view(np.bool_))
        return self._allowed

    def prepare(self, output: Sequence[int]) -> None:
        """Find out ahead of time what `allowed` will say."""
        self.allowed(output)

    def finished(self, output: Sequence[int]) -> bool:
        """Whether the answer is whole and nothing may follow. Raises: RequestError as `allowed` does."""
        self._follow(output)
        return self._matcher.finished

    def _follow(self, output: Sequence[int]) -> None:
        shared = len(self._followed)
        if list(output[:shared]) != self._followed:
            pairs = enumerate(zip(output, self._followed, strict=False))
            shared = next((at for at, (a, b) in pairs if a != b), min(len(output), shared))
            self._allowed = None
            self._matcher.rollback(len(self._followed) - shared)
            del self._followed[shared:]
        for token in output[shared:]:
            self._allowed = None
            accepted = self._matcher.accept(token)
            assert accepted, f"token {token} is in the output, but the mask did not allow it"
            self._followed.append(token)


def grammar_masks(
    grammars: Grammars,
    tokenizer: Tokenizer,
    constraint: Constraint,
    prompt: Sequence[int],
    *,
    begun: str | None = None,
) -> Callable[[], LogitsMask]:
    """What `Request.new_mask` wants: a mask for each choice, which begins where the prompt leaves the model.

    Making one raises RequestError for a constraint that cannot be compiled.

    Args: begun: the text that the prompt ends with, if the answer continues it; it is then part of what is constrained.
    """
    if begun is None:
        start = tokenizer.answer_start(prompt)
        return lambda: GrammarMask(grammars.matcher(constraint, start))
    if constraint.kind == "tool_calls" and not constraint.leaves_text_free:
        raise RequestError(
            "tool_choice forces a call, which cannot go on with a text: leave continue_final_message out"
        )
    ids = tokenizer.encode(begun)

    def new_mask() -> LogitsMask:
        matcher = grammars.matcher(constraint, "text")
        if not all(map(matcher.accept, ids)):
            raise RequestError(f"{constraint.where} does not allow the text that continue_final_message goes on with")
        if matcher.finished:
            raise RequestError(
                f"{constraint.where} leaves nothing to add to the text: leave continue_final_message out"
            )
        return GrammarMask(matcher)

    return new_mask
