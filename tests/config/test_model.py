"""Configurations that contradict themselves are refused with the values in the message."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

import ernie45
from ernie45.config.model import ModelConfig, MoeConfig, VisionConfig
from ernie45.errors import ConfigError

MOE = ernie45.preset("21B-A3B")
VL = ernie45.preset("VL-28B-A3B")


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (MOE, {"hidden_size": 0}, "hidden_size is 0"),
        (MOE, {"num_hidden_layers": True}, "num_hidden_layers is True"),
        (MOE, {"num_key_value_heads": 3}, "20 is not a multiple of num_key_value_heads 3"),
        (MOE, {"head_dim": 7}, "head_dim is 7"),
        (MOE, {"rms_norm_eps": 0.0}, "rms_norm_eps 0.0"),
        (MOE, {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1"),
        (MOE, {"num_hidden_layers": 1}, "moe_layer_start_index 1 lies beyond the last layer 0"),
        (MOE, {"vision": VisionConfig()}, "one of the two is missing"),
        (ernie45.preset("0.3B"), {"vision": VisionConfig()}, "needs MoE layers"),
        (VL, {"head_dim": 40}, "freq_allocation 20 leaves no"),
        (MOE.moe, {"moe_k": 65}, "moe_k is 65"),
        (MOE.moe, {"moe_num_shared_experts": -1}, "moe_num_shared_experts is -1"),
        (MOE.moe, {"moe_layer_end_index": -2}, "moe_layer_end_index is -2"),
        (MOE.moe, {"moe_norm_min": 0.0}, "moe_norm_min is 0.0"),
        (VL.vision, {"num_heads": 7}, "over 7 heads"),
    ],
)
def test_contradictions(config: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(config, **changes)


def test_configs_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        MOE.hidden_size = 1  # type: ignore[misc]


def test_shared_width_and_pools() -> None:
    assert isinstance(MOE, ModelConfig)
    assert isinstance(MOE.moe, MoeConfig)
    assert MOE.moe.shared_intermediate_size == 3072
    assert not MOE.moe.has_vision_pool
    assert VL.moe is not None
    assert VL.moe.has_vision_pool
    assert (MOE.num_moe_layers, ernie45.preset("300B-A47B").num_moe_layers, ernie45.preset("0.3B").num_moe_layers) == (
        27,
        51,
        0,
    )
