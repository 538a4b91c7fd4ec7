"""Losses of chosen against rejected answers, one function each: (B,) in, (B,) out, nothing averaged.

Names: B pairs; pi log-probability of an answer under the policy, ref under the reference; `chosen_ratio` is
a = pi_c - ref_c, `rejected_ratio` b = pi_r - ref_r, `margin` d = a - b. Whether a log-probability is the sum over the
tokens of an answer or their mean is said in each docstring and done by `preference.answer_scores`.
Source: training reference 3.4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def sigmoid_loss(margin: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: `-(1-e) log s(beta d) - e log s(-beta d)`; sums. ln 2 where d = 0. (arXiv:2305.18290)

    e: the share of pairs that are believed to be the wrong way round (conservative DPO).
    """
    x = beta * margin
    return -(1 - label_smoothing) * logsigmoid(x) - label_smoothing * logsigmoid(-x)


def score_offset(score_gap: Tensor, *, beta: float, alpha: float) -> Tensor:
    """How far a margin has to be for pairs of unequal worth: `alpha / beta * log(gap + 1e-6)`, to be subtracted from d.

    Args: score_gap: score of the chosen answer minus that of the rejected one, 0 or more; 1 asks for nothing.
    """
    return alpha / beta * (score_gap + 1e-6).log()


def hinge_loss(margin: Tensor, *, beta: float) -> Tensor:
    """`max(0, 1 - beta d)`; sums. (arXiv:2305.10425)"""
    return (1 - beta * margin).relu()


def ipo_loss(margin: Tensor, *, beta: float) -> Tensor:
    """`(d - 1/(2 beta))^2`; means. (arXiv:2310.12036)"""
    return (margin - 1 / (2 * beta)).square()


def simpo_loss(margin: Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """The sigmoid loss of `d - gamma/beta`, without a reference; means. (arXiv:2405.14734)"""
    return sigmoid_loss(margin - gamma / beta, beta=beta, label_smoothing=label_smoothing)


def dpop_loss(chosen_ratio: Tensor, rejected_ratio: Tensor, *, beta: float, penalty: float) -> Tensor:
    """`-log s(beta (d - lambda max(0, -a)))`: a chosen answer that gets less likely costs; sums. (arXiv:2402.13228)"""
    lost = (-chosen_ratio).relu()
    return -logsigmoid(beta * (chosen_ratio - rejected_ratio - penalty * lost))


def dpop_erniekit_loss(chosen_ratio: Tensor, rejected_ratio: Tensor, *, beta: float, penalty: float) -> Tensor:
    """`-log s(beta d) + lambda max(0, -a)`: the penalty outside, as ERNIEKit 1.x has it; sums.

    Its pull on the chosen answer does not fade: at lambda 50 it is 1000 times that of the first term at beta 0.1.
    """
    return -logsigmoid(beta * (chosen_ratio - rejected_ratio)) + penalty * (-chosen_ratio).relu()


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """ORPO: `-log s(log odds_c - log odds_r)` with `log odds = x - log(1 - e^x)`, without a reference; means, at most 0.
    (arXiv:2403.07691)"""
    return -logsigmoid((chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected)))


def kto_pair_loss(chosen_ratio: Tensor, rejected_ratio: Tensor, *, beta: float) -> Tensor:
    """KTO on pairs: the mean of `1 - s(beta (a - KL_r))` and `1 - s(beta (KL_c - b))`; sums. 1/2 where policy and reference agree.

    KL_c and KL_r are the means of a and b over the given pairs, at least 0; the gradient passes through them, as published.
    They couple the pairs: a pair alone is measured against itself. (the pair form of the first KTO report)
    """
    kl_chosen, kl_rejected = chosen_ratio.mean().clamp(min=0), rejected_ratio.mean().clamp(min=0)
    chosen = 1 - (beta * (chosen_ratio - kl_rejected)).sigmoid()
    rejected = 1 - (beta * (kl_chosen - rejected_ratio)).sigmoid()
    return (chosen + rejected) / 2


def sppo_hard_loss(chosen_ratio: Tensor, rejected_ratio: Tensor, *, beta: float) -> Tensor:
    """`(a - 1/(2 beta))^2 + (b + 1/(2 beta))^2`: each ratio has its own goal; sums. (arXiv:2405.00675)"""
    goal = 1 / (2 * beta)
    return (chosen_ratio - goal).square() + (rejected_ratio + goal).square()


def nca_pair_loss(chosen_ratio: Tensor, rejected_ratio: Tensor, *, beta: float) -> Tensor:
    """`-log s(beta a) - 1/2 log s(-beta a) - 1/2 log s(-beta b)`; sums. (arXiv:2402.05369)"""
    chosen, rejected = beta * chosen_ratio, beta * rejected_ratio
    return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2


def log1mexp(x: Tensor) -> Tensor:
    """`log(1 - e^x)` for x <= 0, exact near 0 and far from it, finite with a finite gradient at 0 (a certain answer).

    Above -eps of the dtype x counts as -eps, where the value is about -16 in float32 and no gradient passes.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    # Bounded like that, both branches and their gradients are finite everywhere: neither spoils the other.
    return torch.where(x > -math.log(2), x.expm1().neg().log(), x.exp().neg().log1p())
