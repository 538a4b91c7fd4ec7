"""The reference generator: the shortest correct way from a prompt to text.

It serves `ernie chat`, and is the engine's oracle: the two share `generation.py` and nothing else. One step is: run the new
tokens of every sequence, sample, append; sequences of a batch share the step and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ernie45.engine.generation import Generation
from ernie45.engine.params import SamplingParams
from ernie45.engine.pieces import Completion, Piece, join
from ernie45.engine.prompts import Prompt, check_ids, prompt_ids, room_for_answer
from ernie45.errors import RequestError
from ernie45.layers.cache import AttentionView, KVCache
from ernie45.models.text import CausalLM
from ernie45.processing.tokenizer import Tokenizer

PREFILL_CHUNK = 512
"""Prompt tokens per step: bounds the activations that a long prompt needs."""


def generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    sampling: SamplingParams | None = None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool | None = None,
) -> Iterator[Piece]:
    """Continue a prompt, piece by piece.

    Args: prompt: text, ids or messages. sampling: None = plain sampling. tools, thinking: for the chat template of
        messages.
    Yields: a `Piece` per token; text that might begin a stop string or is half a character is held back to a later
    piece.
    Raises: RequestError, before the first piece, if the prompt is empty, has unknown ids or does not fit the context.
    """
    params = sampling or SamplingParams()
    sequence = _Sequence(model, tokenizer, prompt_ids(tokenizer, prompt, tools=tools, thinking=thinking), params)
    return _stream(model, sequence)


def generate_batch(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Continue several prompts together; each gets what it would get alone, up to the rounding of the matrix products.

    Args: sampling: one for all, or one per prompt. progress: called with finished and all prompts.
    """
    if sampling is None or isinstance(sampling, SamplingParams):
        sampling = [sampling or SamplingParams()] * len(prompts)
    if len(sampling) != len(prompts):
        raise RequestError(f"{len(sampling)} sampling parameters for {len(prompts)} prompts")
    sequences = [
        _Sequence(model, tokenizer, prompt_ids(tokenizer, prompt), params)
        for prompt, params in zip(prompts, sampling, strict=True)
    ]
    first = _prefill(model, sequences)
    pieces = [[sequence.accept(logits)] for sequence, logits in zip(sequences, first, strict=True)]
    while running := [i for i, sequence in enumerate(sequences) if not sequence.finished]:
        for i, logits in zip(running, _decode(model, [sequences[i] for i in running]), strict=True):
            pieces[i].append(sequences[i].accept(logits))
        if progress is not None:
            progress(sum(sequence.finished for sequence in sequences), len(sequences))
    return [join(parts, len(sequence.prompt)) for sequence, parts in zip(sequences, pieces, strict=True)]


@dataclass
class _Sequence:
    """One prompt on its way to an output."""

    model: CausalLM
    tokenizer: Tokenizer
    prompt: list[int]
    params: SamplingParams
    generation: Generation = field(init=False)
    cache: KVCache = field(init=False)

    def __post_init__(self) -> None:
        for name in ("n", "best_of", "prompt_logprobs"):
            if getattr(self.params, name) not in (None, 1):
                raise RequestError(
                    f"{name} is {getattr(self.params, name)}: a plain generator gives one output and scores no prompt; use "
                    "ernie45.LLM"
                )
        config = self.model.config
        room = room_for_answer(len(self.prompt), self.params.max_tokens, config.max_position_embeddings)
        check_ids(self.prompt, config.vocab_size)
        max_tokens = self.params.max_tokens or room
        self.generation = Generation(self.tokenizer, self.prompt, self.params, max_tokens=max_tokens)
        self.cache = self.model.new_cache(len(self.prompt) + min(max_tokens, 256))

    @property
    def finished(self) -> bool:
        return self.generation.finished

    def accept(self, logits_V: Tensor) -> Piece:
        """Sample from the logits behind the last token and add the result."""
        return self.generation.step(logits_V)


def _stream(model: CausalLM, sequence: _Sequence) -> Iterator[Piece]:
    yield sequence.accept(_prefill(model, [sequence])[0])
    while not sequence.finished:
        yield sequence.accept(_decode(model, [sequence])[0])


@torch.inference_mode()
def _prefill(model: CausalLM, sequences: list[_Sequence]) -> list[Tensor]:
    """Run the prompts, packed into steps of at most PREFILL_CHUNK tokens; logits (V,) behind the last token of each."""
    last: dict[int, Tensor] = {}
    for step in _prefill_steps([len(sequence.prompt) for sequence in sequences], PREFILL_CHUNK):
        ids = [i for at, start, end in step for i in sequences[at].prompt[start:end]]
        lengths = tuple(end - start for _, start, end in step)
        view = AttentionView(lengths=lengths, caches=tuple(sequences[at].cache for at, _, _ in step))
        hidden = model.hidden(torch.tensor(ids, device=model.device), view)
        finished = [i for i, (at, _, end) in enumerate(step) if end == len(sequences[at].prompt)]
        if finished:
            rows = torch.tensor(lengths, device=model.device).cumsum(0)[finished] - 1
            last |= zip((step[i][0] for i in finished), model.logits(hidden[rows]), strict=True)
    return [last[at] for at in range(len(sequences))]


def _prefill_steps(lengths: list[int], budget: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cut prompts into steps of at most `budget` tokens: lists of (prompt, start, end), prompts in order."""
    step: list[tuple[int, int, int]] = []
    room = budget
    for at, length in enumerate(lengths):
        start = 0
        while start < length:
            end = min(start + room, length)
            step.append((at, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield step
                step, room = [], budget
    if step:
        yield step


@torch.inference_mode()
def _decode(model: CausalLM, sequences: list[_Sequence]) -> Tensor:
    """One step of every sequence; logits (B, V)."""
    ids = torch.tensor([sequence.generation.output[-1] for sequence in sequences], device=model.device)
    view = AttentionView(lengths=(1,) * len(sequences), caches=tuple(sequence.cache for sequence in sequences))
    return model.logits(model.hidden(ids, view))
