"""Writing and converting: bit-exact round trips, and transformers as the reader of what we wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import ernie45
from ernie45.checkpoint.load import load_model
from ernie45.checkpoint.source import open_source
from ernie45.checkpoint.write import read_stored, write_folder
from ernie45.errors import CheckpointError, UsageError

WEIGHTS = "model.safetensors"


def _bits(folder: Path) -> dict[str, Any]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return {
        name: (t.dtype, tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("moe", [False, True])
def test_pt_to_paddle_to_pt_is_bit_exact(saved: Any, tmp_path: Path, dtype: str, moe: bool) -> None:
    """With prediction block, bias vectors, untied head, float32 router and correction bias."""
    _, original = saved(moe=moe, mtp=1, use_bias=True, tie_word_embeddings=False)
    first, paddle, back = (tmp_path / name for name in ("first", "paddle", "back"))
    ernie45.convert(original, first, to="pt", dtype=dtype)
    ernie45.convert(first, paddle, to="paddle")
    ernie45.convert(paddle, back, to="pt", max_shard_bytes=30_000)
    assert _bits(first) == _bits(back)
    assert any(".mtp_" in name for name in _bits(back))
    if moe:
        assert _bits(back)["model.layers.1.mlp.gate.weight"][0] == torch.float32
    assert json.loads((first / "config.json").read_text()) == json.loads((back / "config.json").read_text())


@given(
    moe=st.booleans(), mtp=st.integers(0, 1), bias=st.booleans(), tied=st.booleans(),
    heads=st.sampled_from([(6, 2), (3, 3), (4, 1)]),
)  # fmt: skip
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_paddle_tensors_follow_the_published_formulas(
    small_model: Any, tmp_path_factory: Any, moe: bool, mtp: int, bias: bool, tied: bool, heads: tuple[int, int]
) -> None:
    """The conversion rules of the reference, applied by hand to the -Paddle file, give the -PT file."""
    model = small_model(
        moe=moe, mtp=mtp, use_bias=bias, tie_word_embeddings=tied, num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
    )  # fmt: skip
    root = tmp_path_factory.mktemp("formulas")
    from ernie45.checkpoint.source import ModuleSource

    for layout in ("pt", "paddle"):
        write_folder(ModuleSource(model, model.config), root / layout, layout=layout)
    expected = load_file(root / "pt" / WEIGHTS)
    converted: dict[str, torch.Tensor] = {}
    widths = [heads[0] * 16, heads[1] * 16, heads[1] * 16]
    for stored_name, tensor in load_file(root / "paddle" / WEIGHTS).items():
        name = "model." + stored_name[6:] if stored_name.startswith("ernie.") else stored_name
        if "up_gate_proj" in name:
            for part, value in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=-1), strict=True):
                converted[name.replace("up_gate_proj", part)] = value.t()
        elif "qkv_proj" in name:
            for part, value in zip(("q_proj", "k_proj", "v_proj"), tensor.split(widths, dim=-1), strict=True):
                converted[name.replace("qkv_proj", part)] = value.t()
        elif ("_proj." in name or ".gate." in name or "lm_head" in name) and tensor.ndim == 2:
            converted[name] = tensor.T
        else:
            converted[name] = tensor
    assert converted.keys() == expected.keys()
    for name, tensor in converted.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("moe", [False, True])
def test_transformers_loads_what_we_save(
    small_model: Any, tmp_path: Path, bias: bool, tied: bool, shared: int, moe: bool
) -> None:
    from dataclasses import replace

    transformers = pytest.importorskip("transformers")
    model = small_model(moe=moe, use_bias=bias, tie_word_embeddings=tied)
    if moe:
        config = replace(model.config, moe=replace(model.config.moe, moe_num_shared_experts=shared))
        model = _rebuilt(config)
    ernie45.save_model(model, tmp_path / "saved")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    ids = torch.randint(101, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs.eval()(ids).logits - model(ids)).abs().max() <= 2e-5


def _rebuilt(config: Any) -> Any:
    from ernie45.models.build import build_model
    from ernie45.models.init import initialize

    model = build_model(config)
    initialize(model, std=0.1, seed=7, correction_bias_std=0.05)
    return model.eval()


def test_vision_language_checkpoints_survive_both_formats(tmp_path: Path) -> None:
    from ernie45.config.model import ModelConfig, MoeConfig, VisionConfig

    config = ModelConfig(
        vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
        moe=MoeConfig(
            moe_num_experts=4, moe_k=2, moe_intermediate_size=24, moe_num_shared_experts=1, moe_layer_start_index=1,
            moe_vision_intermediate_size=8,
        ),
        vision=VisionConfig(
            depth=2, hidden_size=16, num_heads=2, intermediate_size=32, freq_allocation=2, im_patch_id=50,
            video_patch_id=51, image_start_token_id=52, image_end_token_id=53, video_start_token_id=54,
            video_end_token_id=55,
        ),
    )  # fmt: skip
    model = _rebuilt(config)
    ernie45.save_model(model, tmp_path / "pt")
    ernie45.convert(tmp_path / "pt", tmp_path / "paddle", to="paddle")
    ernie45.convert(tmp_path / "paddle", tmp_path / "back", to="pt")
    assert _bits(tmp_path / "pt") == _bits(tmp_path / "back")
    loaded = load_model(tmp_path / "back")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    stored = load_file(tmp_path / "pt" / WEIGHTS)
    pools = stored["model.layers.1.mlp.moe_statics.e_score_correction_bias"]
    assert torch.equal(pools[1], model.state_dict()["model.layers.1.mlp.vision_gate.e_score_correction_bias"])
    vision_router = model.state_dict()["model.layers.1.mlp.vision_gate.weight"]
    assert torch.equal(stored["model.layers.1.mlp.gate.weight_1"], vision_router.T)
    with pytest.raises(CheckpointError, match="no ERNIE 4.5 vision-language"):
        ernie45.convert(tmp_path / "pt", tmp_path / "x.gguf", to="gguf")


def test_reading_one_tensor_of_another_layout(saved: Any) -> None:
    """A fused -Paddle tensor assembled from the -PT pieces, without the rest."""
    from ernie45.checkpoint.layout import paddle_layout

    model, folder = saved(moe=True)
    source = open_source(folder)
    wanted = next(
        s for s in paddle_layout(source.config) if s.name == "ernie.layers.1.mlp.experts.5.up_gate_proj.weight"
    )
    value = read_stored(source, wanted, torch.float32)
    assert torch.equal(value, model.state_dict()["model.layers.1.mlp.experts.up_gate_proj"][5].T)


def test_existing_targets_are_kept_unless_told_otherwise(saved: Any, tmp_path: Path) -> None:
    _, folder = saved()
    target = tmp_path / "target"
    target.mkdir()
    (target / "keep.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="target"):
        ernie45.convert(folder, target, to="pt")
    assert (target / "keep.txt").read_text() == "mine"
    ernie45.convert(folder, target, to="pt", overwrite=True)
    assert not (target / "keep.txt").exists()
    assert load_model(target).config == load_model(folder).config


def test_companions_travel_along(saved: Any, tmp_path: Path) -> None:
    _, folder = saved()
    (folder / "generation_config.json").write_text('{"temperature": 0.8}')
    (folder / "LICENSE").write_text("Apache License")
    (folder / "notes.bin").write_text("not a companion")
    ernie45.convert(folder, tmp_path / "target", to="paddle")
    assert (tmp_path / "target" / "generation_config.json").read_text() == '{"temperature": 0.8}'
    assert (tmp_path / "target" / "LICENSE").exists()
    assert not (tmp_path / "target" / "notes.bin").exists()


def test_unknown_formats_are_refused(saved: Any, tmp_path: Path) -> None:
    _, folder = saved()
    with pytest.raises(UsageError, match="'onnx', expected one of pt, paddle, gguf"):
        ernie45.convert(folder, tmp_path / "x", to="onnx")  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_conversion_leaves_the_old_folder(saved: Any, tmp_path: Path) -> None:
    """Killed at several moments: the target is the old checkpoint or the new one, never half."""
    _, folder = saved(moe=True, mtp=1)
    target = tmp_path / "target"
    ernie45.convert(folder, target, to="pt")
    old, new = _bits(target), None
    ernie45.convert(folder, tmp_path / "reference", to="paddle")
    new = _bits(tmp_path / "reference")
    script = (
        "import sys, ernie45\nfrom ernie45.checkpoint import write\n"
        "print('ready', flush=True)\nernie45.convert(sys.argv[1], sys.argv[2], to='paddle', overwrite=True)"
    )
    outcomes = set()
    for delay in (0.0, 0.004, 0.008, 0.016, 0.032, 0.064):
        process = subprocess.Popen([sys.executable, "-c", script, str(folder), str(target)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = _bits(target)
        assert found in (old, new)
        outcomes.add(found == new)
    assert False in outcomes, "no kill came in time: the test proves nothing"
