"""Where reinforcement learning gets its answers from: prompts, and a generator that is handed in.

Training does not import the engine. It takes an object that generates (`Generator`); `LlmGenerator` makes one of anything that has the
interface of `ernie45.LLM`:

    llm = LLM(sampler_twin(network.model), tokenizer=tokenizer)     # a second network over the same memory
    generator = LlmGenerator(llm, params=SamplingParams)

Before each rollout `sync` brings over what does not share memory and empties the prefix cache.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Protocol

from torch import nn

from ernie45.errors import CheckpointError, ConfigError, ShapeError
from ernie45.training.sampler_weights import copy_weights


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Something to answer."""

    ids: tuple[int, ...]
    text: str = ""
    """For the rewards."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The row it comes from, for the rewards."""
    subset: str = ""
    """Part of the data whose rewards are normalised together."""
    origin: str = ""
    """As `file:line`, for messages."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled answer."""

    ids: tuple[int, ...]
    """With the end token, where there is one: when to end is learnt, too."""
    text: str
    logprobs: tuple[float, ...]
    """Of each token under the weights that sampled it, at temperature 1."""
    finished: bool = True
    """False: cut at `max_tokens`."""


class Generator(Protocol):
    """Samples from a policy."""

    def generate(
        self, prompts: Sequence[Sequence[int]], *, n: int, max_tokens: int, temperature: float, seed: int
    ) -> list[list[Completion]]:
        """`n` answers to each prompt, in order. Equal seeds and weights give equal answers."""

    def sync(self, model: nn.Module) -> None:
        """From now on sample with these weights; nothing computed with older ones is used."""


class LlmGenerator:
    """Generates with the offline class of the serving engine, or anything of its interface."""

    def __init__(self, llm: Any, *, params: Callable[..., Any]) -> None:
        """Args: llm: has `generate(prompts, params, progress=)`, `forget_prefixes()` and `model`. params: makes sampling parameters:
        `SamplingParams`.
        """
        self._llm, self._params = llm, params

    def generate(
        self, prompts: Sequence[Sequence[int]], *, n: int, max_tokens: int, temperature: float, seed: int
    ) -> list[list[Completion]]:
        """See `Generator`. Choice j of prompt i has the seed `seed + i n + j`."""
        params = [
            self._params(n=n, max_tokens=max_tokens, temperature=temperature, seed=seed + place * n, logprobs=0)
            for place in range(len(prompts))
        ]
        answers = self._llm.generate([list(prompt) for prompt in prompts], params, progress=False)
        return [[_completion(choice) for choice in answer.choices] for answer in answers]

    def sync(self, model: nn.Module) -> None:
        """See `Generator`. Copies only what does not share memory with the model. Raises: CheckpointError if names do not fit."""
        copy_weights(model, self._llm.model)
        self._llm.forget_prefixes()


def _completion(choice: Any) -> Completion:
    return Completion(
        ids=tuple(choice.ids),
        text=choice.text,
        logprobs=tuple(one.logprob for one in choice.logprobs),
        finished=choice.finish_reason == "stop",
    )


class PromptList:
    """Prompts in endless order: shuffled anew for every round, from the seed alone. A `RowStream` of one prompt per row."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int = 0) -> None:
        """Raises: ConfigError without prompts; ShapeError for one without tokens."""
        if not prompts:
            raise ConfigError("there are no prompts to learn from")
        for prompt in prompts:
            if not prompt.ids:
                raise ShapeError(f"{prompt.origin or 'a prompt without origin'} has no tokens")
        self._prompts, self._seed = list(prompts), seed
        digest = blake2b(digest_size=8)
        for prompt in prompts:
            digest.update(repr(prompt.ids).encode())
        self._fingerprint = digest.hexdigest()
        self._round, self._at, self._order = 0, 0, self._shuffled(0)

    def next_row(self) -> Sequence[Prompt]:
        """The next prompt."""
        if self._at == len(self._order):
            self._round, self._at = self._round + 1, 0
            self._order = self._shuffled(self._round)
        self._at += 1
        return (self._prompts[self._order[self._at - 1]],)

    def state(self) -> dict[str, Any]:
        """See `RowStream`."""
        return {"round": self._round, "at": self._at, "prompts": self._fingerprint}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `RowStream`."""
        if state.get("prompts") != self._fingerprint:
            raise CheckpointError("the checkpoint was written with other prompts: resume with the same data")
        self._round, self._at = int(state["round"]), int(state["at"])
        self._order = self._shuffled(self._round)

    def _shuffled(self, number: int) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(derived_seed(self._seed, number)).shuffle(order)
        return order


def derived_seed(*parts: int) -> int:
    """A seed of 60 bits that follows from whole numbers, far from those of other numbers."""
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 4
