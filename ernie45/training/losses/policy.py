"""Policy gradients: clipped ratios, clipped values, distances to a reference, and how tokens are weighed.

Log-probabilities are those of the sampled tokens, packed: T answer tokens of N answers behind each other, nothing else.
Losses come per token and are summed with `token_weights`, so that micro-batches of a step add up to the same loss.
Source: PPO arXiv:1707.06347, GRPO 2402.03300, GSPO 2507.18071; training reference 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ernie45.errors import ConfigError, ShapeError

Averaging = Literal["token", "answer", "constant"]
KlEstimator = Literal["k1", "k2", "k3"]
_MAX_LOG_RATIO = 20.0
"""Ratios end at e^20: what is further has left the data it was sampled from, and must not become infinite."""


def token_log_ratios(logprobs_T: Tensor, old_logprobs_T: Tensor) -> Tensor:
    """`log(pi / pi_old)` of each token, at most 20."""
    return (logprobs_T - old_logprobs_T).clamp(max=_MAX_LOG_RATIO)


def sequence_log_ratios(logprobs_T: Tensor, old_logprobs_T: Tensor, lengths: Sequence[int]) -> Tensor:
    """GSPO: the mean log-ratio of each answer, at each of its tokens, at most 20.

    With `answer` averaging the tokens' equal losses add up to one clipped ratio per answer.
    """
    ratios = split_answers(logprobs_T - old_logprobs_T, lengths)
    means_N = torch.stack([ratio.mean() for ratio in ratios])
    return spread_to_tokens(means_N, lengths).clamp(max=_MAX_LOG_RATIO)


def clipped_policy_losses(
    log_ratios_T: Tensor, advantages_T: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """`-min(r A, clip(r, 1 - low, 1 + high) A)` of each token, (T,).

    Nothing is gained by going further than the clip in the direction of the advantage; the way back always has a gradient.
    """
    ratios_T = log_ratios_T.exp()
    clipped_T = ratios_T.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratios_T * advantages_T, clipped_T * advantages_T)


def sampler_weights(old_logprobs_T: Tensor, sampler_logprobs_T: Tensor, *, cap: float) -> Tensor:
    """`min(pi_old / pi_sampler, cap)` of each token, (T,): truncated importance weights for answers of a sampler that is not quite
    the policy, because its weights are rounded. A policy loss that is multiplied by them is that of the policy's own answers, but
    for the cap, which bounds its variance. Source: arXiv:1802.01561 (V-trace's first truncation), per token.
    """
    return (old_logprobs_T - sampler_logprobs_T).exp().clamp(max=cap)


def clipped_value_losses(values_T: Tensor, old_values_T: Tensor, returns_T: Tensor, *, clip: float | None) -> Tensor:
    """`1/2 max((v - R)^2, (v_clipped - R)^2)` of each token, v_clipped within `clip` of the old value; None: `1/2 (v - R)^2`."""
    plain_T = (values_T - returns_T).square()
    if clip is None:
        return plain_T / 2
    near_T = old_values_T + (values_T - old_values_T).clamp(-clip, clip)
    return torch.maximum(plain_T, (near_T - returns_T).square()) / 2


def kl_estimates(logprobs_T: Tensor, reference_T: Tensor, *, estimator: KlEstimator = "k3") -> Tensor:
    """KL(policy || reference) from each sampled token, (T,), with l = policy - reference:

    k1 `l`: unbiased, noisy, can be negative; its gradient is 0 in expectation, so it belongs into the reward and not into the loss.
    k2 `l^2 / 2`: biased value, but its gradient is that of the KL in expectation: for the loss.
    k3 `e^-l - 1 + l`: unbiased, never negative, quiet; its gradient is that of KL(reference || policy) in expectation.
    Raises: ConfigError for another name.
    """
    log_ratios_T = logprobs_T - reference_T
    if estimator == "k1":
        return log_ratios_T
    if estimator == "k2":
        return log_ratios_T.square() / 2
    if estimator == "k3":
        return (-log_ratios_T).clamp(max=_MAX_LOG_RATIO).expm1() + log_ratios_T
    raise ConfigError(f"KL estimator is {estimator!r}, expected one of {', '.join(get_args(KlEstimator))}")


def token_weights(
    lengths: Sequence[int], averaging: Averaging, *, total_tokens: int, total_answers: int, max_tokens: int
) -> Tensor:
    """What each token's loss is multiplied by before the sum, float32 (T,). Totals are the step's, lengths this batch's.

    `token`: 1 / tokens (DAPO: long answers count by their length). `answer`: 1 / (answers * own length) (GRPO as published, PPO
    over sequences; needed for GSPO). `constant`: 1 / (answers * longest possible) (Dr. GRPO: no bias for any length).
    Raises: ConfigError for another name; ShapeError for the mean of an empty answer.
    """
    if averaging == "token":
        return torch.full((sum(lengths),), 1 / total_tokens)
    if averaging == "constant":
        return torch.full((sum(lengths),), 1 / (total_answers * max_tokens))
    if averaging == "answer":
        if min(lengths, default=1) < 1:
            raise ShapeError(f"an answer of {min(lengths)} tokens has no mean: drop empty answers")
        return spread_to_tokens(torch.tensor([1 / (total_answers * length) for length in lengths]), lengths)
    raise ConfigError(f"averaging is {averaging!r}, expected one of {', '.join(get_args(Averaging))}")


def split_answers(values_T: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """The packed values of each answer. Raises: ShapeError if lengths do not add up to T or one is below 1."""
    if sum(lengths) != len(values_T) or min(lengths, default=0) < 1:
        raise ShapeError(f"answers of {list(lengths)} tokens do not fit {len(values_T)} packed values")
    return list(values_T.split(list(lengths)))


def spread_to_tokens(values_N: Tensor, lengths: Sequence[int]) -> Tensor:
    """Repeat each answer's value at all of its tokens, (T,)."""
    return values_N.repeat_interleave(torch.tensor(list(lengths), device=values_N.device))


@torch.no_grad()
def policy_metrics(
    log_ratios_T: Tensor, weights_T: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> dict[str, Tensor]:
    """How far a step is from the data it was sampled with; shares that add up over micro-batches.

    `policy/clipped`: share of tokens whose ratio is out of bounds. `policy/staleness_kl`: k3 estimate of KL(old || new).
    """
    ratios_T = log_ratios_T.exp()
    outside_T = (ratios_T < 1 - clip_low) | (ratios_T > 1 + clip_high)
    return {
        "policy/clipped": (outside_T.to(weights_T) * weights_T).sum(),
        "policy/staleness_kl": ((ratios_T - 1 - log_ratios_T) * weights_T).sum(),
    }
