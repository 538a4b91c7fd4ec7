"""What names decide: held to the modules of real networks, not to a list of names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Size, nn

from ernie45.config.model import ModelConfig, MoeConfig, VisionConfig
from ernie45.errors import ConfigError
from ernie45.layers.moe import Router
from ernie45.layers.norm import RMSNorm
from ernie45.models.build import build_model
from ernie45.models.text import CausalLM
from ernie45.training.optim import MuonConfig, OptimizerConfig, build_optimizer
from ernie45.training.optim.groups import Matrices, is_hidden_matrix, is_router, role


@pytest.fixture(scope="module")
def vision_language_model() -> CausalLM:
    config = ModelConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        moe=MoeConfig(
            moe_num_experts=4,
            moe_k=2,
            moe_intermediate_size=8,
            moe_vision_intermediate_size=8,
            moe_num_shared_experts=1,
            moe_layer_start_index=1,
        ),
        vision=VisionConfig(
            depth=2, hidden_size=16, num_heads=1, intermediate_size=24, patch_size=2, freq_allocation=2
        ),
    )
    return build_model(config, device="meta")


def test_every_router_is_one_and_nothing_else_is(vision_language_model: CausalLM) -> None:
    """The published matcher named the gate of layer 0 alone, where there is none."""
    routers = {f"{name}.weight" for name, module in vision_language_model.named_modules() if isinstance(module, Router)}
    assert len(routers) == 4  # text and vision, in two of three layers
    assert {name for name, _ in vision_language_model.named_parameters() if is_router(name)} == routers


def test_norms_and_biases_do_not_decay_and_all_else_does(
    small_model: Callable[..., CausalLM], vision_language_model: CausalLM
) -> None:
    for model in (small_model(moe=True, mtp=1, use_bias=True), vision_language_model):
        norms = {
            f"{name}.weight" for name, module in model.named_modules() if isinstance(module, RMSNorm | nn.LayerNorm)
        }
        for name, parameter in model.named_parameters():
            treated = role(name, parameter.shape, OptimizerConfig(), num_layers=3, qkv_rows=None)
            is_plain = name not in norms and not name.endswith("bias")
            assert treated.weight_decay == (0.1 if is_plain else 0.0), name


def test_rates_by_hand() -> None:
    """Bound 0.5 and 3 layers: 0.5 + depth / 5 * 0.5; the head is as deep as 5."""
    config = OptimizerConfig(layerwise_lr_decay_bound=0.5, gate_lr_ratio=0.01, lora_plus_scale=4.0)

    def ratio(name: str) -> float:
        return role(name, Size((4, 4)), config, num_layers=3, qkv_rows=None).lr_ratio

    assert ratio("model.embed_tokens.weight") == pytest.approx(0.5)
    assert ratio("vision_model.blocks.1.attn.qkv.weight") == pytest.approx(0.5)
    assert ratio("model.layers.0.mlp.down_proj.weight") == pytest.approx(0.5)
    assert ratio("model.layers.2.mlp.down_proj.weight") == pytest.approx(0.7)
    assert ratio("model.layers.2.mlp.gate.weight") == pytest.approx(0.7 * 0.01)
    assert ratio("critic.model.layers.2.mlp.vision_gate.weight") == pytest.approx(0.7 * 0.01)
    assert ratio("model.layers.2.self_attn.qkv_proj.lora_B") == pytest.approx(0.7 * 4)
    assert ratio("model.layers.2.self_attn.qkv_proj.lora_A") == pytest.approx(0.7)
    assert ratio("model.mtp_block.0.mlp.up_gate_proj.weight") == pytest.approx(0.8)
    assert ratio("model.norm.weight") == ratio("lm_head.weight") == ratio("value_head.weight") == pytest.approx(1.0)


def test_muon_takes_the_matrices_inside_the_layers(vision_language_model: CausalLM) -> None:
    config = OptimizerConfig(name="muon")
    for name, parameter in vision_language_model.named_parameters():
        is_muon = bool(role(name, parameter.shape, config, num_layers=3, qkv_rows=(32, 16, 16)).matrices)
        inside = "layers." in name or "blocks." in name
        assert is_muon is (inside and parameter.ndim > 1 and not is_router(name)), name
    assert not is_hidden_matrix("model.layers.0.self_attn.qkv_proj.lora_B", Size((8, 2)))
    assert is_hidden_matrix("model.mtp_linear_proj.0.weight", Size((4, 8)))


def test_fused_matrices_are_taken_apart() -> None:
    def matrices(name: str, *shape: int, **fields: bool) -> tuple[Matrices, ...]:
        config = OptimizerConfig(name="muon", muon=MuonConfig(**fields))  # type: ignore[arg-type]
        return role(name, Size(shape), config, num_layers=1, qkv_rows=(6, 2, 2)).matrices

    qkv, experts = "model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.experts.up_gate_proj"
    assert matrices(qkv, 10, 4) == (
        Matrices(start_row=0, count=1, rows=6, columns=4),
        Matrices(start_row=6, count=1, rows=2, columns=4),
        Matrices(start_row=8, count=1, rows=2, columns=4),
    )
    assert matrices(qkv, 10, 4, split_qkv=False) == (Matrices(start_row=0, count=1, rows=10, columns=4),)
    assert matrices(experts, 3, 8, 5) == (Matrices(start_row=0, count=6, rows=4, columns=5),)
    assert matrices(experts, 3, 8, 5, split_up_gate=False) == (Matrices(start_row=0, count=3, rows=8, columns=5),)
    assert matrices("vision_model.blocks.0.attn.qkv.weight", 9, 3)[2] == Matrices(
        start_row=6, count=1, rows=3, columns=3
    )
    with pytest.raises(ConfigError, match=r"has 11 rows and qkv_rows is \(6, 2, 2\)"):
        matrices(qkv, 11, 4)


def test_options_without_anything_to_act_on_are_refused(small_model: Callable[..., CausalLM]) -> None:
    model = small_model()
    for fields, message in (
        ({"gate_lr_ratio": 0.01}, "no router is trained"),
        ({"lora_plus_scale": 4.0}, "no lora_B is trained"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_optimizer(model.named_parameters(), OptimizerConfig(**fields), num_layers=3)  # type: ignore[arg-type]
    heads = [("value_head.weight", torch.nn.Parameter(torch.zeros(1, 8)))]
    with pytest.raises(ConfigError, match="Muon has nothing to do"):
        build_optimizer(heads, OptimizerConfig(name="muon"), num_layers=3)
