"""Preference training: which loss, from which scores, in which sum with the likelihood of the chosen answers.

Shape letters: B pairs. Source: training reference 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ernie45.errors import ConfigError, ShapeError
from ernie45.training.losses import pairs

PairLoss = Literal[
    "sigmoid", "hinge", "ipo", "simpo", "dpop", "dpop_erniekit", "or", "kto_pair", "sppo_hard", "nca_pair"
]
_MEANS = ("ipo", "simpo", "or")
_WITHOUT_REFERENCE = ("simpo", "or")
_SUMS = tuple(name for name in get_args(PairLoss) if name not in _MEANS)
_READ_BY: dict[str, tuple[str, ...]] = {
    "label_smoothing": ("sigmoid", "simpo"),
    "offset_alpha": ("sigmoid",),
    "simpo_gamma": ("simpo",),
    "dpop_lambda": ("dpop", "dpop_erniekit"),
    "normalize_logps": _SUMS,
    "beta": tuple(name for name in get_args(PairLoss) if name != "or"),
}
"""Which losses read a field. Set for another one it would do nothing, so that is refused."""


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """A method of the DPO family. Defaults are DPO as published."""

    loss_type: PairLoss = "sigmoid"
    """`dpop`: penalty inside the sigmoid, as in its paper; `dpop_erniekit`: outside, as in ERNIEKit 1.x. `or`: ORPO."""
    beta: float = 0.1
    """How much a step away from the reference weighs; above 0."""
    label_smoothing: float = 0.0
    """Share of pairs that are believed to be the wrong way round, 0 to below 0.5. sigmoid and simpo."""
    offset_alpha: float = 0.0
    """How much of the pairs' score gap the margin has to show; 0 = scores are not read. sigmoid."""
    simpo_gamma: float = 0.5
    """Margin that simpo asks for, times beta."""
    dpop_lambda: float = 50.0
    """Weight of dpop's penalty."""
    pref_loss_ratio: float = 1.0
    """Weight of the preference loss."""
    sft_loss_ratio: float = 0.0
    """Weight of the negative log-likelihood per token of the chosen answers. `or` needs it: 1 is usual."""
    normalize_logps: bool = False
    """Scale sums as if both answers of a pair had their mean length; for losses of sums."""
    reference_free: bool = False
    """Take the reference as 0; simpo and or always do."""

    def __post_init__(self) -> None:
        if self.loss_type not in get_args(PairLoss):
            raise ConfigError(f"loss_type is {self.loss_type!r}, expected one of {', '.join(get_args(PairLoss))}")
        check_positive("beta", self.beta)
        for name in ("offset_alpha", "simpo_gamma", "dpop_lambda", "pref_loss_ratio", "sft_loss_ratio"):
            check_from_zero(name, getattr(self, name))
        check_from_zero("label_smoothing", self.label_smoothing, below=0.5)
        if not self.pref_loss_ratio and not self.sft_loss_ratio:
            raise ConfigError("pref_loss_ratio and sft_loss_ratio are both 0: nothing would be learnt")
        if self.loss_type == "or" and not self.sft_loss_ratio:
            raise ConfigError("loss_type or has no other term that makes chosen answers likely: set sft_loss_ratio (1)")
        self._refuse_unread()

    def _refuse_unread(self) -> None:
        for field in fields(self):
            readers = _READ_BY.get(field.name, get_args(PairLoss))
            value = getattr(self, field.name)
            if value != field.default and self.loss_type not in readers:
                raise ConfigError(
                    f"{field.name} is {value!r}, but loss_type {self.loss_type} does not read it: leave it out, or take "
                    f"one of {', '.join(readers)}"
                )

    @property
    def uses_reference(self) -> bool:
        """Whether log-probabilities under the reference have to be computed."""
        return not self.reference_free and self.loss_type not in _WITHOUT_REFERENCE


def check_positive(name: str, value: object) -> None:
    """Raises: ConfigError unless the value is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value!r}, expected a number above 0")


def check_from_zero(name: str, value: object, *, below: float = math.inf) -> None:
    """Raises: ConfigError unless the value is a number from 0 to below a bound."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < below:
        bound = "" if below == math.inf else f" to below {below}"
        raise ConfigError(f"{name} is {value!r}, expected a number from 0 on{bound}")


