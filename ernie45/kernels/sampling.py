"""The draw of a token from a row of logits, the log-probability of one, and the random number that decides.

Shape letter: V vocabulary. The native twin is in `csrc/kernels/sampling.cpp`, where the order of its sums is written down;
work: an exponential per id, in float64 for the draw. Random numbers are the same to the bit; a sum's last bit may differ
from the reference's, which matters to a draw that falls on a border between two ids, about once in 10^13.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.kernels.check import check_tensor
from ernie45.kernels.choice import native

Ids = NDArray[np.intp]
Probs = NDArray[np.float64]

NOTHING_TO_DRAW = -1
"""What `draw` answers where every logit is -inf."""
NOT_FINITE = -2
"""What `draw` answers where some logit is NaN or +inf."""

LEAST_TEMPERATURE = 1e-6
"""The smallest that `draw` takes, so that all its numbers stay finite."""

_NUM_SEEDS = 2**64


def draw(logits_V: Tensor, temperature: float, seed: int, step: int, top_p: float = 1.0) -> int:
    """An id with the probability that softmax(logits / temperature) gives it, never one of probability 0.

    The inverse of the cumulative distribution over ids in ascending order, at `uniform(seed, step)`; float64. Ids are the fewest
    of the largest probabilities that reach `top_p` together, of equal ones the lowest.

    Args: logits_V: float32, contiguous, on the CPU; -inf is probability 0. temperature: finite, from
            LEAST_TEMPERATURE. seed, step: 0 to 2^64 - 1. top_p: above 0, up to 1.
    Returns: the id, or NOTHING_TO_DRAW or NOT_FINITE. Raises: ShapeError for other arguments.
    """
    extension = native()
    if extension is None:
        _check_draw(logits_V, temperature, seed, step, top_p)
        return draw_reference(logits_V, temperature, seed, step, top_p)
    try:
        return int(extension.draw(logits_V, temperature, seed, step, top_p))
    except (TypeError, ValueError) as error:
        _check_draw(logits_V, temperature, seed, step, top_p)
        raise ShapeError(str(error)) from error


def logprob(logits_V: Tensor, token: int) -> float:
    """Log-probability of a token under softmax(logits), right to 1e-6; NaN where a logit is NaN or +inf, or all are -inf.

    Args: logits_V: float32, contiguous, on the CPU. token: 0 to V - 1. Raises: ShapeError for other arguments.
    """
    extension = native()
    if extension is None:
        _check_logprob(logits_V, token)
        return logprob_reference(logits_V, token)
    try:
        return float(extension.logprob(logits_V, token))
    except (TypeError, ValueError) as error:
        _check_logprob(logits_V, token)
        raise ShapeError(str(error)) from error


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that depends on seed and step alone (Philox, counter-based).

    Args: seed, step: 0 to 2^64 - 1. Raises: ShapeError for others.
    """
    extension = native()
    _check_seed("uniform", seed, step)
    return uniform_reference(seed, step) if extension is None else float(extension.uniform(seed, step))


def draw_reference(logits_V: Tensor, temperature: float, seed: int, step: int, top_p: float = 1.0) -> int:
    """What `draw` computes; differs from the native twin by the last bits of exponentials and sums."""
    values = logits_V.numpy()
    best = float(values.max())  # NaN where any is
    if best == -math.inf:
        return NOTHING_TO_DRAW
    if not math.isfinite(best):
        return NOT_FINITE
    weights = np.exp((values - np.float32(best)).astype(np.float64) / temperature)
    ids = nucleus(weights, top_p) if top_p < 1 else None
    # torch's cumulative sum is twice as quick as NumPy's.
    cumulative = torch.from_numpy(weights if ids is None else weights[ids]).cumsum(-1).numpy()
    at = place_of(uniform_reference(seed, step), cumulative)
    return at if ids is None else int(ids[at])


def place_of(share: float, cumulative: Probs) -> int:
    """The first place whose cumulative weight exceeds this share, in [0, 1), of all; never one that adds nothing."""
    total = float(cumulative[-1])
    at = int(np.searchsorted(cumulative, share * total, side="right"))
    # Rounding can push the target to the very end of the sum: then the first place that reaches it.
    return at if at < len(cumulative) else int(np.searchsorted(cumulative, total))


def nucleus(probs: Probs, share: float) -> Ids:
    """Places of the fewest largest values that reach `share` of the sum, ascending; of equal values the first ones.

    A value below (1 - share) of the mean lies outside: all such values together are less than what the nucleus leaves out. So
    only the others are sorted, by value alone, which is all that is needed to know the smallest member.
    """
    total = float(probs.sum())
    mass = share * total
    # Half of it, so that no rounding can matter.
    candidates = probs[probs > 0.5 * (1 - share) * total / len(probs)]
    descending = np.sort(candidates)[::-1]
    needed = min(int((descending.cumsum() < mass).sum()) + 1, len(descending))
    return first_above(probs, float(descending[needed - 1]), needed)


def first_above(probs: Probs, threshold: float, count: int) -> Ids:
    """Places of all values above `threshold`, and of as many equal ones as make `count`; ascending."""
    places = np.flatnonzero(probs >= threshold)
    surplus = len(places) - count
    if surplus == 0:
        return places
    equal = np.flatnonzero(probs[places] == threshold)
    return np.delete(places, equal[len(equal) - surplus :])


def logprob_reference(logits_V: Tensor, token: int) -> float:
    """What `logprob` computes, in float64; the native twin takes exponentials of float32."""
    return float(logits_V.double().log_softmax(-1)[token])


def uniform_reference(seed: int, step: int) -> float:
    """What `uniform` computes, to the bit; making NumPy's generator takes 9 us."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=step)).random())


def _check_draw(logits_V: Tensor, temperature: float, seed: int, step: int, top_p: float) -> None:
    _check_row("draw", logits_V)
    if not LEAST_TEMPERATURE <= temperature < math.inf:
        raise ShapeError(f"[draw] temperature: expected a finite number from {LEAST_TEMPERATURE}, got {temperature}")
    if not 0 < top_p <= 1:
        raise ShapeError(f"[draw] top_p: expected a number above 0, up to 1, got {top_p}")
    _check_seed("draw", seed, step)


def _check_logprob(logits_V: Tensor, token: int) -> None:
    _check_row("logprob", logits_V)
    if not 0 <= token < len(logits_V):
        raise ShapeError(f"[logprob] token: expected an id from 0 to {len(logits_V) - 1}, got {token}")


def _check_row(operation: str, logits_V: Tensor) -> None:
    check_tensor(operation, "logits", logits_V, (max(logits_V.numel(), 1),))


def _check_seed(operation: str, seed: int, step: int) -> None:
    for name, value in (("seed", seed), ("step", step)):
        if not 0 <= value < _NUM_SEEDS:
            raise ShapeError(f"[{operation}] {name}: expected a whole number from 0 to 2^64 - 1, got {value}")
