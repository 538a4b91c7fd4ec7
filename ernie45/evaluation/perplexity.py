"""Perplexity of a text: how many equally likely tokens the model hesitates between, on average.

The text is read in windows of W tokens that begin S tokens after each other. Every token but the text's first is predicted
exactly once, in the first window that reaches it: with S = W windows follow each other, and the first tokens of each see little
(fast, and somewhat pessimistic); with S < W every token of a later window sees at least W - S tokens before it.
The mean is over tokens, whatever window they were in. Bits per byte compare models with different vocabularies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from ernie45.errors import RequestError
from ernie45.evaluation.score import BATCH_TOKENS, Target, score
from ernie45.models.text import CausalLM
from ernie45.quant.quality import Encoder

DEFAULT_WINDOW = 1024


class TextCodec(Encoder, Protocol):
    """What turns text into token ids and back."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        ...


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What a model makes of a text."""

    perplexity: float
    nats_per_token: float
    bits_per_byte: float
    """Of UTF-8, the predicted tokens' bytes alone."""
    standard_error: float
    """Of `nats_per_token`, as if tokens were independent."""
    tokens: int
    """Predicted tokens."""
    window: int
    stride: int


def perplexity(
    model: CausalLM,
    tokenizer: TextCodec,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measure a text.

    Args: window: W; None is 1024, or the model's context if that is shorter. stride: S, 1 to W; None is W. max_tokens: read no
            more of the text. progress: called with predicted tokens and all.
    Raises: RequestError for a text of fewer than two tokens, or a window or stride out of range.
    """
    limit = model.config.max_position_embeddings
    window = min(DEFAULT_WINDOW, limit) if window is None else window
    stride = window if stride is None else stride
    if not 1 <= window <= limit or not 1 <= stride <= window:
        raise RequestError(
            f"window is {window} and stride {stride}: expected a window of 1 to {limit} (the model's context) and a stride of 1 to "
            "the window"
        )
    ids = tokenizer.encode(text)[: None if max_tokens is None else max_tokens]
    if len(ids) < 2:
        raise RequestError(f"the text has {len(ids)} tokens: two are needed, one of which is predicted")
    together = max(1, BATCH_TOKENS // window)
    sums = _sums(model, _windows(ids, window, stride), together, len(ids) - 1, progress)
    return _measured(sums, len(ids) - 1, _predicted_bytes(tokenizer, ids), window, stride)


def _sums(
    model: CausalLM, windows: Iterator[Target], together: int, total: int, progress: Callable[[int, int], None] | None
) -> tuple[float, float]:
    """Sum of the tokens' negative log-probabilities, and of their squares."""
    nats, squares, done = 0.0, 0.0, 0
    while batch := list(islice(windows, together)):
        for found in score(model, batch):
            logprobs = found.logprobs.double()
            nats -= float(logprobs.sum())
            squares += float(logprobs.square().sum())
            done += len(logprobs)
        if progress is not None:
            progress(done, total)
    return nats, squares


def _windows(ids: Sequence[int], window: int, stride: int) -> Iterator[Target]:
    """Windows of at most `window` tokens that are read, and one more that is only predicted."""
    predicted = 1
    for start in range(0, len(ids) - 1, stride):
        end = min(start + window + 1, len(ids))
        yield Target(ids=tuple(ids[start:end]), num_scored=end - predicted)
        predicted = end
        if end == len(ids):
            return


def _predicted_bytes(tokenizer: TextCodec, ids: Sequence[int]) -> int:
    """Bytes of the text behind its first token; what was cut off by `max_tokens` does not count."""
    return len(tokenizer.decode(ids).encode()) - len(tokenizer.decode(ids[:1]).encode())


def _measured(sums: tuple[float, float], tokens: int, num_bytes: int, window: int, stride: int) -> Perplexity:
    mean = sums[0] / tokens
    variance = max(sums[1] / tokens - mean**2, 0.0) * tokens / max(tokens - 1, 1)
    return Perplexity(
        perplexity=math.exp(min(mean, 700.0)),  # beyond it, a float64 overflows
        nats_per_token=mean,
        bits_per_byte=sums[0] / math.log(2) / max(num_bytes, 1),
        standard_error=math.sqrt(variance / tokens),
        tokens=tokens,
        window=window,
        stride=stride,
    )
