"""The sampler: exact, documented, the same on every machine.

Order (reference inference 3.5): mask and bans; repetition penalty over prompt and output, frequency and presence penalty
over the output, bias, temperature; then softmax, min_p, top_k, top_p, draw. Each filter sees the probabilities that the
one before left, renormalised. Temperature 0 takes the largest logit after penalties and bias, ties to the lowest id.

The draw is the inverse of the cumulative distribution over token ids in ascending order, at a uniform number that
depends on seed and step alone: no state to carry, nothing to replay after a preemption. And a guess at the next tokens
can be verified by sampling as always: a guess is right with the probability that the distribution gives it, which is
what exact rejection sampling accepts of a draft without a distribution of its own.

Probabilities are float64. What scales with the vocabulary of 103424 is an exponential and a sum, on one thread, because waking
others is not free: a kernel where nothing but top_p filters, NumPy otherwise; filters sort only what can survive them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernie45.engine.params import SamplingParams
from ernie45.engine.pieces import TokenLogprob
from ernie45.errors import RequestError
from ernie45.kernels.sampling import (
    LEAST_TEMPERATURE,
    NOT_FINITE,
    NOTHING_TO_DRAW,
    Ids,
    Probs,
    draw,
    first_above,
    logprob,
    nucleus,
    place_of,
    uniform,
)

_REFUSALS = {
    NOTHING_TO_DRAW: "every token is banned here: mask, bad_words, min_tokens and end tokens leave nothing to choose",
    NOT_FINITE: "the model's logits are not finite: the weights or the activations overflow in this dtype",
}


class LogitsMask(Protocol):
    """What an output may go on with, such as a grammar. One object serves one choice."""

    def allowed(self, output: Sequence[int]) -> Tensor | None:
        """Ids that may follow, bool (tokenizer's vocabulary,) on the CPU; None allows all.

        Args: output: all ids of the output so far. The answer depends on them alone: calls may come with an output that is
            longer or shorter than that of the call before (drafts are tried and dropped).
        """
        ...

    def finished(self, output: Sequence[int]) -> bool:
        """Whether the output is whole, so that it ends here without an end token. The answer depends on `output` alone."""
        ...


@runtime_checkable
class PreparedMask(LogitsMask, Protocol):
    """A mask that can work ahead, while the network runs."""

    def prepare(self, output: Sequence[int]) -> None:
        """Do what `allowed(output)` will need, so that it is quick if it is asked for the same output next.

        Called on another thread, with nothing else called at the same time. It changes no answer: what it raises is dropped,
        and `allowed` raises it again.
        """
        ...


def penalise(logits_V: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """Logits after repetition, frequency and presence penalty and bias, float32 (V,)."""
    logits_V = logits_V.float()
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(np.array([*prompt, *output], dtype=np.int64)))
        seen = seen[seen < len(logits_V)].to(logits_V.device)  # a prompt may hold ids of padding rows
        values = logits_V[seen]
        factor = params.repetition_penalty
        logits_V = logits_V.index_copy(0, seen, torch.where(values < 0, values * factor, values / factor))
    if output and (params.frequency_penalty or params.presence_penalty):
        ids, counts = torch.tensor(output, device=logits_V.device).unique(return_counts=True)
        drop = counts.float() * params.frequency_penalty + params.presence_penalty
        logits_V = logits_V.index_add(0, ids, -drop)
    if params.logit_bias:
        biased = torch.tensor(list(params.logit_bias), device=logits_V.device)
        added = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=logits_V.device)
        logits_V = logits_V.index_add(0, biased, added)
    return logits_V


def sample(
    logits_V: Tensor,
    params: SamplingParams,
    *,
    seed: int,
    prompt: Sequence[int],
    output: Sequence[int],
    banned: Sequence[int] = (),
    allowed_V: Tensor | None = None,
) -> int:
    """Choose the next token.

    Args: logits_V: the model's logits, any float dtype. seed: the request's seed; the step is `len(output)`. prompt,
            output: ids so far. banned: ids that must not be chosen, such as end tokens before `min_tokens`. allowed_V: bool,
            the only ids that may be chosen, of which the logits may lack the last; None: all.
    Raises: RequestError if the logits hold NaN, or nothing may be chosen.
    """
    logits_V = penalise(logits_V, params, prompt, output)
    if allowed_V is not None:
        logits_V = logits_V.masked_fill(~allowed_V[: len(logits_V)].to(logits_V.device), -math.inf)
    if banned:
        logits_V = logits_V.index_fill(0, torch.tensor(banned, device=logits_V.device), -math.inf)
    logits_V = logits_V.cpu().contiguous()
    temperature = max(params.temperature, LEAST_TEMPERATURE)
    if params.temperature == 0:
        token = _best(logits_V)
    elif params.min_p > 0 or params.top_k > 0:
        token = _draw_filtered(logits_V, params, temperature, seed, len(output))
    else:
        token = draw(logits_V, temperature, seed, len(output), params.top_p)
    if token in _REFUSALS:
        raise RequestError(_REFUSALS[token])
    return token


def token_logprob(logits_V: Tensor, token: int, num_top: int) -> TokenLogprob:
    """Log-probability of `token` and of the `num_top` best, from raw logits."""
    if num_top == 0:
        return TokenLogprob(id=token, logprob=logprob(logits_V.float().cpu().contiguous(), token), top=())
    logprobs = logits_V.float().log_softmax(-1)
    values, ids = logprobs.topk(num_top)
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(id=token, logprob=float(logprobs[token]), top=top)


def _best(logits_V: Tensor) -> int:
    """The lowest id of the largest logit, or what refuses them."""
    # NumPy's argmax takes a thirtieth of torch's time: 6 us. Both give the lowest of equals, and NaN is the largest.
    values: NDArray[Any] = logits_V.numpy()
    token = int(values.argmax())
    if values[token] == -math.inf:
        return NOTHING_TO_DRAW
    return token if math.isfinite(values[token]) else NOT_FINITE


def _draw_filtered(logits_V: Tensor, params: SamplingParams, temperature: float, seed: int, step: int) -> int:
    """What `draw` does, among the ids that the filters leave."""
    best = _best(logits_V)
    if best in _REFUSALS:
        return best
    values: NDArray[Any] = logits_V.numpy()
    # Not divided by their sum: filters and draw compare shares of it. The largest is 1.
    probs_V: Probs = np.exp((values - values[best]).astype(np.float64) / temperature)
    ids = _kept(probs_V, params)
    probs = probs_V if ids is None else probs_V[ids]
    at = place_of(uniform(seed, step), torch.from_numpy(probs).cumsum(-1).numpy())
    return at if ids is None else int(ids[at])


def _kept(probs_V: Probs, params: SamplingParams) -> Ids | None:
    """Ids that min_p, top_k and top_p leave, ascending; None: all."""
    ids: Ids | None = None
    if params.min_p > 0:
        ids = np.flatnonzero(probs_V >= params.min_p)
    if 0 < params.top_k < (len(probs_V) if ids is None else len(ids)):
        ids = _narrow(ids, _largest(probs_V if ids is None else probs_V[ids], params.top_k))
    if params.top_p < 1:
        ids = _narrow(ids, nucleus(probs_V if ids is None else probs_V[ids], params.top_p))
    return ids


def _narrow(ids: Ids | None, chosen: Ids) -> Ids:
    """Of the ids (None: all), those at `chosen`."""
    return chosen if ids is None else ids[chosen]


def _largest(probs: Probs, count: int) -> Ids:
    """Places of the `count` largest values, ascending; of equal values the first ones."""
    return first_above(probs, float(np.partition(probs, len(probs) - count)[len(probs) - count]), count)
