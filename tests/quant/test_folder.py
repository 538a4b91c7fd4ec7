"""The packed folder: what it holds, mapping, verification, conversion, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie45.checkpoint.index import open_folder
from ernie45.checkpoint.load import load_model
from ernie45.checkpoint.source import open_source
from ernie45.checkpoint.verify import verify
from ernie45.errors import CheckpointError, ConfigError, Ernie45Error, NotFoundError, UsageError
from ernie45.quant.folder import PackedSource
from ernie45.store.convert import convert
from ernie45.store.describe import describe

INDEX = "model.safetensors.index.json"


def test_names_dtypes_and_alignment(packed: Callable[..., Path]) -> None:
    index = open_folder(packed("wint4", moe=True))
    experts = "model.layers.1.mlp.experts"
    entry = index.entries[f"{experts}.up_gate_proj.packed"]
    # 8 experts, gate and up of 40 rows padded to 64 each, 96 columns padded to 128, 4 bits.
    assert (entry.dtype, entry.shape) == (torch.uint8, (8, 2 * 64 * 128 // 2))
    assert index.entries[f"{experts}.up_gate_proj.scales"].shape == (8, 2 * 64 * 2)
    assert index.entries["model.layers.0.self_attn.qkv_proj.weight.scales"].shape == (2 * 160,)
    packed_entries = [e for name, e in index.entries.items() if name.endswith(".packed")]
    assert packed_entries
    assert all(e.offset % 64 == 0 for e in packed_entries)
    assert index.entries["model.layers.1.mlp.gate.weight"].dtype == torch.float32


def test_config_states_the_format(packed: Callable[..., Path]) -> None:
    stated = json.loads((packed("wint4", moe=True) / "config.json").read_text())["quantization_config"]
    assert stated["quant_method"] == "ernie45"
    assert (stated["version"], stated["scheme"], stated["calibration"]) == (1, "wint4", None)
    assert {"pattern": "*.mlp.experts.*_proj", "bits": 4, "group": 64, "activation_bits": 8} in stated["formats"]


def test_weights_are_mapped_not_copied(packed: Callable[..., Path]) -> None:
    source = open_source(packed("wint8"))
    assert isinstance(source, PackedSource)
    first, again = (source.matrices(source.plan.packed[0])[0] for _ in range(2))
    assert first.weights.data_ptr() == again.weights.data_ptr()


def test_verify_reads_every_value(packed: Callable[..., Path]) -> None:
    report = verify(packed("wint4", moe=True, mtp=1))
    assert report.ok
    assert report.format == "packed"
    assert not report.all_zero


def test_verify_finds_a_scale_that_is_not_finite(packed: Callable[..., Path]) -> None:
    folder = packed("wint8")
    file = folder / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight.scales"][5] = float("nan")
    save_file(tensors, file)
    report = verify(folder)
    assert not report.ok
    assert report.not_finite == ("model.embed_tokens.weight",)
    with pytest.raises(UsageError, match="packed"):
        verify(folder, against="transformers")


def test_describe(packed: Callable[..., Path]) -> None:
    folder = packed("wint4", moe=True)
    described = describe("tiny", folder)
    assert (described.format, described.dtype) == ("packed", "wint4")
    assert described.size_bytes is not None
    assert described.size_bytes < described.memory_bytes < 4 * described.parameters + 10**8


def test_convert_dequantizes(packed: Callable[..., Path], tmp_path: Path) -> None:
    folder = packed("wint4", moe=True, mtp=1)
    assert convert(folder, tmp_path / "pt", "pt").from_format == "packed"
    source, model = open_source(folder), load_model(tmp_path / "pt")
    for stored in source.layout:
        assert torch.equal(model.state_dict()[stored.name], source.read(stored)), stored.name


def test_rows_are_those_of_the_whole(packed: Callable[..., Path]) -> None:
    source = open_source(packed("wint4", moe=True))
    for stored in source.layout:
        if stored.shape[0] >= 5:
            assert torch.equal(source.read(stored, (2, 5)), source.read(stored)[2:5]), stored.name


def test_dtype_and_device(packed: Callable[..., Path]) -> None:
    folder = packed("wint8")
    for dtype in ("bfloat16", torch.float16):
        with pytest.raises(ConfigError, match="compute in float32"):
            load_model(folder, dtype)
    with pytest.raises(ConfigError, match="run on the CPU"):
        load_model(folder, device="meta")


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any], *, stated: bool = True) -> None:
    file = folder / "config.json"
    data = json.loads(file.read_text())
    change(data["quantization_config"] if stated else data)
    file.write_text(json.dumps(data))


CONFIG_MUTATIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "newer version": lambda q: q.update(version=2),
    "no version": lambda q: q.pop("version"),
    "unknown key": lambda q: q.update(rotation="hadamard"),
    "no tool": lambda q: q.pop("tool"),
    "calibration is a list": lambda q: q.update(calibration=[1]),
    "scheme is a number": lambda q: q.update(scheme=4),
    "formats is an object": lambda q: q.update(formats={}),
    "no formats": lambda q: q.update(formats=[]),
    "other bits": lambda q: [rule.update(bits=12 - rule["bits"]) for rule in q["formats"]],
    "other group": lambda q: [rule.update(group=128) for rule in q["formats"]],
    "a rule less": lambda q: q["formats"].pop(-2),
}


@pytest.mark.parametrize("mutation", CONFIG_MUTATIONS)
def test_mutated_statements_are_refused(packed: Callable[..., Path], mutation: str) -> None:
    folder = packed("wint8")
    load_model(folder)
    _edit(folder, CONFIG_MUTATIONS[mutation])
    with pytest.raises(CheckpointError):
        load_model(folder)


def test_other_quantization_methods_are_not_ours(packed: Callable[..., Path]) -> None:
    folder = packed("wint8")
    _edit(folder, lambda q: q.update(quant_method="awq"))
    with pytest.raises(CheckpointError, match="the weights are quantized"):
        load_model(folder)


def test_mutated_networks_are_refused(packed: Callable[..., Path]) -> None:
    folder = packed("wint8")
    for change in ({"num_hidden_layers": 4}, {"intermediate_size": 208}, {"tie_word_embeddings": False}):
        before = (folder / "config.json").read_text()
        _edit(folder, lambda data, change=change: data.update(change), stated=False)  # type: ignore[misc]
        with pytest.raises(CheckpointError):
            load_model(folder)
        (folder / "config.json").write_text(before)


def _rewrite(folder: Path, shard: int, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / f"model-0000{shard}-of-00003.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != file.name} | dict.fromkeys(
        tensors, file.name
    )
    (folder / INDEX).write_text(json.dumps(index))


TABLE = "model.embed_tokens.weight"
FILE_MUTATIONS: dict[str, tuple[int, Callable[[dict[str, torch.Tensor]], Any]]] = {
    "a tensor is missing": (3, lambda t: t.pop(f"{TABLE}.packed")),
    "a scale is missing": (2, lambda t: t.pop(f"{TABLE}.scales")),
    "a norm is missing": (1, lambda t: t.pop("model.norm.weight")),
    "a tensor too many": (1, lambda t: t.update(more=torch.zeros(3))),
    "packed too short": (3, lambda t: t.update({f"{TABLE}.packed": t[f"{TABLE}.packed"][:-64].clone()})),
    "packed as int8": (3, lambda t: t.update({f"{TABLE}.packed": t[f"{TABLE}.packed"].view(torch.int8)})),
    "scales as bfloat16": (2, lambda t: t.update({f"{TABLE}.scales": t[f"{TABLE}.scales"].bfloat16()})),
    "a norm as integers": (1, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].int()})),
}


@pytest.mark.parametrize("mutation", FILE_MUTATIONS)
def test_mutated_weights_are_refused(packed: Callable[..., Path], mutation: str) -> None:
    folder = packed("wint8")
    _rewrite(folder, *FILE_MUTATIONS[mutation])
    with pytest.raises(CheckpointError):
        load_model(folder)


def test_unaligned_weights_are_refused(packed: Callable[..., Path]) -> None:
    folder = packed("wint8")
    file = folder / "model-00003-of-00003.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    file.write_bytes((size + 8).to_bytes(8, "little") + raw[8 : 8 + size] + b" " * 8 + raw[8 + size :])
    with pytest.raises(CheckpointError, match="no multiple of 64"):
        load_model(folder)


def test_truncated_and_missing_shards_are_refused(packed: Callable[..., Path]) -> None:
    folder = packed("wint8")
    for shard in sorted(folder.glob("*.safetensors")):
        raw = shard.read_bytes()
        shard.write_bytes(raw[:-1])
        with pytest.raises(Ernie45Error):
            load_model(folder)
        shard.unlink()
        with pytest.raises((CheckpointError, NotFoundError)):
            load_model(folder)
        shard.write_bytes(raw)
    load_model(folder)
