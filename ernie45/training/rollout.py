"""Where reinforcement learning gets its answers from: a generator that is handed in.

Training does not import the engine. It takes an object that generates (`Generator`); `LlmGenerator` makes one of anything that has the
interface of `ernie45.LLM`:

    llm = LLM(sampler_twin(network.model), tokenizer=tokenizer, max_step_tokens_beside_decodes=512)
    generator = LlmGenerator(llm, params=SamplingParams)

The twin is a second network over the same memory. One of 8-bit weights that are rounded anew before each rollout is several times as
fast, and not quite the policy that learns:

    twin = PackedTwin(network.model)
    generator = LlmGenerator(LLM(twin.network, ..), params=SamplingParams, renew=twin.renew)

A fixed number of prompt tokens beside those that decode makes steps independent of
time: who shares a step decides on the last bits of plain matrix products, and a run that goes on shall sample what it would have.
Before each rollout `sync` brings the weights over and empties the prefix cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from ernie45.training.sampler_weights import copy_weights


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

    def __init__(
        self, llm: Any, *, params: Callable[..., Any], renew: Callable[[nn.Module], object] | None = None
    ) -> None:
        """Args: llm: has `generate(prompts, params, progress=)`, `forget_prefixes()` and `model`. params: makes sampling parameters:
        `SamplingParams`. renew: brings a model's weights into the one that samples; None: that is a `sampler_twin`, or has the same
        parameters.
        """
        self._llm, self._params = llm, params
        self._renew = renew or (lambda model: copy_weights(model, llm.model))

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
        """See `Generator`. Raises: CheckpointError if the networks differ."""
        self._renew(model)
        self._llm.forget_prefixes()


def _completion(choice: Any) -> Completion:
    return Completion(
        ids=tuple(choice.ids),
        text=choice.text,
        logprobs=tuple(one.logprob for one in choice.logprobs),
        finished=choice.finish_reason == "stop",
    )
