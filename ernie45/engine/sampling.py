"""What a request asks of the sampler, and the sampler: exact, documented, the same on every machine.

Order (reference inference 3.5): repetition penalty over prompt and output, frequency and presence penalty over the
output, temperature, ban of end tokens before `min_tokens`; then softmax, min_p, top_k, top_p, draw. Each filter sees
the probabilities that the one before left, renormalised. Temperature 0 takes the largest logit after the penalties,
ties to the lowest id.

The draw is the inverse of the cumulative distribution over token ids in ascending order, at a uniform number that
depends on seed and step alone: no state to carry, nothing to replay after a preemption.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ernie45.errors import RequestError

_FIRST_NUCLEUS = 1024
_MAX_SEED = 2**63 - 1
_MAX_STOP_STRINGS = 64
MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue one prompt. Defaults change nothing: plain sampling from the model's distribution."""

    max_tokens: int | None = None
    """Most tokens to generate; None = what the context leaves."""
    min_tokens: int = 0
    """No end token and no stop string before this many tokens."""
    temperature: float = 1.0
    """Divides the logits; 0 = greedy."""
    top_p: float = 1.0
    """Keep the most probable tokens up to this sum, the crossing one included; 1 = off."""
    top_k: int = 0
    """Keep this many most probable tokens; 0 or -1 = off."""
    min_p: float = 0.0
    """Drop tokens less probable than this share of the most probable one; 0 = off."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output; 1 = off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output; -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the output; -2 to 2."""
    seed: int | None = None
    """None draws a seed; equal seeds give equal output."""
    stop: tuple[str, ...] = ()
    """Strings that end the output; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the output, beside the tokenizer's own."""
    ignore_eos: bool = False
    """Go on past the tokenizer's end tokens (not past `stop_token_ids`)."""
    logprobs: int | None = None
    """Report log-probabilities of each token and this many alternatives, 0 to 20."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._check_range("temperature", 0.0, 100.0)
        self._check_range("top_p", 0.0, 1.0)
        self._check_range("min_p", 0.0, 1.0)
        self._check_range("presence_penalty", -2.0, 2.0)
        self._check_range("frequency_penalty", -2.0, 2.0)
        self._check_range("repetition_penalty", 1e-3, 100.0)
        self._check_range("top_k", -1, 2**31)
        self._check_range("min_tokens", 0, 2**31)
        if self.top_p == 0:
            raise RequestError(
                "top_p is 0, expected a value above 0 and up to 1: use temperature 0 for greedy decoding"
            )
        if self.max_tokens is not None:
            self._check_range("max_tokens", 1, 2**31)
            if self.min_tokens > self.max_tokens:
                raise RequestError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}")
        if self.seed is not None:
            self._check_range("seed", 0, _MAX_SEED)
        if self.logprobs is not None:
            self._check_range("logprobs", 0, MAX_LOGPROBS)
        if len(self.stop) > _MAX_STOP_STRINGS or any(not isinstance(s, str) or not s for s in self.stop):
            raise RequestError(
                f"stop holds {len(self.stop)} entries; expected at most {_MAX_STOP_STRINGS} strings, none empty"
            )

    def _check_range(self, name: str, low: float, high: float) -> None:
        """Whole bounds ask for a whole number."""
        value = getattr(self, name)
        whole = isinstance(low, int)
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            # Not :g for whole numbers, which would round a limit of 2147483648 to 2.14748e+09.
            bounds = f"a whole number from {low} to {high}" if whole else f"a number from {low:g} to {high:g}"
            raise RequestError(f"{name} is {value!r}, expected {bounds}")


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Log-probability of one generated token, before penalties, temperature and filters."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most probable alternatives as (id, log-probability), best first."""


