"""The whole policy loss of a micro-batch: clipped ratio, distance to the reference, entropy, and the critic's part.

With a critic and GAE it is PPO, with group advantages and no critic GRPO, with `ratio: sequence` GSPO.
Shape letters: T answer tokens (packed), N answers. Source: training reference 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ernie45.errors import ConfigError, ShapeError
from ernie45.training.losses import policy
from ernie45.training.losses.preference import check_from_zero

Ratio = Literal["token", "sequence"]
_CHOICES = {
    "ratio": get_args(Ratio),
    "averaging": get_args(policy.Averaging),
    "kl_estimator": get_args(policy.KlEstimator),
}


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """How a policy gradient is formed. Defaults are PPO's with a small pull to the reference."""

    ratio: Ratio = "token"
    """`sequence`: one ratio per answer (GSPO); clips are then some 1e-4 wide."""
    clip_low: float = 0.2
    """How far a ratio may fall below 1 with a gradient; below 1."""
    clip_high: float = 0.2
    """How far it may rise above 1. 0.28 is DAPO's."""
    averaging: policy.Averaging = "token"
    """See `policy.token_weights`."""
    kl_weight: float = 0.0
    """Weight of the KL estimate to the reference in the loss; 0 needs no reference."""
    kl_estimator: policy.KlEstimator = "k3"
    """k2 or k3: the gradient of k1 is noise."""
    entropy_weight: float = 0.0
    """Weight of the entropy, which is made larger."""
    value_weight: float = 0.5
    """Weight of the critic's loss, where there is a critic."""
    value_clip: float | None = 0.2
    """How far a value may move from its old one before the worse of both errors counts; None = not clipped."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        check_from_zero("clip_low", self.clip_low, below=1.0)
        for name in ("clip_high", "kl_weight", "entropy_weight", "value_weight"):
            check_from_zero(name, getattr(self, name))
        if self.value_clip is not None:
            check_from_zero("value_clip", self.value_clip)
        if self.kl_estimator == "k1":
            raise ConfigError("kl_estimator is k1, whose gradient is noise: take k2 or k3, or put k1 into the reward")
        if self.ratio == "sequence" and self.averaging != "answer":
            raise ConfigError(f"ratio sequence needs averaging answer, got {self.averaging}: one ratio, one weight per answer")


@dataclass(frozen=True, kw_only=True)
class PolicyBatch:
    """A micro-batch of sampled answers; all tensors (T,), float32, and only what comes from the network has a gradient."""

    lengths: Sequence[int]
    """Tokens of each answer."""
    logprobs_T: Tensor
    """Under the policy, with gradient."""
    old_logprobs_T: Tensor
    """Under the policy that sampled, as the trainer computes them."""
    advantages_T: Tensor
    reference_T: Tensor | None = None
    """Under the reference, for `kl_weight`."""
    entropy_T: Tensor | None = None
    """Of the policy at each token, with gradient, for `entropy_weight`."""
    values_T: Tensor | None = None
    """The critic's, with gradient. None: there is no critic."""
    old_values_T: Tensor | None = None
    """The critic's when the answers were sampled."""
    returns_T: Tensor | None = None
    """What the critic should have said."""


def policy_loss(batch: PolicyBatch, weights_T: Tensor, config: PolicyConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the step's loss.

    Args: weights_T: `policy.token_weights` of the batch with the step's totals.
    Returns: total with gradient, a scalar; parts without weight and gradient, for the log: `policy/loss`, and where they are
        there `policy/reference_kl`, `policy/entropy`, `policy/value_loss`, beside `policy.policy_metrics`.
    Raises: ShapeError if a tensor that a weight asks for is missing.
    """
    if config.ratio == "sequence":
        log_ratios_T = policy.sequence_log_ratios(batch.logprobs_T, batch.old_logprobs_T, batch.lengths)
    else:
        log_ratios_T = policy.token_log_ratios(batch.logprobs_T, batch.old_logprobs_T)
    clips = {"clip_low": config.clip_low, "clip_high": config.clip_high}
    parts = [(1.0, "policy/loss", policy.clipped_policy_losses(log_ratios_T, batch.advantages_T, **clips))]
    if config.kl_weight:
        reference_T = _given(batch.reference_T, "kl_weight", "reference_T")
        kl_T = policy.kl_estimates(batch.logprobs_T, reference_T, estimator=config.kl_estimator)
        parts.append((config.kl_weight, "policy/reference_kl", kl_T))
    if config.entropy_weight:
        entropy_T = _given(batch.entropy_T, "entropy_weight", "entropy_T")
        parts.append((-config.entropy_weight, "policy/entropy", entropy_T))
    if batch.values_T is not None:
        returns_T = _given(batch.returns_T, "values_T", "returns_T")
        old_T = _given(batch.old_values_T, "values_T", "old_values_T")
        value_T = policy.clipped_value_losses(batch.values_T, old_T, returns_T, clip=config.value_clip)
        parts.append((config.value_weight, "policy/value_loss", value_T))
    sums = [(weight, name, (losses_T * weights_T).sum()) for weight, name, losses_T in parts]
    total = torch.stack([weight * part for weight, _, part in sums]).sum()
    logged = {name: part.detach() for _, name, part in sums}
    return total, logged | policy.policy_metrics(log_ratios_T, weights_T, **clips)


def _given(tensor: Tensor | None, wanted_by: str, name: str) -> Tensor:
    if tensor is None:
        raise ShapeError(f"{wanted_by} needs {name}, which this batch does not have")
    return tensor
