"""From rewards of answers to credit for tokens, and to pairs: what a rollout knows once all passes are done.

Shape letters: P tokens of sampled answers, A answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ernie45.training.losses.advantage import gae, group_advantages, normalize_by_subset, whiten
from ernie45.training.losses.policy import spread_to_tokens
from ernie45.training.losses.upo import best_and_worst
from ernie45.training.upo_batch import Group
from ernie45.training.upo_config import UpoConfig


def group_numbers(counts: Iterable[int]) -> Tensor:
    """The number of its group at each answer, int64. Args: counts: answers of each group."""
    sizes = torch.tensor(list(counts), dtype=torch.int64)
    return torch.arange(len(sizes)).repeat_interleave(sizes)


def with_advantages(groups: Sequence[Group], subsets: Sequence[str] | None, config: UpoConfig) -> list[Group]:
    """Give every token its advantage and, with a critic, its return.

    Args: subsets: of each group, to bring the rewards of each to one scale; None = rewards as they are.
    """
    lengths = [length for group in groups for length in group.lengths]
    groups_A = group_numbers(len(group.lengths) for group in groups)
    rewards_A = torch.cat([group.rewards_A for group in groups])
    if subsets is not None:
        number = {subset: at for at, subset in enumerate(dict.fromkeys(subsets))}
        rewards_A = normalize_by_subset(rewards_A, torch.tensor([number[subset] for subset in subsets])[groups_A])
    penalties_P = _penalties(groups, config)
    if config.advantages == "gae":
        return _by_critic(groups, rewards_A, penalties_P, lengths, config)
    penalties_A = torch.stack([part.sum() for part in penalties_P.split(lengths)])
    advantages_A = group_advantages(rewards_A - penalties_A, groups_A, by_std=config.group_by_std)
    parts = spread_to_tokens(advantages_A, lengths).split([sum(group.lengths) for group in groups])
    return [replace(group, advantages_L=part) for group, part in zip(groups, parts, strict=True)]


def with_pairs(groups: Sequence[Group], config: UpoConfig) -> list[Group]:
    """Name best and worst answer of as many groups as the ratio says, spread evenly over those that have a pair."""
    done = list(groups)
    counts = [len(group.lengths) for group in groups]
    groups_A = group_numbers(counts)
    rewards_A = torch.cat([group.rewards_A for group in groups])
    chosen, rejected = best_and_worst(rewards_A, groups_A, min_spread=config.pair_min_spread)
    for number, (best, worst) in enumerate(zip(chosen.tolist(), rejected.tolist(), strict=True)):
        if int((number + 1) * config.pair_ratio) > int(number * config.pair_ratio):
            at = int(groups_A[best])
            first = sum(counts[:at])
            done[at] = replace(done[at], pair=(best - first, worst - first))
    return done


def _by_critic(
    groups: Sequence[Group], rewards_A: Tensor, penalties_P: Tensor, lengths: Sequence[int], config: UpoConfig
) -> list[Group]:
    """The reward of an answer comes with its last token, its penalties with each."""
    rewards_P = -penalties_P
    rewards_P[torch.tensor(lengths).cumsum(0) - 1] += rewards_A
    values_P = torch.cat([group.values_L for group in groups if group.values_L is not None])
    advantages_P, returns_P = gae(rewards_P, values_P, lengths, gamma=config.gamma, lam=config.lam)
    if config.whiten:
        advantages_P = whiten(advantages_P)
    sizes = [sum(group.lengths) for group in groups]
    both = zip(groups, advantages_P.split(sizes), returns_P.split(sizes), strict=True)
    return [replace(group, advantages_L=advantages, returns_L=returns) for group, advantages, returns in both]


def _penalties(groups: Sequence[Group], config: UpoConfig) -> Tensor:
    """What each token pays for its distance from the reference, (P,)."""
    old_P = torch.cat([group.old_L for group in groups])
    if not config.kl_weight or config.kl_in != "reward":
        return torch.zeros_like(old_P)
    reference_P = torch.cat([group.reference_L for group in groups if group.reference_L is not None])
    return config.kl_weight * (old_P - reference_P)
