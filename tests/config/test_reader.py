"""`config.json` in every published spelling, and what is refused."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ernie45
from ernie45.config.model import ModelConfig
from ernie45.config.reader import config_to_json, parse_config
from ernie45.errors import ConfigError, NotFoundError

# The original file of the 21B, as far as it is known: flat, with training and kernel switches between the facts.
ORIGINAL_21B: dict[str, Any] = {
    "architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe", "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_act": "silu", "hidden_size": 2560,
    "intermediate_size": 12288, "max_position_embeddings": 131072, "num_attention_heads": 20, "num_key_value_heads": 4,
    "num_hidden_layers": 28, "rms_norm_eps": 1e-05, "use_cache": False, "vocab_size": 103424, "rope_theta": 500000,
    "use_rmsnorm": True, "tie_word_embeddings": True, "use_bias": False, "moe_num_experts": 64,
    "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_intermediate_size": 1536,
    "moe_capacity": [64, 64, 64],
    "moe_gate": "topk", "moe_k": 6, "moe_layer_interval": 1, "moe_use_aux_free": True, "num_nextn_predict_layers": 1,
    "head_dim": 128, "fuse_rms_norm": True, "use_recompute": False, "hidden_dropout_prob": 0.0,
    "compression_ratio": 1.0,
    "transformers_version": "4.54.0", "tensor_parallel_degree": 1, "moe_aux_loss_lambda": 1e-05, "dpo_config": None,
}  # fmt: skip
ORIGINAL_VL: dict[str, Any] = ORIGINAL_21B | {
    "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"], "model_type": "ernie4_5_moe_vl",
    "moe_num_experts": [64, 64], "moe_intermediate_size": [1536, 512], "moe_layer_start_index": [1, 1],
    "moe_layer_end_index": [29, 28], "num_nextn_predict_layers": 0, "freq_allocation": 20, "rope_3d": True,
    "rope_scaling": {"type": "default", "mrope_section": [22, 22, 20]}, "spatial_conv_size": 2, "temporal_conv_size": 2,
    "use_temporal_conv": True, "pixel_hidden_size": 1280, "im_patch_id": 100295, "image_start_token_id": 101304,
    "image_end_token_id": 101305, "video_start_token_id": 101306, "video_end_token_id": 101307,
    "moe_use_hard_gate": True, "mm_vocab_size": 0, "max_text_id": 100295,
    "vision_config": {
        "model_type": "DFNRope_vision_transformer", "depth": 32, "embed_dim": 1280, "hidden_size": 1280,
        "hidden_act": "quick_gelu", "mlp_ratio": 4, "num_heads": 16, "in_channels": 3, "patch_size": 14,
        "spatial_merge_size": 2, "attn_implementation": "eager",
    },
}  # fmt: skip


def test_the_original_21b_file_is_the_preset() -> None:
    assert parse_config(ORIGINAL_21B) == ernie45.preset("21B-A3B")


def test_the_original_vl_file_is_the_preset() -> None:
    assert parse_config(ORIGINAL_VL) == ernie45.preset("VL-28B-A3B")


def test_the_300b_has_no_shared_experts_where_the_field_is_absent() -> None:
    config = parse_config({k: v for k, v in ORIGINAL_21B.items() if k != "moe_num_shared_experts"})
    assert config.moe is not None
    assert config.moe.moe_num_shared_experts == 0
    assert parse_config(ORIGINAL_21B | {"moe_num_shared_experts": None}) == config


@pytest.mark.parametrize("name", list(ernie45.presets()))
@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_what_we_write_is_read_back(name: str, layout: Any) -> None:
    config = ernie45.presets()[name]
    back = parse_config(json.loads(json.dumps(config_to_json(config, dtype="bfloat16", layout=layout))))
    if config.moe is not None and config.moe.moe_layer_end_index == -1:
        config = replace(config, moe=replace(config.moe, moe_layer_end_index=config.num_hidden_layers - 1))
    assert back == config


def test_both_architecture_names_of_the_dense_model() -> None:
    config = ernie45.preset("0.3B")
    assert config_to_json(config, dtype="bfloat16")["architectures"] == ["Ernie4_5ForCausalLM"]
    assert config_to_json(config, dtype="bfloat16", layout="paddle")["architectures"] == ["Ernie4_5_ForCausalLM"]


def test_files_of_transformers() -> None:
    """Its own defaults are the published sizes; it knows no multi-token prediction."""
    transformers = pytest.importorskip("transformers")
    dense = parse_config(json.loads(transformers.Ernie4_5Config().to_json_string()))
    assert dense == ernie45.preset("0.3B")
    moe = parse_config(json.loads(transformers.Ernie4_5_MoeConfig().to_json_string()))
    expected = ernie45.preset("21B-A3B")
    assert expected.moe is not None
    assert moe == replace(expected, num_nextn_predict_layers=0, moe=replace(expected.moe, moe_layer_end_index=27))
    vl_class = transformers.AutoConfig.for_model("ernie4_5_vl_moe")
    vl = parse_config(json.loads(vl_class.to_json_string()))
    preset = ernie45.preset("VL-28B-A3B")
    assert preset.moe is not None
    assert replace(vl, bos_token_id=1, eos_token_id=(2,), pad_token_id=0) == replace(
        preset, moe=replace(preset.moe, moe_layer_end_index=27)
    )


def test_missing_head_dim_and_kv_heads_are_derived() -> None:
    data = {k: v for k, v in ORIGINAL_21B.items() if k not in ("head_dim", "num_key_value_heads")}
    config = parse_config(data | {"moe_num_experts": 0})
    assert (config.head_dim, config.num_key_value_heads, config.moe) == (128, 20, None)


def test_rope_theta_in_either_place() -> None:
    data = {k: v for k, v in ORIGINAL_21B.items() if k != "rope_theta"}
    inside = data | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    assert parse_config(inside).rope_theta == 10000.0
    assert parse_config(data).rope_theta == 500000.0
    with pytest.raises(ConfigError, match=r"rope_theta is 500000.*10000"):
        parse_config(inside | {"rope_theta": 500000})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_kk": 4}, "unknown key 'moe_kk'.*nearest known key is 'moe_k'"),
        ({"sliding_window": 4096}, "unknown key 'sliding_window'"),
        ({"qk_layernorm": True}, "unknown key 'qk_layernorm'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"moe_gate_act": "sigmoid"}, "moe_gate_act is 'sigmoid'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope type is 'yarn'"),
        ({"hidden_size": "2560"}, "hidden_size is '2560'"),
        ({"use_bias": "no"}, "use_bias is 'no'"),
        ({"rms_norm_eps": [1]}, r"rms_norm_eps is \[1\]"),
        ({"moe_num_experts": [64, 32]}, "pools differ"),
        ({"moe_intermediate_size": [1, 2, 3]}, "list of two integers"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"mlp_layer_types": ["dense", "sparse"]}, "must name 28 layers"),
        ({"moe_k": 4, "num_experts_per_tok": 6}, "contradict each other"),
        ({"vision_config": {"depth": 3}}, "unknown key 'vision_config'"),
        ({"eos_token_id": ["2"]}, "eos_token_id is"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(ORIGINAL_21B | changes)


def test_unknown_keys_that_switch_nothing_on_pass_and_others_can_be_ignored() -> None:
    assert parse_config(ORIGINAL_21B | {"some_new_feature": False, "another": None, "list_of": []}) == ernie45.preset(
        "21B-A3B"
    )
    assert parse_config(ORIGINAL_21B | {"brand_new": 3}, ignore_keys=("brand_new",)) == ernie45.preset("21B-A3B")


@pytest.mark.parametrize("types", [["sparse", "dense"], ["dense", "sparse", "sparse", "dense", "sparse"]])
def test_layer_types_without_a_rule(types: list[str]) -> None:
    data = ORIGINAL_21B | {"num_hidden_layers": len(types), "mlp_layer_types": types}
    if types == ["sparse", "dense"]:
        config = parse_config(data)
        assert [config.is_moe_layer(i) for i in range(2)] == [True, False]
    else:
        with pytest.raises(ConfigError, match="no start/end/interval rule"):
            parse_config(data)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100000, b" " * (5 << 20)])
def test_files_that_are_no_config(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match="config.json"):
        ModelConfig.from_pretrained(tmp_path)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="config.json does not exist"):
        ModelConfig.from_pretrained(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(key=st.sampled_from(sorted({*ORIGINAL_VL, *ORIGINAL_21B, "rope_parameters", "mlp_layer_types"})), value=JSON)
def test_any_value_of_any_field_is_read_or_refused(key: str, value: Any) -> None:
    for base in (ORIGINAL_21B, ORIGINAL_VL):
        with contextlib.suppress(ConfigError):
            assert isinstance(parse_config(base | {key: value}), ModelConfig)
