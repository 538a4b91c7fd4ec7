"""What is evaluated: something that scores continuations and continues prompts. A loaded network is one; an endpoint may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from ernie45.engine.params import SamplingParams
from ernie45.errors import RequestError
from ernie45.evaluation.score import Score, Target, score
from ernie45.llm import LLM
from ernie45.models.text import CausalLM
from ernie45.processing.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A text, and what may follow it."""

    context: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Query:
    """A prompt that is continued greedily."""

    prompt: str
    max_tokens: int
    stop: tuple[str, ...] = ()
    chat: bool = False
    """Render the prompt as a user's message with the model's template."""


class Subject(Protocol):
    """A model as tasks see it."""

    def score(self, continuations: Sequence[Continuation]) -> list[float]:
        """Log-probability of each text behind its context."""
        ...

    def generate(self, queries: Sequence[Query]) -> list[str]:
        """Greedy answers."""
        ...


class NetworkSubject:
    """A loaded network and its tokenizer. Generating gives the network the engine's leaves: train another copy."""

    def __init__(self, model: CausalLM, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def score(self, continuations: Sequence[Continuation]) -> list[float]:
        """See `Subject`. Raises: RequestError for an empty text, or an empty context if the vocabulary has no begin token."""
        return [found.total for found in self.scores(continuations)]

    def scores(self, continuations: Sequence[Continuation]) -> list[Score]:
        """Log-probabilities by token."""
        return score(self.model, [self._target(continuation) for continuation in continuations])

    def generate(self, queries: Sequence[Query]) -> list[str]:
        prompts = [self._prompt(query) for query in queries]
        params = [SamplingParams(temperature=0, max_tokens=query.max_tokens, stop=query.stop) for query in queries]
        answers = self._llm.generate(prompts, params, progress=False) if prompts else []
        return [answer.text for answer in answers]

    @cached_property
    def _llm(self) -> LLM:
        return LLM(self.model, tokenizer=self.tokenizer)

    def _prompt(self, query: Query) -> list[int]:
        if not query.chat:
            return self._context_ids(query.prompt)
        return self.tokenizer.encode(self.tokenizer.render([{"role": "user", "content": query.prompt}]))

    def _target(self, continuation: Continuation) -> Target:
        """Both texts are encoded together, as they would be read; scored is what differs from the context alone.

        A token may span the border: then it is scored as part of the continuation.
        """
        context, whole = continuation.context, continuation.context + continuation.text
        if not continuation.text:
            raise RequestError("an empty text cannot be scored: give every choice a text")
        before, ids = self.tokenizer.encode(context), self.tokenizer.encode(whole)
        same = next((i for i, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), len(before))
        same = min(same, len(ids) - 1)
        if same == 0:
            ids, same = [self._begin(), *ids], 1
        return Target(ids=tuple(ids), num_scored=len(ids) - same)

    def _context_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text) if text else [self._begin()]

    def _begin(self) -> int:
        if self.tokenizer.bos_id is None:
            raise RequestError("the context is empty and the vocabulary has no begin token: give a context")
        return self.tokenizer.bos_id
