"""The name maps, against the published names and shapes."""

from __future__ import annotations

import math
from typing import Any

import pytest

import ernie45
from ernie45.checkpoint.layout import Stored, gguf_layout, paddle_layout, pt_layout
from ernie45.config.model import ModelConfig
from ernie45.models.build import build_model

SPOT_CHECKS: dict[str, tuple[Any, dict[str, tuple[int, ...]]]] = {
    "21B-A3B": (
        pt_layout,
        {
            "model.embed_tokens.weight": (103424, 2560),
            "model.layers.0.mlp.gate_proj.weight": (12288, 2560),
            "model.layers.0.mlp.down_proj.weight": (2560, 12288),
            "model.layers.27.self_attn.q_proj.weight": (2560, 2560),
            "model.layers.27.self_attn.v_proj.weight": (512, 2560),
            "model.layers.1.mlp.gate.weight": (64, 2560),
            "model.layers.1.mlp.moe_statics.e_score_correction_bias": (1, 64),
            "model.layers.1.mlp.experts.63.up_proj.weight": (1536, 2560),
            "model.layers.1.mlp.shared_experts.down_proj.weight": (2560, 3072),
            "model.mtp_linear_proj.0.weight": (2560, 5120),
            "model.mtp_block.0.mlp.up_proj.weight": (12288, 2560),
            "model.mtp_emb_norm.0.weight": (2560,),
        },
    ),
    "300B-A47B": (
        paddle_layout,
        {
            "ernie.layers.5.self_attn.qkv_proj.weight": (8192, 10240),
            "ernie.layers.0.mlp.up_gate_proj.weight": (8192, 57344),
            "ernie.layers.5.mlp.experts.7.up_gate_proj.weight": (8192, 7168),
            "ernie.layers.5.mlp.experts.7.down_proj.weight": (3584, 8192),
            "ernie.layers.5.mlp.gate.weight": (8192, 64),
            "ernie.layers.5.mlp.moe_statics.e_score_correction_bias": (1, 64),
            "ernie.mtp_linear_proj.0.weight": (16384, 8192),
            "ernie.embed_tokens.weight": (103424, 8192),
            "lm_head.weight": (8192, 103424),
        },
    ),
    "VL-28B-A3B": (
        pt_layout,
        {
            "model.layers.1.mlp.gate.weight": (2560, 64),
            "model.layers.1.mlp.gate.weight_1": (2560, 64),
            "model.layers.1.mlp.moe_statics.e_score_correction_bias": (2, 64),
            "model.layers.1.mlp.experts.64.gate_proj.weight": (512, 2560),
            "model.layers.1.mlp.experts.127.down_proj.weight": (2560, 512),
            "vision_model.patch_embed.proj.weight": (1280, 588),
            "vision_model.blocks.31.attn.qkv.bias": (3840,),
            "vision_model.ln.bias": (1280,),
            "model.resampler_model.spatial_linear.3.weight": (5120,),
            "model.resampler_model.temporal_linear.0.weight": (5120, 10240),
            "model.resampler_model.mlp.weight": (2560, 5120),
            "model.resampler_model.after_norm.weight": (2560,),
        },
    ),
}


@pytest.mark.parametrize("name", SPOT_CHECKS)
def test_published_names_and_shapes(name: str) -> None:
    layout, expected = SPOT_CHECKS[name]
    shapes = {stored.name: stored.shape for stored in layout(ernie45.preset(name))}
    assert {key: shapes.get(key) for key in expected} == expected


@pytest.mark.parametrize("name", ["0.3B", "21B-A3B", "300B-A47B", "VL-28B-A3B", "VL-424B-A47B"])
@pytest.mark.parametrize("layout", [pt_layout, paddle_layout])
def test_every_value_of_the_network_is_covered_once(name: str, layout: Any) -> None:
    """Values stored = values of the network, per parameter, and no two parts overlap."""
    config = ernie45.preset(name)
    _check_cover(config, layout(config))


@pytest.mark.parametrize("name", ["0.3B", "21B-A3B", "300B-A47B"])
def test_gguf_covers_all_but_the_prediction_block(name: str) -> None:
    config = ernie45.preset(name)
    _check_cover(config, gguf_layout(config, "ernie4_5-moe" if config.moe else "ernie4_5"), without=".mtp_")


def _check_cover(config: ModelConfig, layout: list[Stored], without: str = "?") -> None:
    shapes = {k: tuple(v.shape) for k, v in build_model(config, device="meta").state_dict().items() if without not in k}
    covered: dict[str, int] = dict.fromkeys(shapes, 0)
    boxes: dict[str, list[Any]] = {name: [] for name in shapes}
    names = [stored.name for stored in layout]
    assert len(set(names)) == len(names)
    for stored in layout:
        for part in stored.parts:
            box = (*part.box, *((0, size) for size in shapes[part.target][len(part.box) :]))
            covered[part.target] += math.prod(end - start for start, end in box)
            boxes[part.target].append(box)
        values = sum(
            math.prod(e - s for s, e in (*p.box, *((0, n) for n in shapes[p.target][len(p.box) :])))
            for p in stored.parts
        )
        assert values == math.prod(stored.shape), stored.name
    assert covered == {name: math.prod(shape) for name, shape in shapes.items()}
    assert all(len(set(found)) == len(found) for found in boxes.values())
