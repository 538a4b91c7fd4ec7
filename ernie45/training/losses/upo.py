"""UPO: a policy loss and a preference loss as one, and the pairs that it picks among an online policy's answers.

`L = L_policy + lambda * L_pref`: the preference part keeps the policy from chasing what the reward system misjudges.
Source: training reference 3.1. Shape letters: N answers, B pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ernie45.errors import ConfigError


def upo_loss(policy: Tensor | None, preference: Tensor | None, *, weight: float = 1.0) -> Tensor:
    """`policy + weight * preference`, a scalar.

    Exactly the policy loss (PPO) at weight 0 or without pairs, bit by bit and also in its gradient, and exactly the preference
    loss (DPO) times `weight` where the policy is None: a part that is off is not multiplied by 0, it is not there.
    Raises: ConfigError if both are off.
    """
    if preference is None or not weight:
        if policy is None:
            raise ConfigError("policy and preference part are both off: nothing would be learnt")
        return policy
    weighted = preference if weight == 1 else weight * preference
    return weighted if policy is None else policy + weighted


@torch.no_grad()
def best_and_worst(rewards_N: Tensor, groups_N: Tensor, *, min_spread: float = 0.0) -> tuple[Tensor, Tensor]:
    """Chosen and rejected answer of every prompt whose rewards lie further apart than `min_spread`: int64 (B,) each.

    Of equal rewards the first answer is taken. A prompt whose answers are all alike gives no pair, whatever the spread.
    Args: groups_N: int64, the prompt of each answer.
    """
    chosen, rejected = [], []
    for group in groups_N.unique().tolist():
        places = (groups_N == group).nonzero().flatten()
        # max and min with a dimension promise no order among equals
        rewards = rewards_N[places].tolist()
        best, worst = max(rewards), min(rewards)
        if best - worst > min_spread:
            chosen.append(int(places[rewards.index(best)]))
            rejected.append(int(places[rewards.index(worst)]))
    return torch.tensor(chosen, dtype=torch.int64), torch.tensor(rejected, dtype=torch.int64)
