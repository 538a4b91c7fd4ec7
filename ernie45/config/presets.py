"""The ten published ERNIE 4.5 models and the two -Thinking ones, value by value.

Source: architecture reference, sections 1.2 to 1.4. Base, post-trained and Thinking checkpoints of one size share one
network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from ernie45.config.model import ModelConfig, MoeConfig, VisionConfig
from ernie45.config.nearest import nearest
from ernie45.errors import NotFoundError

_DENSE_03B = ModelConfig(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=18,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=128,
)
_MOE_21B = ModelConfig(
    hidden_size=2560,
    intermediate_size=12288,
    num_hidden_layers=28,
    num_attention_heads=20,
    num_key_value_heads=4,
    head_dim=128,
    num_nextn_predict_layers=1,
    moe=MoeConfig(
        moe_num_experts=64, moe_k=6, moe_intermediate_size=1536, moe_num_shared_experts=2, moe_layer_start_index=1
    ),
)
_MOE_300B = ModelConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=54,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
    num_nextn_predict_layers=1,
    moe=MoeConfig(moe_num_experts=64, moe_k=8, moe_intermediate_size=3584, moe_layer_start_index=3),
)
_VL_28B = ModelConfig(
    hidden_size=2560,
    intermediate_size=12288,
    num_hidden_layers=28,
    num_attention_heads=20,
    num_key_value_heads=4,
    head_dim=128,
    moe=MoeConfig(
        moe_num_experts=64,
        moe_k=6,
        moe_intermediate_size=1536,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        moe_layer_end_index=29,
        moe_vision_intermediate_size=512,
    ),
    vision=VisionConfig(),
)
# Start and end index, untied head and the vision width are derived, not published: the width is the only one that gives
# the published total of 424 billion parameters (reference 1.3, note d).
_VL_424B = ModelConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=54,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
    moe=MoeConfig(
        moe_num_experts=64,
        moe_k=8,
        moe_intermediate_size=3584,
        moe_layer_start_index=3,
        moe_vision_intermediate_size=1536,
    ),
    vision=VisionConfig(),
)

_PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "ERNIE-4.5-0.3B": _DENSE_03B,
        "ERNIE-4.5-0.3B-Base": _DENSE_03B,
        "ERNIE-4.5-21B-A3B": _MOE_21B,
        "ERNIE-4.5-21B-A3B-Base": _MOE_21B,
        "ERNIE-4.5-21B-A3B-Thinking": _MOE_21B,
        "ERNIE-4.5-300B-A47B": _MOE_300B,
        "ERNIE-4.5-300B-A47B-Base": _MOE_300B,
        "ERNIE-4.5-VL-28B-A3B": _VL_28B,
        "ERNIE-4.5-VL-28B-A3B-Base": _VL_28B,
        "ERNIE-4.5-VL-28B-A3B-Thinking": _VL_28B,
        "ERNIE-4.5-VL-424B-A47B": _VL_424B,
        "ERNIE-4.5-VL-424B-A47B-Base": _VL_424B,
    }
)


def presets() -> Mapping[str, ModelConfig]:
    """The published models by name: ten checkpoints and the two -Thinking ones (read-only)."""
    return _PRESETS


def preset(name: str) -> ModelConfig:
    """The configuration of one published model.

    Args: name: with or without `baidu/`, `ERNIE-4.5-` and the `-PT`/`-Paddle` suffix, in any case: `21b-a3b` is enough.
    Raises: NotFoundError naming the nearest published names.
    """
    key = re.sub(r"-(pt|paddle)$", "", name.lower().removeprefix("baidu/")).removeprefix("ernie-4.5-")
    for published, config in _PRESETS.items():
        if published.lower().removeprefix("ernie-4.5-") == key:
            return config
    raise NotFoundError(
        f"no published ERNIE 4.5 model is called {name!r}: did you mean {nearest(name, _PRESETS)}? "
        f"Known: {', '.join(_PRESETS)}"
    )
