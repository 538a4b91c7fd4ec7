"""Adapters in files: round trips bit for bit, the blocks of foreign adapters, and what is refused. PEFT's own word: test_lora_peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie45.checkpoint.source import ModuleSource
from ernie45.config.model import ModelConfig
from ernie45.errors import CheckpointError, NotFoundError
from ernie45.models.text import CausalLM
from ernie45.training.lora.adapter import Adapter, adapter_of, add_lora, merge
from ernie45.training.lora.adapter_file import read_adapter
from ernie45.training.lora.config import LoraConfig
from ernie45.training.lora.read import adapter_from, load_adapter
from ernie45.training.lora.source import AdaptedSource
from ernie45.training.lora.write import CONFIG_NAME, WEIGHTS_NAME, save_adapter

Build = Callable[..., CausalLM]
IDS = torch.tensor([[5, 1, 33, 99, 7, 62]])
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def trained(model: CausalLM, **fields: Any) -> Adapter:
    adapter = add_lora(model, LoraConfig(**fields), seed=0)
    with torch.no_grad():
        for i, lora in enumerate(adapter.values()):
            lora.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
            if lora.magnitude is not None:
                lora.magnitude.mul_(1.1)
    return adapter


def change(folder: Path, **stated: Any) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | stated))


@pytest.mark.parametrize(
    ("model_fields", "fields"),
    [
        ({}, {}),
        ({}, {"rslora": True, "dora": True, "rank": 5}),
        ({"moe": True, "mtp": 1}, {"mtp": True}),
        ({"moe": True}, {"targets": ("down_proj",)}),
        ({"moe": True}, {"targets": ("up_gate_proj",)}),
        ({"moe": True}, {"targets": ("o_proj",), "alpha": 0.5}),
    ],
)
def test_what_is_read_is_what_was_written(
    small_model: Build, tmp_path: Path, model_fields: dict[str, Any], fields: dict[str, Any]
) -> None:
    model = small_model(**model_fields)
    adapter = trained(model, **fields)
    notes = save_adapter(adapter, model.config, tmp_path / "a", base="tiny", extra_files={"LICENSE": b"free"})
    assert bool(notes) == ("mtp" in fields)
    assert (tmp_path / "a" / "LICENSE").read_bytes() == b"free"
    file = read_adapter(tmp_path / "a")
    assert file.base == "tiny"
    again = adapter_from(file, model.config)
    assert again.keys() == adapter.keys()
    for name, lora in adapter.items():
        assert again[name].blocks == lora.blocks, name
        for (part, mine), (other, theirs) in zip(lora.named_parameters(), again[name].named_parameters(), strict=True):
            assert part == other
            assert torch.equal(mine, theirs), name
    other_model = small_model(**model_fields)
    load_adapter(other_model, tmp_path / "a")
    assert torch.equal(other_model(IDS), model(IDS))
    assert adapter_of(other_model).keys() == adapter.keys()


def test_a_first_factor_each_becomes_blocks_with_scales_of_their_own(small_model: Build, tmp_path: Path) -> None:
    """Three modules of different rank and alpha, against a network whose weights hold the three products."""
    model, plain = small_model(), small_model()
    generator = torch.Generator().manual_seed(0)
    scales, tensors = {}, {}
    for (name, rows, rank), alpha in zip((("q", 96, 2), ("k", 32, 3), ("v", 32, 2)), (4.0, 3.0, 8.0), strict=True):
        key = f"base_model.model.model.layers.0.self_attn.{name}_proj"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, 48, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.1
        scales[key] = alpha / rank
    write_foreign(tmp_path, tensors, lora_alpha=8, alpha_pattern={"q_proj": 4, r"^model.layers.0.self_attn.k_proj": 3})
    adapter = load_adapter(model, tmp_path)
    (lora,) = adapter.values()
    assert [(block.rows, block.ranks) for block in lora.blocks] == [
        ((0, 96), (0, 2)),
        ((96, 128), (2, 5)),
        ((128, 160), (5, 7)),
    ]
    products = [
        scale * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"] for key, scale in scales.items()
    ]
    with torch.no_grad():
        plain.state_dict()["model.layers.0.self_attn.qkv_proj.weight"].add_(torch.cat(products))
        torch.testing.assert_close(model(IDS), plain(IDS), rtol=1e-5, atol=1e-5)
    save_adapter(adapter, model.config, tmp_path / "again")
    written = load_file(tmp_path / "again" / WEIGHTS_NAME)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    assert adapter_from(read_adapter(tmp_path / "again"), model.config)[next(iter(adapter))].blocks == lora.blocks


def write_foreign(folder: Path, tensors: dict[str, torch.Tensor], **stated: Any) -> None:
    """An adapter as another program writes it."""
    save_file(tensors, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none"} | stated)
    )


def test_modules_may_be_missing(small_model: Build, tmp_path: Path) -> None:
    """The usual q and v: rows of k stay as they are."""
    model, plain = small_model(), small_model()
    base = "base_model.model.model.layers.0.self_attn"
    tensors = {
        f"{base}.{name}_proj.lora_{part}.weight": torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for name, rows in (("q", 96), ("v", 32))
        for part, shape in (("A", (2, 48)), ("B", (rows, 2)))
    }
    write_foreign(tmp_path, tensors)
    load_adapter(model, tmp_path)
    merge(model)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    ours, before = model.state_dict()[name], plain.state_dict()[name]
    assert torch.equal(ours[96:128], before[96:128])
    product = tensors[f"{base}.v_proj.lora_B.weight"] @ tensors[f"{base}.v_proj.lora_A.weight"]
    torch.testing.assert_close(ours[128:], before[128:] + product)


def test_experts_of_older_releases_have_their_sides_exchanged(small_model: Build, tmp_path: Path) -> None:
    model = small_model(
        moe=True, hidden_size=64
    )  # 48 would be twice the width of an expert: nobody could tell the sides
    adapter = trained(model, rank=2, targets=("up_gate_proj", "down_proj"))
    save_adapter(adapter, model.config, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS_NAME)
    for name in [name for name in tensors if ".experts." in name and name.endswith("lora_A.weight")]:
        other = name.replace("lora_A", "lora_B")
        down = tensors[name].unflatten(0, (8, 2))  # (E, R, K)
        up = tensors[other].unflatten(1, (2, 8)).permute(2, 0, 1)  # (E, N, R)
        tensors[name] = up.transpose(1, 2).reshape(16, -1).contiguous()
        tensors[other] = down.transpose(1, 2).permute(1, 2, 0).reshape(down.shape[2], -1).contiguous()
    save_file(tensors, tmp_path / "a" / WEIGHTS_NAME)
    again = adapter_from(read_adapter(tmp_path / "a"), model.config)
    for name, lora in adapter.items():
        assert torch.equal(again[name].lora_A, lora.lora_A), name
        assert torch.equal(again[name].lora_B, lora.lora_B), name


def test_settings_of_further_training(small_model: Build, tmp_path: Path) -> None:
    model = small_model()
    save_adapter(trained(model), model.config, tmp_path / "a")
    again = small_model()
    adapter = load_adapter(again, tmp_path / "a", LoraConfig(dropout=0.3))
    assert {lora.dropout for lora in adapter.values()} == {0.3}


@pytest.mark.parametrize("layout", ["pt", "paddle"])
@pytest.mark.parametrize("fields", [{"moe": True, "mtp": 1, "use_bias": True}, {"tie_word_embeddings": False}])
def test_weights_with_an_adapter_inside_are_those_of_a_merged_network(
    small_model: Build, tmp_path: Path, fields: dict[str, Any], layout: Any
) -> None:
    """Box by box, as a file of either layout asks for them."""
    from ernie45.checkpoint.load import load_model
    from ernie45.checkpoint.write import write_folder

    plain, model = small_model(**fields), small_model(**fields)
    adapter = trained(model, rank=3, mtp=bool(fields.get("mtp")))
    write_folder(AdaptedSource(ModuleSource(plain, plain.config), adapter), tmp_path / "m", layout=layout)
    merge(model)
    found = load_model(tmp_path / "m").state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
        assert (name in adapter) != torch.equal(found[name], plain.state_dict()[name]), name


def test_dora_inside_weights(small_model: Build) -> None:
    plain, model = small_model(), small_model()
    adapter = trained(model, dora=True)
    source = AdaptedSource(ModuleSource(plain, plain.config), adapter)
    merge(model)
    name = "model.layers.1.self_attn.qkv_proj.weight"
    rows = torch.empty(32, 48)
    source.fill(rows, name, ((96, 128),))
    torch.testing.assert_close(rows, model.state_dict()[name][96:128])


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base model"),
        ({"lora_alpha": 0}, "lora_alpha of model.layers.0.self_attn.q_proj is 0"),
        ({"lora_alpha": None}, "is None, expected a number"),
        ({"alpha_pattern": {".*q_proj|k_proj": 3}}, "is an expression"),
        ({"use_dora": True}, "lora_magnitude_vector"),
    ],
)
def test_settings_that_would_be_lost_are_refused(
    small_model: Build, tmp_path: Path, stated: dict[str, Any], message: str
) -> None:
    model = small_model()
    save_adapter(trained(model), model.config, tmp_path / "a")
    change(tmp_path / "a", **stated)
    with pytest.raises(CheckpointError, match=message):
        adapter_from(read_adapter(tmp_path / "a"), model.config)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{Q}.lora_A.weight": (2, 48)}, "expected"),
        ({f"{Q}.lora_A.weight": (2, 48), f"{Q}.lora_B.weight": (96, 3)}, r"\[r, in\]"),
        ({f"{Q}.lora_A.weight": (2, 40), f"{Q}.lora_B.weight": (96, 2)}, "belongs to another network"),
        ({f"{Q}.weight": (2, 48)}, "no part of a linear layer"),
        (
            {"base_model.model.lm_head.lora_A.weight": (2, 48), "base_model.model.lm_head.lora_B.weight": (101, 2)},
            "lm_head",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    small_model: Build, tmp_path: Path, tensors: dict[str, tuple[int, ...]], message: str
) -> None:
    write_foreign(tmp_path, {name: torch.ones(shape) for name, shape in tensors.items()})
    with pytest.raises(CheckpointError, match=message):
        adapter_from(read_adapter(tmp_path), small_model().config)


def test_experts_that_do_not_fit(small_model: Build, tmp_path: Path) -> None:
    config: ModelConfig = small_model(moe=True).config
    base = "base_model.model.model.layers.1.mlp.experts"
    up, down = torch.ones(48, 16), torch.ones(16, 24)  # two ranks of eight experts
    good = {f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": up}
    write_foreign(tmp_path, good, target_parameters=["mlp.experts.down_proj"])
    assert list(adapter_from(read_adapter(tmp_path), config)) == ["model.layers.1.mlp.experts.down_proj"]
    write_foreign(tmp_path, good)
    with pytest.raises(CheckpointError, match="target_parameters do not say"):
        adapter_from(read_adapter(tmp_path), config)
    inner = {name.replace(".lora_", ".base_layer.lora_"): tensor for name, tensor in good.items()}
    write_foreign(tmp_path, inner)
    with pytest.raises(CheckpointError, match="without the outer one"):
        adapter_from(read_adapter(tmp_path), config)
    write_foreign(tmp_path, {f"{base}.lora_A.weight": down[:9], f"{base}.lora_B.weight": up[:, :9].contiguous()},
                  target_parameters=["mlp.experts.down_proj"])  # fmt: skip
    with pytest.raises(CheckpointError, match="no multiple of 8 experts"):
        adapter_from(read_adapter(tmp_path), config)


def test_dora_on_a_part_of_a_matrix(small_model: Build, tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_A.weight": torch.ones(2, 48), f"{Q}.lora_B.weight": torch.ones(96, 2)}
    write_foreign(tmp_path, tensors | {f"{Q}.lora_magnitude_vector": torch.ones(96)}, use_dora=True)
    with pytest.raises(CheckpointError, match=r"q_proj without .*k_proj, .*v_proj"):
        adapter_from(read_adapter(tmp_path), small_model().config)


def test_values_that_are_not_finite(small_model: Build, tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_A.weight": torch.ones(2, 48), f"{Q}.lora_B.weight": torch.full((96, 2), float("nan"))}
    write_foreign(tmp_path, tensors)
    with pytest.raises(CheckpointError, match="not finite"):
        read_adapter(tmp_path)


def test_what_cannot_be_written(small_model: Build, tmp_path: Path) -> None:
    model = small_model()
    with pytest.raises(CheckpointError, match="no adapter to write"):
        save_adapter({}, model.config, tmp_path / "a")
    adapter = trained(model)
    save_adapter(adapter, model.config, tmp_path / "a")
    with pytest.raises(CheckpointError, match="exists"):
        save_adapter(adapter, model.config, tmp_path / "a")
    save_adapter(adapter, model.config, tmp_path / "a", overwrite=True)
    mixed = adapter | {name: lora for name, lora in trained(small_model(), rslora=True).items() if "layers.0" in name}
    with pytest.raises(CheckpointError, match="differ in rslora"):
        save_adapter(mixed, model.config, tmp_path / "b")
    with pytest.raises(NotFoundError, match="no adapter"):
        read_adapter(tmp_path / "b")
