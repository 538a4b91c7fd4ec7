"""KTO: answers that are good or bad each by itself, without pairs. (arXiv:2402.01306; training reference 3.4)

Shape letters: N answers, M mismatched answers (a prompt with the answer to another one).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ernie45.errors import ConfigError
from ernie45.training.losses.preference import check_from_zero, check_positive


@dataclass(frozen=True, kw_only=True)
class KtoConfig:
    """How good and bad answers count."""

    beta: float = 0.1
    """How much a step away from the reference weighs; above 0."""
    desirable_weight: float = 1.0
    """Weight of good answers. Weight times number should be alike for both kinds, within a factor of 4/3."""
    undesirable_weight: float = 1.0
    """Weight of bad answers."""

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_from_zero("desirable_weight", self.desirable_weight)
        check_from_zero("undesirable_weight", self.undesirable_weight)
        if not self.desirable_weight and not self.undesirable_weight:
            raise ConfigError("desirable_weight and undesirable_weight are both 0: nothing would be learnt")


def kl_estimate(policy_M: Tensor, reference_M: Tensor, *, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """How far the policy has gone from the reference: the mean of their difference on mismatched answers, at least 0.

    A scalar without gradient. The bound holds on one process as on many: a negative distance would reward bad answers.
    Args: policy_M, reference_M: summed log-probabilities. reduce: sums a tensor over processes; called once, with no answer
        here as well.
    """
    ratios = (policy_M - reference_M).detach()
    total = torch.stack((ratios.sum(), ratios.new_tensor(float(len(ratios)))))
    if reduce is not None:
        total = reduce(total)
    return (total[0] / total[1].clamp(min=1)).clamp(min=0)


def kto_losses(policy_N: Tensor, reference_N: Tensor, good_N: Tensor, kl: Tensor, config: KtoConfig) -> Tensor:
    """`w_d (1 - s(beta (r - KL)))` for good answers, `w_u (1 - s(beta (KL - r)))` for bad ones, r = policy - reference; (N,).

    Args: policy_N, reference_N: summed log-probabilities. good_N: bool. kl: from `kl_estimate`.
    """
    distance = config.beta * (policy_N - reference_N - kl)
    good, bad = distance.new_tensor(config.desirable_weight), distance.new_tensor(config.undesirable_weight)
    return torch.where(good_N, good, bad) * (1 - torch.where(good_N, distance, -distance).sigmoid())


@torch.no_grad()
def kto_metrics(
    policy_N: Tensor, reference_N: Tensor, good_N: Tensor, config: KtoConfig, *, num_good: int, num_bad: int
) -> dict[str, Tensor]:
    """Shares of a step's mean rewards `beta r` of good and bad answers, which add up over micro-batches.

    Args: num_good, num_bad: of the step; a kind that it does not have is left out.
    """
    rewards = config.beta * (policy_N - reference_N)
    kinds = (("rewards/chosen", good_N, num_good), ("rewards/rejected", ~good_N, num_bad))
    shares = {name: rewards[mask].sum() / count for name, mask, count in kinds if count}
    if len(shares) == 2:
        shares["rewards/margin"] = shares["rewards/chosen"] - shares["rewards/rejected"]
    return shares
