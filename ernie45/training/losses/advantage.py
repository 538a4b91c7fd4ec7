"""From rewards to advantages: prompts worth training on, rewards on one scale, credit to answers and tokens.

Shape letters: T answer tokens (packed), N answers. Nothing here carries a gradient.
Source: GAE arXiv:1506.02438, GRPO 2402.03300, Dr. GRPO 2503.20783; training reference 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ernie45.errors import ConfigError, ShapeError
from ernie45.training.losses.policy import split_answers


@torch.no_grad()
def gae(
    rewards_T: Tensor, values_T: Tensor, lengths: Sequence[int], *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each token, both (T,).

    `delta_t = r_t + gamma v_(t+1) - v_t`, `A_t = delta_t + gamma lam A_(t+1)`, `R_t = A_t + v_t`; behind the last token of an
    answer both are 0. lam 0: one step ahead; lam 1: the discounted rewards to come minus the value.
    Raises: ConfigError if gamma or lam is outside 0 to 1; ShapeError if lengths do not fit.
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} is {value!r}, expected 0 to 1")
    rewards = pad_sequence(split_answers(rewards_T, lengths))  # (longest, N), zeros behind short answers
    values = pad_sequence(split_answers(values_T, lengths))
    ahead_value = ahead = torch.zeros_like(rewards[0])
    rows = []
    for reward, value in zip(rewards.flip(0), values.flip(0), strict=True):
        ahead = reward + gamma * ahead_value - value + gamma * lam * ahead
        ahead_value = value
        rows.append(ahead)
    padded = torch.stack(rows[::-1])
    # Behind the end rewards and values are 0, so what comes in from there is 0 as well.
    advantages_T = torch.cat([padded[:length, place] for place, length in enumerate(lengths)])
    return advantages_T, advantages_T + values_T


@torch.no_grad()
def whiten(values_T: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Mean 0 and standard deviation 1 over all tokens of a step; one token alone becomes 0."""
    centred = values_T - values_T.mean()
    return centred / (centred.square().mean().sqrt() + eps)


@torch.no_grad()
def group_advantages(rewards_N: Tensor, groups_N: Tensor, *, by_std: bool = True, eps: float = 1e-4) -> Tensor:
    """GRPO: reward minus the mean of the answers to the same prompt, over their standard deviation, (N,).

    Args: groups_N: int64, the prompt of each answer, 0 on. by_std: False is Dr. GRPO, which does not blow up prompts whose
        answers are nearly alike. The deviation is the sample's (n - 1); a single answer gets 0.
    """
    return _centred(rewards_N, groups_N, by_std=by_std, eps=eps)


@torch.no_grad()
def normalize_by_subset(rewards_N: Tensor, subsets_N: Tensor, *, eps: float = 1e-4) -> Tensor:
    """Rewards of each data subset at mean 0 and standard deviation 1, (N,): graders of different scales weigh the same.

    Args: subsets_N: int64, 0 on. A subset with one answer, or with equal rewards, becomes 0.
    """
    return _centred(rewards_N, subsets_N, by_std=True, eps=eps)


def _centred(values_N: Tensor, groups_N: Tensor, *, by_std: bool, eps: float) -> Tensor:
    if values_N.shape != groups_N.shape or groups_N.dtype != torch.int64:
        raise ShapeError(
            f"{tuple(values_N.shape)} rewards and {tuple(groups_N.shape)} groups of {groups_N.dtype}, expected as many int64"
        )
    if not len(values_N):
        return values_N.clone()
    counts = groups_N.bincount().to(values_N)
    zeros = torch.zeros_like(counts)
    means = zeros.index_add(0, groups_N, values_N) / counts.clamp(min=1)
    centred = values_N - means[groups_N]
    if not by_std:
        return centred
    squares = zeros.index_add(0, groups_N, centred.square())
    return centred / ((squares / (counts - 1).clamp(min=1)).sqrt()[groups_N] + eps)


@dataclass(frozen=True, kw_only=True)
class PromptFilter:
    """Which prompts teach nothing: those that are always or never solved, and those whose answers are all alike."""

    min_spread: float = 1e-6
    """Standard deviation of a prompt's rewards (of its answers, n in the divisor) below which it is dropped."""
    solved: float | None = None
    """Reward from which an answer counts as right; a prompt with right answers only is dropped. None: not asked."""
    failed: float | None = None
    """Reward up to which an answer counts as wrong; a prompt with wrong answers only is dropped. None: not asked."""

    def __post_init__(self) -> None:
        if not self.min_spread >= 0:
            raise ConfigError(f"min_spread is {self.min_spread!r}, expected a number from 0 on")
        if self.solved is not None and self.failed is not None and not self.failed < self.solved:
            raise ConfigError(f"failed is {self.failed} and solved {self.solved}: expected failed < solved")

    def verdicts(self, rewards_N: Tensor, groups_N: Tensor) -> list[str]:
        """Of each prompt 0, 1, ..: `kept`, `always_solved`, `never_solved` or `alike`; a prompt without answers is `alike`."""
        count = int(groups_N.max()) + 1 if len(groups_N) else 0
        return [self._verdict(rewards_N[groups_N == group]) for group in range(count)]

    def _verdict(self, rewards: Tensor) -> str:
        if not len(rewards):
            return "alike"
        if self.solved is not None and bool((rewards >= self.solved).all()):
            return "always_solved"
        if self.failed is not None and bool((rewards <= self.failed).all()):
            return "never_solved"
        return "alike" if float(rewards.double().std(correction=0)) < self.min_spread else "kept"