def penalise(logits_V: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """Logits after repetition, frequency and presence penalty, float32 (V,); a no-op returns equal values."""
    logits_V = logits_V.float()
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt, *output}), dtype=torch.int64, device=logits_V.device)
        values = logits_V[seen]
        factor = params.repetition_penalty
        logits_V = logits_V.index_copy(0, seen, torch.where(values < 0, values * factor, values / factor))
    if output and (params.frequency_penalty or params.presence_penalty):
        ids, counts = torch.tensor(output, device=logits_V.device).unique(return_counts=True)
        drop = counts.float() * params.frequency_penalty + params.presence_penalty
        logits_V = logits_V.index_add(0, ids, -drop)
    return logits_V


def sample(
    logits_V: Tensor,
    params: SamplingParams,
    *,
    seed: int,
    prompt: Sequence[int],
    output: Sequence[int],
    banned: Sequence[int] = (),
) -> int:
    """Choose the next token.

    Args: logits_V: the model's logits, any float dtype. seed: the request's seed; the step is `len(output)`. prompt,
            output: ids so far. banned: ids that must not be chosen, such as end tokens before `min_tokens`.
    Raises: RequestError if the logits hold NaN, or nothing may be chosen.
    """
    logits_V = penalise(logits_V, params, prompt, output)
    if banned:
        logits_V = logits_V.index_fill(0, torch.tensor(banned, device=logits_V.device), -math.inf)
    best_id = int(logits_V.argmax())  # the lowest of equals; a NaN counts as the largest
    best = float(logits_V[best_id])
    if not math.isfinite(best):
        raise RequestError("the model's logits are not finite: the weights or the activations overflow in this dtype")
    if params.temperature == 0:
        return best_id
    probs = ((logits_V - best).double() / max(params.temperature, 1e-6)).softmax(-1)
    probs = _filter(probs, params)
    cumulative = probs.cumsum(-1)
    target = uniform(seed, len(output)) * float(cumulative[-1])
    idx = int(
        torch.searchsorted(cumulative, torch.tensor(target, dtype=torch.float64, device=probs.device), right=True)
    )
    kept = probs.nonzero().flatten()
    # Rounding can push the target to the very end of the cumulative sum.
    return min(idx, int(kept[-1]))


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that depends on seed and step alone (Philox, counter-based)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=step)).random())


def token_logprob(logits_V: Tensor, token: int, num_top: int) -> TokenLogprob:
    """Log-probability of `token` and of the `num_top` best, from raw logits."""
    logprobs = logits_V.float().log_softmax(-1)
    values, ids = logprobs.topk(num_top)
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(id=token, logprob=float(logprobs[token]), top=top)


def _filter(probs_V: Tensor, params: SamplingParams) -> Tensor:
    """Zero what min_p, top_k and top_p drop; the rest is left unnormalised."""
    if params.min_p > 0:
        probs_V = probs_V.masked_fill(probs_V < params.min_p * probs_V.max(), 0.0)
    if 0 < params.top_k < len(probs_V):
        probs_V = _keep(probs_V, _largest(probs_V, params.top_k))
    if params.top_p < 1:
        probs_V = _keep(probs_V, _nucleus(probs_V, params.top_p * float(probs_V.sum())))
    return probs_V


def _largest(probs_V: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest values, best first, equal values by ascending id."""
    threshold = probs_V.topk(count).values[-1]
    candidates = (probs_V >= threshold).nonzero().flatten()
    order = probs_V[candidates].argsort(descending=True, stable=True)
    return candidates[order[:count]]


def _nucleus(probs_V: Tensor, mass: float) -> Tensor:
    """Ids of the fewest largest values that reach `mass`. Sorting a whole vocabulary is slow: try its top first."""
    count = min(_FIRST_NUCLEUS, len(probs_V))
    while True:
        ids = _largest(probs_V, count)
        cumulative = probs_V[ids].cumsum(-1)
        needed = int((cumulative < mass).sum()) + 1
        if needed <= count or count == len(probs_V):
            return ids[:needed]
        count = len(probs_V)


def _keep(probs_V: Tensor, ids: Tensor) -> Tensor:
    return torch.zeros_like(probs_V).index_copy(0, ids, probs_V[ids])
