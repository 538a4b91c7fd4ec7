"""What a model is, in numbers and words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ernie45
from ernie45.store.describe import describe, describe_config

Save = Callable[..., Path]


@pytest.mark.parametrize("moe", [False, True])
def test_counts_agree_with_the_network(tmp_path: Path, save: Save, moe: bool) -> None:
    folder = save(tmp_path / "m", moe=moe, mtp=1, dtype=torch.bfloat16)
    model = ernie45.load_model(folder, dtype="auto")
    parts = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    shown = describe("m", folder)
    assert shown.parameters + shown.mtp_parameters == sum(parts.values())
    assert shown.mtp_parameters == sum(count for name, count in parts.items() if ".mtp_" in name)
    assert (shown.kind, shown.format, shown.dtype) == ("MoE text" if moe else "dense text", "pt", "bfloat16")
    assert shown.experts == ("8 routed, 3 active, 2 shared" if moe else "none")
    cache = shown.memory_tokens * shown.kv_bytes_per_token
    assert shown.memory_bytes == 2 * sum(parts.values()) + cache


def test_a_published_model_is_described_at_16_bits() -> None:
    shown = describe_config("ERNIE-4.5-VL-28B-A3B", ernie45.preset("vl-28b-a3b"))
    assert (shown.kind, shown.path, shown.size_bytes, shown.licence) == (
        "MoE vision-language", None, None, "Apache-2.0",
    )  # fmt: skip
    assert shown.memory_bytes == 2 * (shown.parameters + shown.mtp_parameters) + 4096 * shown.kv_bytes_per_token
    assert describe_config("mine", ernie45.preset("0.3b")).licence == "not stated"


def test_gguf_files_say_whether_they_are_quantized(tmp_path: Path, save: Save) -> None:
    gguf = pytest.importorskip("gguf")
    import numpy as np

    folder = save(tmp_path / "m")
    plain, quantized = tmp_path / "plain.gguf", tmp_path / "quantized.gguf"
    ernie45.convert(folder, plain, to="gguf", dtype="float16")
    assert describe("plain", plain).dtype == "float16"
    reader = gguf.GGUFReader(plain)
    writer = gguf.GGUFWriter(quantized, "ernie4_5")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        data = np.array(tensor.data, dtype=np.float32)
        if data.ndim == 2 and data.shape[1] % 32 == 0:
            blocks = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(tensor.name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shown = describe("quantized", quantized)
    assert (shown.format, shown.dtype) == ("gguf", "quantized")
    assert shown.size_bytes == quantized.stat().st_size


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, "not stated"),
        ({"README.md": "---\nlicense: apache-2.0\nlanguage: en\n---\n"}, "Apache-2.0"),
        ({"README.md": "---\nlicense:\n- mit\n---\n"}, "not stated"),
        ({"README.md": "---\nlicense: gemma\n---\n"}, "gemma"),
        ({"LICENSE": "Apache License\nVersion 2.0", "README.md": "---\nlicense: gemma\n---\n"}, "Apache-2.0"),
        ({"LICENSE.md": "My terms"}, "see LICENSE.md"),
        ({"provenance.json": json.dumps({"license": "MIT"}), "LICENSE": "My terms"}, "MIT"),
        ({"provenance.json": json.dumps({"license": None})}, "not stated"),
        ({"provenance.json": "[]"}, "not stated"),
        ({"provenance.json": "{"}, "not stated (provenance.json is damaged)"),
    ],
)
def test_licence(tmp_path: Path, save: Save, files: dict[str, str], licence: str) -> None:
    folder = save(tmp_path / "m")
    for name, content in files.items():
        (folder / name).write_text(content)
    assert describe("m", folder).licence == licence
