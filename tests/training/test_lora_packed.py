"""Adapters over packed weights: the frozen products and their gradients, against the same network with restored weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ernie45.checkpoint.load import load_model
from ernie45.checkpoint.source import ModuleSource, open_source
from ernie45.checkpoint.write import write_folder
from ernie45.errors import CheckpointError, ConfigError
from ernie45.kernels.packed import PackedFormat, interleave_gate_up, pack
from ernie45.models.build import build_model
from ernie45.models.text import CausalLM
from ernie45.quant.quantize import quantize_checkpoint
from ernie45.quant.rounding import quantize
from ernie45.training.lora.adapter import add_lora, lora_parameters, merge
from ernie45.training.lora.config import LoraConfig
from ernie45.training.lora.packed import FrozenMatrix

FORMAT = PackedFormat(bits=8, group=64)
IDS = torch.tensor([[5, 1, 33, 99, 7, 62], [9, 9, 50, 2, 81, 14]])


@pytest.fixture
def packed(small_model: Callable[..., CausalLM], tmp_path: Path) -> Callable[..., Path]:
    """Writes a random packed folder."""

    def write(scheme: str, **fields: Any) -> Path:
        model = small_model(**fields)
        write_folder(ModuleSource(model, model.config), tmp_path / "plain", layout="pt")
        quantize_checkpoint(tmp_path / "plain", tmp_path / scheme, scheme)
        return tmp_path / scheme

    return write


def restored(folder: Path) -> CausalLM:
    """The plain network with the values that the packed folder stands for."""
    source = open_source(folder)
    model = build_model(source.config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            source.fill(tensor, name, ())
    return model


def step(model: CausalLM) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    logits = model(IDS)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    return logits.detach(), {name: parameter.grad for name, parameter in lora_parameters(model).items()}


@pytest.mark.parametrize("scheme", ["wint8", "wint4"])
@pytest.mark.parametrize("fields", [{"moe": True}, {"use_bias": True, "tie_word_embeddings": False}])
def test_a_packed_base_trains_as_its_restored_weights_do(
    packed: Callable[..., Path], scheme: str, fields: dict[str, Any]
) -> None:
    folder = packed(scheme, **fields)
    model, plain = load_model(folder), restored(folder)
    config = LoraConfig(rank=3, rslora=True, lora_plus_scale=4)
    for network in (model, plain):
        adapter = add_lora(network, config, seed=0)
        with torch.no_grad():
            for i, lora in enumerate(adapter.values()):
                lora.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
    (logits, gradients), (expected_logits, expected) = step(model), step(plain)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7, msg=name)
    merge(model)
    merge(plain)
    torch.testing.assert_close(model(IDS), plain(IDS), rtol=1e-5, atol=1e-5)
    ModuleSource(model, model.config)  # everything had an adapter, so everything is plain now


def test_matrices_without_an_adapter_stay_packed(packed: Callable[..., Path]) -> None:
    folder = packed("wint4", moe=True)
    model = load_model(folder)
    add_lora(model, LoraConfig(targets=("qkv_proj",)), seed=0)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), restored(folder)(IDS), rtol=1e-5, atol=1e-5)
    assert "model.layers.1.mlp.experts.up_gate_proj" not in model.state_dict()
    merge(model)
    with pytest.raises(CheckpointError, match="merge an adapter first"):
        ModuleSource(model, model.config)


@pytest.mark.parametrize("rows", [None, 40])
def test_the_gradient_of_a_product_by_finite_differences(rows: int | None) -> None:
    """Also where gate and up rows alternate; the product is linear, so that differences are exact but for rounding."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(rows or 24, 33, generator=generator)
    stored = weights if rows is None else interleave_gate_up(weights)
    quantized = quantize(stored, FORMAT)
    matrix = FrozenMatrix(pack(quantized.values_NK, quantized.scales, FORMAT), interleaved_rows=rows)
    assert (matrix.rows, matrix.columns) == weights.shape
    torch.testing.assert_close(matrix.restore(), weights, rtol=0, atol=0.05)
    x = torch.randn(3, 33, generator=generator, requires_grad=True)
    upstream = torch.randn(3, len(weights), generator=generator)
    (matrix.product(x) * upstream).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        for row, column in ((0, 0), (1, 17), (2, 32)):
            moved = torch.zeros_like(x)
            moved[row, column] = 0.5
            difference = ((matrix.product(x + moved) - matrix.product(x - moved)) * upstream).sum()
            assert float(x.grad[row, column]) == pytest.approx(float(difference), rel=1e-3, abs=1e-4)


def test_the_gradient_reaches_the_input_under_autocast(packed: Callable[..., Path]) -> None:
    model = load_model(packed("wint8"))
    add_lora(model, LoraConfig(rank=2), seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(IDS).float().square().mean().backward()
    first = lora_parameters(model)["model.layers.0.self_attn.qkv_proj.lora.lora_B"]
    assert first.grad is not None
    assert float(first.grad.abs().max()) > 0


def test_dora_needs_plain_weights(packed: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="packed, and DoRA needs plain weights"):
        add_lora(load_model(packed("wint8")), LoraConfig(dora=True), seed=0)
