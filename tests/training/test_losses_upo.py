"""UPO is PPO at weight 0 and DPO where the policy is off, bit by bit and in every gradient; and which pairs it picks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ernie45.errors import ConfigError
from ernie45.training.losses.policy import clipped_policy_losses, token_log_ratios, token_weights
from ernie45.training.losses.preference import PairScores, PreferenceConfig, combine, preference_losses
from ernie45.training.losses.upo import best_and_worst, upo_loss


def _ppo(logprobs: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    old, advantages = -torch.rand(6, generator=generator), torch.randn(6, generator=generator)
    losses = clipped_policy_losses(token_log_ratios(logprobs, old), advantages)
    return (losses * token_weights([2, 4], "token", total_tokens=6, total_answers=2, max_tokens=4)).sum()


def _dpo(logprobs: Tensor) -> Tensor:
    config = PreferenceConfig()
    chosen, rejected = logprobs[:2].sum()[None], logprobs[2:].sum()[None]
    scores = PairScores(
        chosen=chosen, rejected=rejected, reference_chosen=torch.tensor([-1.0]), reference_rejected=torch.tensor([-2.0])
    )
    return combine(preference_losses(scores, config), chosen.sum(), config, num_pairs=1, num_chosen_tokens=2)[0]


def _value_and_gradient(loss: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


@given(st.lists(st.floats(-5, -0.0078125, width=32), min_size=6, max_size=6))
def test_the_limits_are_exact(numbers: list[float]) -> None:
    logprobs = torch.tensor(numbers, requires_grad=True)
    ppo, dpo = (_value_and_gradient(part(logprobs), logprobs) for part in (_ppo, _dpo))
    at_zero = _value_and_gradient(upo_loss(_ppo(logprobs), _dpo(logprobs), weight=0.0), logprobs)
    without_pairs = _value_and_gradient(upo_loss(_ppo(logprobs), None), logprobs)
    policy_off = _value_and_gradient(upo_loss(None, _dpo(logprobs)), logprobs)
    for found, expected in ((at_zero, ppo), (without_pairs, ppo), (policy_off, dpo)):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_the_sum_by_hand() -> None:
    logprobs = torch.linspace(-3, -1, 6).requires_grad_()
    (ppo, ppo_gradient), (dpo, dpo_gradient) = (_value_and_gradient(part(logprobs), logprobs) for part in (_ppo, _dpo))
    value, gradient = _value_and_gradient(upo_loss(_ppo(logprobs), _dpo(logprobs), weight=0.25), logprobs)
    torch.testing.assert_close(value, ppo + 0.25 * dpo)
    torch.testing.assert_close(gradient, ppo_gradient + 0.25 * dpo_gradient)
    assert upo_loss(None, torch.tensor(4.0), weight=0.25).item() == 1


def test_a_part_that_is_off_cannot_spoil_the_other() -> None:
    assert upo_loss(torch.tensor(1.0), torch.tensor(math.nan), weight=0.0).item() == 1
    with pytest.raises(ConfigError, match="both off"):
        upo_loss(None, torch.tensor(1.0), weight=0.0)
    with pytest.raises(ConfigError, match="both off"):
        upo_loss(None, None)


def test_pairs_by_hand() -> None:
    """Prompt 7: best at 4 (first of equals), worst at 0; prompt 2: spread 0.2; prompt 5: alike."""
    rewards = torch.tensor([0.0, 0.5, 0.7, 3.0, 1.0, 1.0, 3.0])
    groups = torch.tensor([7, 2, 2, 5, 7, 7, 5])
    chosen, rejected = best_and_worst(rewards, groups, min_spread=0.1)
    assert (chosen.tolist(), rejected.tolist()) == ([2, 4], [1, 0])
    chosen, rejected = best_and_worst(rewards, groups, min_spread=0.5)
    assert (chosen.tolist(), rejected.tolist()) == ([4], [0])
    chosen, rejected = best_and_worst(rewards, groups)
    assert (chosen.tolist(), rejected.tolist()) == ([2, 4], [1, 0])
    for empty in best_and_worst(torch.zeros(0), torch.zeros(0, dtype=torch.int64)):
        assert empty.shape == (0,)
        assert empty.dtype == torch.int64
