"""Options of UPO: what is out of range, contradicts itself, or would do nothing is refused."""

from __future__ import annotations

from typing import Any

import pytest

from ernie45.errors import ConfigError
from ernie45.training.losses.advantage import PromptFilter
from ernie45.training.losses.preference import PreferenceConfig
from ernie45.training.upo_config import RolloutConfig, UpoConfig

PPO = {"advantages": "gae"}
PAIRS = {"preference_weight": 1.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"advantages": "best"}, "advantages is 'best'"),
        ({"averaging": "mean"}, "averaging is 'mean'"),
        ({"clip_low": 1.5}, "clip_low is 1.5, expected a number from 0 to 1"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"clip_high": float("nan")}, "clip_high"),
        (PPO | {"gamma": 1.1}, "gamma is 1.1"),
        (PPO | {"lam": True}, "lam is True"),
        (PPO | {"value_clip": -1}, "value_clip"),
        (PAIRS | {"pair_ratio": 1.5}, "pair_ratio is 1.5"),
        (PAIRS | {"pair_ratio": 0}, "set preference_weight to 0"),
        ({"policy": False}, "nothing would be learnt"),
        ({"gamma": 0.9}, "gamma is 0.9, but is only read with advantages: gae"),
        ({"whiten": False}, "only read with advantages: gae"),
        ({"value_clip": None}, "only read with advantages: gae"),
        (PPO | {"group_by_std": False}, "only read with advantages: group"),
        ({"kl_in": "loss"}, "only read with a kl_weight"),
        ({"sampler_ratio_cap": 0.5}, "sampler_ratio_cap is 0.5, expected a number from 1 on"),
        ({"sampler_ratio_cap": 2.0, "policy": False, "preference_weight": 1.0}, "only read where policy is on"),
        ({"kl_weight": 0.1, "kl_estimator": "k2"}, "only read with a kl_weight and kl_in: loss"),
        ({"kl_weight": 0.1, "kl_in": "loss", "kl_estimator": "k1"}, "whose gradient is noise"),
        ({"pair_ratio": 0.5}, "only read with a preference_weight"),
        ({"preference": PreferenceConfig(beta=0.2)}, "only read with a preference_weight"),
        (PAIRS | {"pair_source": "offline", "pair_min_spread": 0.1}, "only read with online pairs"),
        (PAIRS | {"policy": False, "clip_low": 0.1}, "only read where policy is on"),
    ],
)
def test_policy_options_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UpoConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_answers": 0}, "num_answers"),
        ({"num_answers": 129}, "num_answers"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": 0}, "temperature"),
        ({"num_epochs": True}, "num_epochs"),
        ({"old_logprobs": "model"}, "old_logprobs"),
        ({"max_draws": 2}, "only read with a prompt_filter"),
    ],
)
def test_rollout_options_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RolloutConfig(**fields)


def test_what_follows_from_the_options() -> None:
    assert not UpoConfig().has_critic
    assert not UpoConfig().asks_reference
    assert UpoConfig(advantages="gae").has_critic
    assert UpoConfig(kl_weight=0.1).asks_reference
    assert UpoConfig(preference_weight=1.0).asks_reference
    assert UpoConfig(preference_weight=1.0).has_online_pairs
    assert not UpoConfig(preference_weight=1.0, pair_source="offline").asks_reference
    assert not UpoConfig(preference_weight=1.0, preference=PreferenceConfig(reference_free=True)).asks_reference
    assert not UpoConfig(policy=False, preference_weight=1.0).has_critic
    assert RolloutConfig(prompt_filter=PromptFilter(), max_draws=2).max_draws == 2
