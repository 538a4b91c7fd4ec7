"""The whole policy loss: by hand, part by part, and that every option acts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from ernie45.errors import ConfigError, ShapeError
from ernie45.training.losses import policy
from ernie45.training.losses.ppo import PolicyBatch, PolicyConfig, policy_loss

LENGTHS = [3, 1, 2]


def _batch(**changes: Any) -> PolicyBatch:
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        return torch.randn(6, generator=generator)

    logprobs = -draw().abs()
    fields: dict[str, Any] = {
        "lengths": LENGTHS,
        "logprobs_T": logprobs.clone().requires_grad_(),
        "old_logprobs_T": logprobs + 0.3 * draw(),
        "advantages_T": draw(),
        "reference_T": logprobs + 0.5 * draw(),
        "entropy_T": draw().abs().requires_grad_(),
        "values_T": draw().requires_grad_(),
        "old_values_T": draw(),
        "returns_T": draw(),
    }
    return PolicyBatch(**(fields | changes))


def _weights(averaging: policy.Averaging = "token") -> torch.Tensor:
    return policy.token_weights(LENGTHS, averaging, total_tokens=6, total_answers=3, max_tokens=4)


def test_plain_ppo_by_hand() -> None:
    """Ratios 1.5 and 0.9 with advantages 1 and -2, values 1 and 0 for returns 2 and 0: -(1.2 - 1.8)/2 + 0.5 (0.5 + 0)/2."""
    batch = PolicyBatch(
        lengths=[2],
        logprobs_T=torch.tensor([1.5, 0.9]).log(),
        old_logprobs_T=torch.zeros(2),
        advantages_T=torch.tensor([1.0, -2.0]),
        values_T=torch.tensor([1.0, 0.0]),
        old_values_T=torch.tensor([1.0, 0.0]),
        returns_T=torch.tensor([2.0, 0.0]),
    )
    total, logged = policy_loss(batch, torch.tensor([0.5, 0.5]), PolicyConfig())
    assert total.item() == pytest.approx(0.3 + 0.125)
    assert logged["policy/loss"].item() == pytest.approx(0.3)
    assert logged["policy/value_loss"].item() == pytest.approx(0.25)
    assert logged["policy/clipped"].item() == 0.5
    assert set(logged) == {"policy/loss", "policy/value_loss", "policy/clipped", "policy/staleness_kl"}


def test_the_total_is_the_weighted_sum_of_its_parts() -> None:
    batch, weights = _batch(), _weights()
    config = PolicyConfig(kl_weight=0.3, entropy_weight=0.2, value_weight=0.7)
    total, logged = policy_loss(batch, weights, config)
    expected = (
        logged["policy/loss"]
        + 0.3 * logged["policy/reference_kl"]
        - 0.2 * logged["policy/entropy"]
        + 0.7 * logged["policy/value_loss"]
    )
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(logged["policy/entropy"], batch.entropy_T.mean())  # type: ignore[union-attr]
    total.backward()
    for tensor in (batch.logprobs_T, batch.entropy_T, batch.values_T):
        assert tensor is not None
        assert tensor.grad is not None
    assert (batch.entropy_T.grad < 0).all(), "more entropy has to be cheaper"  # type: ignore[union-attr, operator]
    assert not any(value.requires_grad for value in logged.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_low": 0.01},
        {"clip_high": 0.01},
        {"kl_weight": 0.1},
        {"kl_weight": 0.1, "kl_estimator": "k2"},
        {"entropy_weight": 0.1},
        {"value_weight": 0.1},
        {"value_clip": None},
        {"value_clip": 0.01},
    ],
)
def test_every_option_acts(changes: dict) -> None:
    batch, weights = _batch(), _weights()
    base = {"kl_weight": 0.1} if "kl_estimator" in changes else {}
    plain, _ = policy_loss(batch, weights, PolicyConfig(**base))  # type: ignore[arg-type]
    changed, _ = policy_loss(batch, weights, PolicyConfig(**changes))
    assert plain.item() != changed.item()


def test_the_ratio_of_sequences_acts() -> None:
    batch, weights = _batch(), _weights("answer")
    config = PolicyConfig(averaging="answer")
    by_token, _ = policy_loss(batch, weights, config)
    by_sequence, _ = policy_loss(batch, weights, replace(config, ratio="sequence"))
    assert by_token.item() != by_sequence.item()
    lone = replace(batch, lengths=[1] * 6)
    assert policy_loss(lone, weights, config)[0] == policy_loss(lone, weights, replace(config, ratio="sequence"))[0]


def test_without_a_critic_there_is_no_value_loss() -> None:
    _, logged = policy_loss(_batch(values_T=None), _weights(), PolicyConfig())
    assert "policy/value_loss" not in logged


@pytest.mark.parametrize(
    ("missing", "config"),
    [
        ("reference_T", PolicyConfig(kl_weight=0.1)),
        ("entropy_T", PolicyConfig(entropy_weight=0.1)),
        ("returns_T", PolicyConfig()),
        ("old_values_T", PolicyConfig()),
    ],
)
def test_what_a_weight_asks_for_has_to_be_there(missing: str, config: PolicyConfig) -> None:
    with pytest.raises(ShapeError, match=f"needs {missing}, which this batch does not have"):
        policy_loss(_batch(**{missing: None}), _weights(), config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": "word"}, "ratio is 'word', expected one of token, sequence"),
        ({"averaging": "mean"}, "averaging is 'mean'"),
        ({"kl_estimator": "k1"}, "gradient is noise"),
        ({"clip_low": 1.0}, "clip_low is 1.0, expected a number from 0 on to below 1"),
        ({"clip_high": -0.1}, "clip_high is -0.1"),
        ({"value_clip": math.nan}, "value_clip is nan"),
        ({"ratio": "sequence"}, "ratio sequence needs averaging answer, got token"),
    ],
)
def test_a_wrong_configuration_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(**fields)
