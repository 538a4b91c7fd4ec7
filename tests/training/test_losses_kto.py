"""KTO by hand, and its distance estimate on one process and on many."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ernie45.errors import ConfigError
from ernie45.training.losses.kto import KtoConfig, kl_estimate, kto_losses, kto_metrics


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


POLICY = torch.tensor([-3.0, -9.0, -4.0], dtype=torch.float64)
REFERENCE = torch.tensor([-5.0, -6.0, -4.0], dtype=torch.float64)
GOOD = torch.tensor([True, False, False])


def test_losses_by_hand() -> None:
    """Ratios 2, -3, 0 against a distance of 1."""
    config = KtoConfig(beta=0.5, desirable_weight=1.5, undesirable_weight=0.7)
    found = kto_losses(POLICY, REFERENCE, GOOD, torch.tensor(1.0), config)
    expected = [1.5 * (1 - _sigmoid(0.5)), 0.7 * (1 - _sigmoid(2.0)), 0.7 * (1 - _sigmoid(0.5))]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_gradients_by_finite_differences() -> None:
    policy = POLICY.clone().requires_grad_()
    kl = torch.tensor(0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: kto_losses(p, REFERENCE, GOOD, kl, KtoConfig()), (policy,))


def test_the_distance_is_a_mean_without_gradient() -> None:
    policy = torch.tensor([-3.0, -5.0], requires_grad=True)
    kl = kl_estimate(policy, torch.tensor([-6.0, -6.0]))
    assert kl.item() == 2
    assert not kl.requires_grad


def test_the_distance_is_at_least_zero_on_one_process_and_on_many() -> None:
    policy, reference = torch.tensor([-8.0]), torch.tensor([-5.0])
    assert kl_estimate(policy, reference).item() == 0
    assert kl_estimate(policy, reference, reduce=lambda total: 2 * total).item() == 0


def test_processes_share_one_mean() -> None:
    """-3 here and (5, 4) there is 2 on average; the floor comes last, or it would be 3 or 4.5."""
    here = (torch.tensor([-8.0]), torch.tensor([-5.0]))
    there = (torch.tensor([-1.0, -2.0]), torch.tensor([-6.0, -6.0]))
    totals: list[Tensor] = []

    def remember(total: Tensor) -> Tensor:
        totals.append(total)
        return total

    kl_estimate(*there, reduce=remember)
    assert kl_estimate(*here, reduce=lambda total: total + totals[0]).item() == 2
    nothing = torch.zeros(0)
    assert kl_estimate(nothing, nothing, reduce=lambda total: total + totals[0]).item() == 4.5
    assert kl_estimate(nothing, nothing).item() == 0


def test_metrics_by_hand_and_as_shares() -> None:
    config = KtoConfig(beta=0.5)
    found = kto_metrics(POLICY, REFERENCE, GOOD, config, num_good=1, num_bad=2)
    assert {name: value.item() for name, value in found.items()} == {
        "rewards/chosen": 1,
        "rewards/rejected": -0.75,
        "rewards/margin": 1.75,
    }
    shares = [
        kto_metrics(POLICY[here], REFERENCE[here], GOOD[here], config, num_good=1, num_bad=2)
        for here in (slice(0, 2), slice(2, 3))
    ]
    for name, value in found.items():
        assert shares[0][name] + shares[1][name] == value
    assert list(kto_metrics(POLICY[:1], REFERENCE[:1], GOOD[:1], config, num_good=1, num_bad=0)) == ["rewards/chosen"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0}, "beta is 0, expected a number above 0"),
        ({"desirable_weight": -1.0}, "desirable_weight is -1.0"),
        ({"undesirable_weight": math.nan}, "undesirable_weight is nan"),
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, "both 0"),
    ],
)
def test_a_wrong_configuration_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KtoConfig(**fields)
