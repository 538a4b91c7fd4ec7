"""Loading: the account, what is refused, the memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ernie45
from ernie45.checkpoint.load import load_model
from ernie45.checkpoint.source import open_source
from ernie45.errors import CheckpointError, ConfigError, NotFoundError

WEIGHTS = "model.safetensors"


def _edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in data.items() if v != "remove"}))


@pytest.mark.parametrize("layout", ["pt", "paddle"])
@pytest.mark.parametrize("moe", [False, True])
def test_what_was_saved_is_loaded(saved: Any, layout: str, moe: bool) -> None:
    model, folder = saved(layout, moe=moe, mtp=1, use_bias=True, tie_word_embeddings=False)
    loaded = load_model(folder)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_shards_give_the_same_as_one_file(saved: Any) -> None:
    model, folder = saved(moe=True, shard_bytes=40_000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    loaded = load_model(folder)
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in model.state_dict().items())


def test_the_account_names_every_tensor(saved: Any) -> None:
    _, folder = saved(moe=True)
    source = open_source(folder)
    assert set(source.account.loaded) == set(load_file(folder / WEIGHTS))
    assert not source.account.left_out
    assert not source.account.missing
    assert not source.account.unexpected


def test_dtypes(saved: Any) -> None:
    _, folder = saved(moe=True)
    narrow = load_model(folder, "bfloat16")
    assert narrow.dtype == torch.bfloat16
    gate = narrow.get_submodule("model.layers.1.mlp.gate")
    assert gate.weight.dtype == torch.float32, "the router stays float32"
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert load_model(folder, "auto").dtype == torch.float32
    with pytest.raises(ConfigError, match="float64"):
        load_model(folder, "float64")


def test_a_missing_tensor_stops_the_load(saved: Any) -> None:
    _, folder = saved(moe=True)
    _edit(folder, lambda tensors: tensors.pop("model.layers.1.mlp.moe_statics.e_score_correction_bias"))
    with pytest.raises(CheckpointError, match=r"1 tensors are missing: model\.layers\.1\.mlp\.moe_statics"):
        load_model(folder)


def test_an_unexpected_tensor_stops_the_load(saved: Any) -> None:
    _, folder = saved()
    _edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}))
    with pytest.raises(CheckpointError, match="1 tensors are unexpected: model.layers.0.self_attn.q_norm"):
        load_model(folder)


def test_prediction_weights_that_the_config_does_not_mention(saved: Any) -> None:
    _, folder = saved(mtp=1)
    _edit_config(folder, num_nextn_predict_layers="remove")
    with pytest.raises(CheckpointError, match="need num_nextn_predict_layers"):
        load_model(folder)


def test_a_promised_prediction_block_without_tensors_is_left_out_with_a_reason(saved: Any) -> None:
    """transformers drops these tensors when it saves, but keeps the field."""
    _, folder = saved()
    _edit_config(folder, num_nextn_predict_layers=1)
    model = load_model(folder)
    assert model.config.num_nextn_predict_layers == 0
    assert "promises" in model.load_account.left_out["model.mtp_*"]


def test_a_head_beside_a_tied_embedding(saved: Any) -> None:
    _, folder = saved()
    _edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "equal to the embedding" in open_source(folder).account.left_out["lm_head.weight"]
    _edit(folder, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        load_model(folder)


def test_computed_frequencies_are_left_out(saved: Any) -> None:
    _, folder = saved()
    _edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert len(load_model(folder).load_account.left_out) == 1


def test_a_flat_correction_bias_is_accepted(saved: Any) -> None:
    model, folder = saved(moe=True)
    name = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    _edit(folder, lambda t: t.update({name: t[name].flatten()}))
    gate = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(load_model(folder).state_dict()[gate], model.state_dict()[gate])


def test_wrong_shapes_and_dtypes_are_refused(saved: Any) -> None:
    _, folder = saved()
    name = "model.layers.0.self_attn.k_proj.weight"
    _edit(folder, lambda t: t.update({name: t[name].T.contiguous()}))
    with pytest.raises(CheckpointError, match=r"k_proj.weight has shape \[48, 32\], config.json calls for \[32, 48\]"):
        load_model(folder)
    _edit(folder, lambda t: t.update({name: torch.zeros(32, 48, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match="stored as I8"):
        load_model(folder)


def test_quantized_folders_and_other_things_are_refused(saved: Any, tmp_path: Path) -> None:
    _, folder = saved()
    _edit_config(folder, quantization_config={"quantization": "wint8"})
    with pytest.raises(CheckpointError, match="wint8"):
        load_model(folder)
    with pytest.raises(NotFoundError, match="expected a folder"):
        load_model(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="config.json"):
        load_model(tmp_path / "empty")


def test_bfloat16_bits_stored_as_u16(saved: Any) -> None:
    """-Paddle files: reinterpreted, not converted."""
    _, folder = saved("paddle", moe=True)
    target = folder.with_name("narrow")
    ernie45.convert(folder, target, to="paddle", dtype="bfloat16")
    header_bytes = int.from_bytes((target / WEIGHTS).read_bytes()[:8], "little")
    header = json.loads((target / WEIGHTS).read_bytes()[8 : 8 + header_bytes])
    assert header["ernie.layers.0.self_attn.qkv_proj.weight"]["dtype"] == "U16"
    assert header["ernie.layers.1.mlp.gate.weight"]["dtype"] == "F32"
    wide, narrow = load_model(folder), load_model(target)
    weight = "model.layers.0.self_attn.qkv_proj.weight"
    assert torch.equal(narrow.state_dict()[weight], wide.state_dict()[weight].bfloat16().float())


def test_transformers_saves_and_we_load_with_progress(transformers_model: Any, tmp_path: Path) -> None:
    theirs = transformers_model(
        1, vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    seen: list[tuple[int, int]] = []
    model = load_model(tmp_path, progress=lambda done, total: seen.append((done, total)))
    size = sum(t.numel() * 4 for t in model.state_dict().values())
    assert seen[-1] == (size, size)
    assert seen == sorted(seen)


_MEASURE = """
import resource, sys, torch
from pathlib import Path
from ernie45.checkpoint.load import load_model
def rss():
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if
    l.startswith(sys.argv[2])).split()[1]) * 1024
