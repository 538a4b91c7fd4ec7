"""The reference generator: the shortest correct way from a prompt to text.

It serves `ernie chat` until the engine does, and stays as that engine's oracle. One step is: run the new tokens of
every sequence, sample, append; sequences of a batch share the step and nothing else.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ernie45.engine.sampling import SamplingParams, TokenLogprob, sample, token_logprob
from ernie45.engine.stops import StopChecker
from ernie45.errors import RequestError
from ernie45.layers.cache import AttentionView, KVCache
from ernie45.models.text import CausalLM
from ernie45.processing.detokenizer import Detokenizer
from ernie45.processing.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text that is continued as it stands, token ids, or chat messages (rendered with the tokenizer's template)."""

PREFILL_CHUNK = 512
"""Prompt tokens per step: bounds the activations that a long prompt needs."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one step adds to an output; the last piece carries the finish reason."""

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or end token that was met."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole output."""

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    stop_reason: str | int | None = None


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
    return [_join(sequence, parts) for sequence, parts in zip(sequences, pieces, strict=True)]


def prompt_ids(
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool | None = None,
) -> list[int]:
    """Token ids of a prompt in any of its forms. Raises: RequestError for an empty one."""
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    elif all(isinstance(item, int) for item in prompt):
        ids = [item for item in prompt if isinstance(item, int)]
    else:
        messages = [item for item in prompt if not isinstance(item, int)]
        if len(messages) != len(prompt):
            raise RequestError("the prompt mixes token ids and messages: give one kind")
        ids = tokenizer.encode(tokenizer.render(messages, tools=tools, thinking=thinking))
    if not ids:
        raise RequestError("the prompt is empty: give at least one token")
    return ids


def room_for_answer(num_prompt: int, max_tokens: int | None, limit: int) -> int:
    """Tokens that a context of `limit` leaves behind a prompt. Raises: RequestError if the request does not fit."""
    room = limit - num_prompt
    if room < 1:
        raise RequestError(
            f"prompt has {num_prompt} tokens, the model's context holds {limit}: shorten the prompt to {limit - 1} tokens "
            "or fewer, so that an answer has room"
        )
    if max_tokens is not None and max_tokens > room:
        raise RequestError(
            f"prompt has {num_prompt} tokens and max_tokens is {max_tokens}, the model's context holds {limit}: "
            f"shorten the prompt, or lower max_tokens to {room}"
        )
    return room


@dataclass
class _Sequence:
    """One prompt on its way to an output."""

    model: CausalLM
    tokenizer: Tokenizer
    prompt: list[int]
    params: SamplingParams
    output: list[int] = field(default_factory=list)
    finished: bool = False

    def __post_init__(self) -> None:
        limit, vocab = self.model.config.max_position_embeddings, self.model.config.vocab_size
        room = room_for_answer(len(self.prompt), self.params.max_tokens, limit)
        if min(self.prompt) < 0 or max(self.prompt) >= vocab:
            raise RequestError(
                f"prompt holds token ids from {min(self.prompt)} to {max(self.prompt)}, "
                f"the model knows 0 to {vocab - 1}"
            )
        self.max_tokens = self.params.max_tokens or room
        self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed
        self.cache: KVCache = self.model.new_cache(min(len(self.prompt) + min(self.max_tokens, 256), limit))
        self.detokenizer = Detokenizer(self.tokenizer)
        self.stops = StopChecker(self.params.stop)
        ends = frozenset() if self.params.ignore_eos else self.tokenizer.stop_ids
        self.end_ids = ends | set(self.params.stop_token_ids)

    def accept(self, logits_V: Tensor) -> Piece:
        """Sample from the logits behind the last token and add the result."""
        # Published tables end in padding rows, which stand for no text.
        logits_V = logits_V[: self.tokenizer.vocab_size]
        too_early = len(self.output) < self.params.min_tokens
        banned = sorted(i for i in self.end_ids if too_early and i < len(logits_V))
        token = sample(logits_V, self.params, seed=self.seed, prompt=self.prompt, output=self.output, banned=banned)
        logprobs = () if self.params.logprobs is None else (token_logprob(logits_V, token, self.params.logprobs),)
        self.output.append(token)
        if token in self.end_ids:
            return self._finish("", token, logprobs, "stop", token)
        text, stop = self.stops.push(self.detokenizer.push(token), armed=len(self.output) >= self.params.min_tokens)
        if stop is not None:
            self.finished = True
            return Piece(text=text, ids=(token,), logprobs=logprobs, finish_reason="stop", stop_reason=stop)
        if len(self.output) >= self.max_tokens:
            return self._finish(text, token, logprobs, "length", None)
        return Piece(text=text, ids=(token,), logprobs=logprobs)

    def _finish(
        self, text: str, token: int, logprobs: tuple[TokenLogprob, ...], reason: FinishReason, stop_reason: int | None
    ) -> Piece:
        self.finished = True
        rest, stop = self.stops.push(self.detokenizer.finish(), armed=True)
        rest = rest if stop is not None else rest + self.stops.finish()
        if stop is not None:
            return Piece(text=text + rest, ids=(token,), logprobs=logprobs, finish_reason="stop", stop_reason=stop)
        return Piece(text=text + rest, ids=(token,), logprobs=logprobs, finish_reason=reason, stop_reason=stop_reason)


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
    ids = torch.tensor([sequence.output[-1] for sequence in sequences], device=model.device)
    view = AttentionView(lengths=(1,) * len(sequences), caches=tuple(sequence.cache for sequence in sequences))
    return model.logits(model.hidden(ids, view))


def _join(sequence: _Sequence, pieces: list[Piece]) -> Completion:
    last = pieces[-1]
    assert last.finish_reason is not None, "a finished sequence ends with its reason"
    return Completion(
        text="".join(piece.text for piece in pieces),
        ids=tuple(sequence.output),
        finish_reason=last.finish_reason,
        prompt_tokens=len(sequence.prompt),
        logprobs=tuple(logprob for piece in pieces for logprob in piece.logprobs),
        stop_reason=last.stop_reason,
    )
