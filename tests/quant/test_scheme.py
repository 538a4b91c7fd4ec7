"""The table of formats: published meaning, options, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from ernie45.config.model import ModelConfig
from ernie45.config.presets import preset
from ernie45.errors import CheckpointError, UsageError
from ernie45.kernels.packed import PackedFormat
from ernie45.quant.plan import packing_plan
from ernie45.quant.scheme import make_scheme, scheme_from_json

WIDE, NARROW = PackedFormat(bits=8, group=64, activation_bits=16), PackedFormat(bits=4, group=64)
MINIMA = PackedFormat(bits=4, group=32)
ATTENTION, DENSE = "model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.up_gate_proj.weight"
SHARED, EXPERTS = "model.layers.1.mlp.shared_experts.down_proj.weight", "model.layers.1.mlp.experts.up_gate_proj"
VISION_EXPERTS = "model.layers.1.mlp.vision_experts.down_proj"


@pytest.mark.parametrize(
    ("name", "attention", "experts"), [("wint8", WIDE, WIDE), ("wint4", WIDE, NARROW), ("wint4-all", MINIMA, NARROW)]
)
def test_formats(name: str, attention: PackedFormat, experts: PackedFormat) -> None:
    scheme = make_scheme(name)
    rest = ("layers.0.self_attn.o_proj.weight", "mtp_linear_proj.0.weight", "mtp_block.0.mlp.down_proj.weight")
    for parameter in (ATTENTION, DENSE, SHARED, *(f"model.{name}" for name in rest)):
        assert scheme.format_of(parameter) == attention, parameter
    for parameter in (EXPERTS, VISION_EXPERTS):
        assert scheme.format_of(parameter) == experts, parameter
    for parameter in ("model.embed_tokens.weight", "lm_head.weight"):
        assert scheme.format_of(parameter) == WIDE


@pytest.mark.parametrize("name", ["wint8", "wint4", "wint4-all"])
def test_what_stays_as_it_is(name: str) -> None:
    scheme = make_scheme(name)
    for parameter in ("model.norm.weight", "model.layers.0.input_layernorm.weight", "model.layers.1.mlp.gate.weight",
                      "model.layers.1.mlp.gate.e_score_correction_bias", "model.layers.0.self_attn.qkv_proj.bias",
                      "model.layers.0.mlp.up_gate_proj.bias", "model.mtp_emb_norm.0.weight", "lm_head.bias",
                      "vision_model.blocks.0.attn.qkv.weight", "resampler_model.mlp.weight"):  # fmt: skip
        assert scheme.format_of(parameter) is None, parameter


def test_group_size_belongs_to_the_narrow_matrices_or_with_wint8_to_all() -> None:
    wide = PackedFormat(bits=8, group=128, activation_bits=16)
    assert make_scheme("wint8", 128).format_of("lm_head.weight") == wide
    assert make_scheme("wint8", 128).format_of(ATTENTION) == wide
    per_channel = make_scheme("wint8", 0)
    assert per_channel.format_of(ATTENTION) == PackedFormat(bits=8, group=0, activation_bits=16)
    assert per_channel.format_of("lm_head.weight") == WIDE, "a table keeps its groups"
    assert make_scheme("wint4", 128).format_of(EXPERTS) == PackedFormat(bits=4, group=128)
    assert make_scheme("wint4", 128).format_of(ATTENTION) == WIDE
    assert make_scheme("wint4-all", 0).format_of(DENSE) == PackedFormat(bits=4, group=0)
    assert make_scheme("wint4-all", 32).format_of(EXPERTS) == MINIMA
    assert MINIMA.has_minima


@pytest.mark.parametrize(
    ("name", "group"), [("wint2", None), ("", None), ("wint8", 32), ("wint8", -64), ("wint4", 100)]
)
def test_wrong_options(name: str, group: int | None) -> None:
    with pytest.raises(UsageError, match="expected"):
        make_scheme(name, group)


@pytest.mark.parametrize("name", ["wint8", "wint4", "wint4-all"])
def test_a_scheme_survives_its_json(name: str) -> None:
    scheme = make_scheme(name, 128)
    assert scheme_from_json(scheme.name, scheme.to_json(), "here") == scheme


GOOD = {"pattern": "*.mlp.*", "bits": 4, "group": 64, "activation_bits": 8}


@pytest.mark.parametrize(
    "rules",
    [
        None,
        [GOOD] * 65,
        [[]],
        [{}],
        [GOOD | {"more": 1}],
        [GOOD | {"bits": 5}],
        [GOOD | {"bits": True}],
        [GOOD | {"bits": 4.0}],
        [GOOD | {"group": 63}],
        [GOOD | {"group": 32, "bits": 8}],
        [GOOD | {"activation_bits": 4}],
        [GOOD | {"group": -64}],
        [GOOD | {"group": 1 << 40}],
        [GOOD | {"pattern": 3}],
        [GOOD | {"pattern": "*a*b*c*d*e*"}],
        [GOOD | {"pattern": "[a-z]"}],
        [GOOD | {"pattern": "x" * 300}],
    ],
)
def test_rules_that_we_would_not_write_are_refused(rules: Any) -> None:
    with pytest.raises(CheckpointError, match="here"):
        scheme_from_json("s", rules, "here")
    assert scheme_from_json("s", [GOOD], "here").format_of("model.layers.0.mlp.x") == NARROW


@pytest.mark.parametrize("name", ["21b-a3b", "vl-28b-a3b"])
def test_sizes_of_published_models(name: str) -> None:
    """wint4 of a published shape: every matrix packed, bits per weight near 4.5, 8 and the mean of both."""
    config: ModelConfig = preset(name)
    sizes = {}
    for scheme in ("wint8", "wint4", "wint4-all"):
        plan = packing_plan(config, make_scheme(scheme))
        text = plan.packed
        sizes[scheme] = 8 * sum(p.size_bytes for p in text) / sum(p.num_matrices * p.rows * p.columns for p in text)
        assert not [name for name in plan.plain if name.startswith("model.") and "_proj" in name]
    assert 8.2 < sizes["wint8"] < 8.3
    assert 4.25 < sizes["wint4-all"] < sizes["wint4"] < 4.75
