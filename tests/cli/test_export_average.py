"""`ernie export --average`: what is written is the stored average, of weights and of adapters, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ernie45.checkpoint.load import load_model
from ernie45.models.text import CausalLM
from ernie45.training.adapter_weights import AdapterWeights
from ernie45.training.lora.adapter import add_lora, lora_parameters, merge
from ernie45.training.lora.config import LoraConfig
from ernie45.training.optim import Ema, EmaConfig, OptimizerConfig, build_optimizer
from ernie45.training.state import CheckpointConfig, Checkpoints, ModelWeights, Snapshot, Weights

Ernie = Callable[..., Any]


def move(weights: Mapping[str, Tensor], seed: int) -> None:
    """Something that training might have done."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in weights.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.02)


def saved(
    model: CausalLM, weights: Weights, folder: Path, further: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A run with one checkpoint: weights that moved, and their average, which is returned."""
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(), num_layers=model.config.num_hidden_layers)
    ema = Ema(optimizer.masters, EmaConfig(decay=0.5))
    for step in (1, 2):
        move(optimizer.masters, step)
        ema.update(step=step, loss=1.0)
    averages = ema.state_tensors()
    snapshot = Snapshot(step=2, values={}, tensors={"ema": averages | dict(further or {})})
    Checkpoints(folder / "checkpoints", weights, CheckpointConfig()).save(snapshot)
    return averages


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_copy_is_the_average(
    ernie: Ernie, small_model: Callable[..., CausalLM], tmp_path: Path, dtype: str
) -> None:
    model = small_model(moe=True, mtp=1)
    averages = saved(model, ModelWeights(model, {}), tmp_path / "run", {"critic.weight": torch.ones(3)})
    result = ernie("export", "run", "out", "--to", "pt", "--average", "--dtype", dtype)
    assert result.code == 0, result.err
    assert "model, averaged -> pt" in result.out
    copy, last = load_model(tmp_path / "out", "auto").state_dict(), model.state_dict()
    assert copy.keys() == last.keys() > averages.keys()
    for name, tensor in copy.items():
        if name in averages:
            assert torch.equal(tensor, averages[name].to(tensor.dtype)), name
            assert not torch.equal(tensor, last[name].to(tensor.dtype)), name
        else:
            assert name.endswith("correction_bias")
            assert torch.equal(tensor, last[name]), "a buffer has no average"
    narrow = copy["model.layers.0.self_attn.o_proj.weight"].dtype
    assert narrow == (torch.float32 if dtype == "auto" else torch.bfloat16)


@pytest.mark.parametrize(("to", "target"), [("paddle", "out"), ("gguf", "out.gguf")])
def test_every_format_takes_the_average(
    ernie: Ernie, small_model: Callable[..., CausalLM], tiny: Path, tmp_path: Path, to: str, target: str
) -> None:
    model = load_model(tiny)
    averages = saved(model.requires_grad_(True), ModelWeights(model, files_of(tiny)), tmp_path / "run")
    result = ernie("export", "run", target, "--to", to, "--average")
    assert result.code == 0, result.err
    copy = load_model(tmp_path / target).state_dict()
    assert all(torch.equal(copy[name], averages[name]) for name in copy.keys() & averages.keys())


def test_narrow_weights_take_the_rounded_average(
    ernie: Ernie, small_model: Callable[..., CausalLM], tmp_path: Path
) -> None:
    model = small_model(dtype=torch.bfloat16)
    averages = saved(model, ModelWeights(model, {}), tmp_path / "run")
    assert ernie("export", "run", "out", "--to", "pt", "--average").code == 0
    copy = load_model(tmp_path / "out", "auto").state_dict()
    assert all(
        tensor.dtype == torch.bfloat16 and torch.equal(tensor, averages[name].bfloat16())
        for name, tensor in copy.items()
    )


@pytest.mark.parametrize("fields", [{"experts": True}, {"dora": True, "targets": ("qkv_proj", "o_proj")}])
def test_an_adapter_is_merged_as_its_average(
    ernie: Ernie,
    small_model: Callable[..., CausalLM],
    save_random: Callable[..., Path],
    tmp_path: Path,
    fields: dict[str, Any],
) -> None:
    base = save_random(tmp_path / "base", moe=True)
    model = load_model(base)
    add_lora(model, LoraConfig(**fields), seed=0)
    averages = saved(model, AdapterWeights(model, base=str(base), extra_files={}), tmp_path / "run")
    result = ernie("export", "run", "out", "--merge", "--average", "--to", "pt")
    assert result.code == 0, result.err
    for name, parameter in lora_parameters(model).items():
        parameter.data.copy_(averages[name])
    merge(model)
    expected, copy = model.state_dict(), load_model(tmp_path / "out").state_dict()
    for name, tensor in copy.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7, msg=name)
    assert ernie("export", "run", "last", "--merge", "--to", "pt").code == 0
    assert not torch.equal(
        load_model(tmp_path / "last").state_dict()["model.layers.0.self_attn.o_proj.weight"],
        copy["model.layers.0.self_attn.o_proj.weight"],
    )


@pytest.mark.parametrize("adapted", [False, True])
def test_an_average_of_something_else_is_refused(
    ernie: Ernie, small_model: Callable[..., CausalLM], save_random: Callable[..., Path], tmp_path: Path, adapted: bool
) -> None:
    base = save_random(tmp_path / "base", moe=True)
    model = load_model(base).requires_grad_(True)
    weights: Weights = ModelWeights(model, {})
    if adapted:
        add_lora(model, LoraConfig(), seed=0)
        weights = AdapterWeights(model, base=str(base), extra_files={})
    saved(model, weights, tmp_path / "run")
    (file,) = (tmp_path / "run").rglob("ema.safetensors")
    tensors = load_file(file)
    tensors["model.layers.7.mlp.down_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, file)
    result = ernie("export", "run", "out", "--to", "pt", "--average", *(["--merge"] if adapted else []))
    assert result.code == 1
    assert ("of two runs" if adapted else "of another run") in result.err
    assert not (tmp_path / "out").exists()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("tokenizer")}