load_model(sys.argv[3])            # warms up code paths and allocator on a small model
Path("/proc/self/clear_refs").write_text("5")   # resets the peak
before = rss()
model = load_model(sys.argv[1], sys.argv[4])
print(rss() - before, sum(t.numel() * t.element_size() for t in model.state_dict().values()))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to reset the peak of memory"
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_of_a_gigabyte(tmp_path: Path, saved: Any, dtype: str) -> None:
    """A 1 GB bfloat16 checkpoint: the peak is the final size and one tensor, whether converted or read straight."""
    _, small = saved()
    config = ernie45.ModelConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=31, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    folder = _sparse_checkpoint(tmp_path / "big", config)
    largest = 32000 * 1024 * 4
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(folder), "VmHWM", str(small), dtype],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    grown, final = map(int, result.stdout.split())
    assert final > (0.98e9 if dtype == "bfloat16" else 1.96e9)
    assert grown <= final + largest + (32 << 20), f"peak {grown / 1e6:.0f} MB for a model of {final / 1e6:.0f} MB"


def _sparse_checkpoint(folder: Path, config: Any) -> Path:
    """A checkpoint of zeros that takes no disk: a header, then a hole."""
    from ernie45.checkpoint.layout import pt_layout
    from ernie45.config.reader import config_to_json

    folder.mkdir()
    header, offset = {}, 0
    for stored in pt_layout(config):
        size = torch.Size(stored.shape).numel() * 2
        header[stored.name] = {"dtype": "BF16", "shape": list(stored.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    (folder / "config.json").write_text(json.dumps(config_to_json(config, dtype="bfloat16")))
    return folder