def answer_scores(
    sums_c: Tensor, sums_r: Tensor, lengths_c: Tensor, lengths_r: Tensor, config: PreferenceConfig
) -> tuple[Tensor, Tensor]:
    """The log-probabilities that a loss compares, from sums over tokens: sums, sums of equal length, or means.

    Args: sums_c, sums_r: (B,). lengths_c, lengths_r: scored tokens, (B,). Policy and reference are treated alike.
    Raises: ShapeError if an answer has no scored token.
    """
    if not bool((lengths_c > 0).all() and (lengths_r > 0).all()):
        raise ShapeError("an answer has no scored token: drop empty answers, or score the token that closes them")
    if config.loss_type in _MEANS:
        return sums_c / lengths_c, sums_r / lengths_r
    if config.normalize_logps:
        mean_length = (lengths_c + lengths_r) / 2
        return sums_c * (mean_length / lengths_c), sums_r * (mean_length / lengths_r)
    return sums_c, sums_r


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """Log-probabilities of B pairs as `answer_scores` gives them, all (B,); the reference's without gradient."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor | None = None
    """None: taken as 0."""
    reference_rejected: Tensor | None = None
    score_gap: Tensor | None = None
    """Score of the chosen minus that of the rejected answer, at least 0; for `offset_alpha`."""

    def ratios(self, config: PreferenceConfig) -> tuple[Tensor, Tensor]:
        """a and b. Raises: ShapeError if the method needs a reference that is not there."""
        if not config.uses_reference:
            return self.chosen, self.rejected
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ShapeError(f"loss_type {config.loss_type} needs the reference's log-probabilities, or reference_free")
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected


def preference_losses(scores: PairScores, config: PreferenceConfig) -> Tensor:
    """The loss of each pair, (B,). Raises: ConfigError if the offset is to be read from pairs without scores."""
    a, b = scores.ratios(config)
    return _LOSSES[config.loss_type](a, b, scores, config)


def _sigmoid(a: Tensor, b: Tensor, scores: PairScores, config: PreferenceConfig) -> Tensor:
    margin = a - b
    if config.offset_alpha:
        if scores.score_gap is None:
            raise ConfigError(
                f"offset_alpha is {config.offset_alpha}, but the pairs have no scores: give them, or set it to 0"
            )
        margin = margin - pairs.score_offset(scores.score_gap, beta=config.beta, alpha=config.offset_alpha)
    return pairs.sigmoid_loss(margin, beta=config.beta, label_smoothing=config.label_smoothing)


_LOSSES: dict[str, Callable[[Tensor, Tensor, PairScores, Any], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": lambda a, b, _, c: pairs.hinge_loss(a - b, beta=c.beta),
    "ipo": lambda a, b, _, c: pairs.ipo_loss(a - b, beta=c.beta),
    "simpo": lambda a, b, _, c: pairs.simpo_loss(
        a - b, beta=c.beta, gamma=c.simpo_gamma, label_smoothing=c.label_smoothing
    ),
    "dpop": lambda a, b, _, c: pairs.dpop_loss(a, b, beta=c.beta, penalty=c.dpop_lambda),
    "dpop_erniekit": lambda a, b, _, c: pairs.dpop_erniekit_loss(a, b, beta=c.beta, penalty=c.dpop_lambda),
    "or": lambda a, b, *_: pairs.odds_ratio_loss(a, b),
    "kto_pair": lambda a, b, _, c: pairs.kto_pair_loss(a, b, beta=c.beta),
    "sppo_hard": lambda a, b, _, c: pairs.sppo_hard_loss(a, b, beta=c.beta),
    "nca_pair": lambda a, b, _, c: pairs.nca_pair_loss(a, b, beta=c.beta),
}


def combine(
    losses_B: Tensor,
    chosen_sum: Tensor,
    config: PreferenceConfig,
    *,
    num_pairs: int,
    num_chosen_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """This micro-batch's share of a step's loss: `pref * sum(losses) / pairs - sft * sum(log-probs of chosen) / tokens`.

    Args: chosen_sum: sum of the log-probabilities of all scored tokens of chosen answers under the policy, plain.
        num_pairs, num_chosen_tokens: of the step, so that shares add up.
    Returns: total, with gradient; preference part and likelihood part without their weights, for the log.
    """
    preference = losses_B.sum() / num_pairs
    likelihood = -chosen_sum / num_chosen_tokens
    # A part of weight 0 stays out: 0 times an infinite log-probability would be no number.
    parts = [(config.pref_loss_ratio, preference), (config.sft_loss_ratio, likelihood)]
    total = torch.stack([weight * part for weight, part in parts if weight]).sum()
    return total, preference.detach(), likelihood.detach()


@torch.no_grad()
def preference_metrics(scores: PairScores, config: PreferenceConfig, *, num_pairs: int) -> dict[str, Tensor]:
    """Shares of a step's means over pairs, by the names under which they are logged; scalars that add up over micro-batches.

    Rewards are `beta a` and `beta b`; accuracy is the share of pairs whose chosen answer has the larger one.
    """
    a, b = scores.ratios(config)
    chosen, rejected = config.beta * a, config.beta * b
    means = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margin": chosen - rejected,
        "rewards/accuracy": (chosen > rejected).to(chosen),
        "logps/chosen": scores.chosen,
        "logps/rejected": scores.rejected,
    }
    return {name: values.sum() / num_pairs for name, values in means.items()}
