"""PEFT as the judge: it loads what we write, we load what it writes, and both learn the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ernie45.checkpoint.load import load_model
from ernie45.models.build import build_model
from ernie45.models.init import initialize
from ernie45.models.text import CausalLM
from ernie45.training.lora.adapter import add_lora, lora_parameters
from ernie45.training.lora.config import LoraConfig
from ernie45.training.lora.read import load_adapter
from ernie45.training.lora.write import CONFIG_NAME, save_adapter

peft = pytest.importorskip("peft")

DENSE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
MOE = DENSE | {
    "num_hidden_layers": 3,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 40,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[5, 1, 33, 99, 7, 62, 18, 4], [9, 9, 50, 2, 81, 14, 0, 100]])
Pair = Callable[..., tuple[Any, CausalLM]]


@pytest.fixture
def pair(transformers_model: Callable[..., Any], tmp_path: Path) -> Pair:
    """Transformers' network, and ours with its weights."""

    def build(fields: dict[str, Any]) -> tuple[Any, CausalLM]:
        theirs = transformers_model(**fields)
        theirs.save_pretrained(tmp_path / "base")
        return theirs, load_model(tmp_path / "base")

    return build


def fill(parameters: dict[str, torch.Tensor]) -> None:
    """Give every B something to say."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(parameters.items()):
            drawn = torch.empty(parameter.shape).normal_(0, 0.05, generator=torch.Generator().manual_seed(i))
            parameter.copy_(1.1 * parameter if "magnitude" in name else drawn)


def their_logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(IDS).logits
    return logits


@torch.no_grad()
@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        (DENSE, {}),
        (DENSE, {"rank": 4, "rslora": True}),
        (DENSE, {"rank": 4, "alpha": 3, "dora": True}),
        (DENSE, {"targets": ("qkv_proj", "down_proj"), "dropout": 0.1}),
        (MOE, {}),
        (MOE, {"experts": False}),
        (MOE, {"targets": ("down_proj",)}),
        (MOE, {"targets": ("qkv_proj", "up_gate_proj"), "rslora": True}),
    ],
)
def test_peft_loads_ours(pair: Pair, tmp_path: Path, fields: dict[str, Any], settings: dict[str, Any]) -> None:
    theirs, ours = pair(fields)
    adapter = add_lora(ours, LoraConfig(**settings), seed=0)
    fill(dict(lora_parameters(ours)))
    assert save_adapter(adapter, ours.config, tmp_path / "adapter") == ()
    expected = ours(IDS)
    before = their_logits(theirs)
    loaded = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(their_logits(loaded), expected, rtol=1e-4, atol=1e-5)
    assert float((expected - before).abs().max()) > 0.05, "the adapter says something"


@torch.no_grad()
@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        (DENSE, {"target_modules": LINEAR}),
        (DENSE, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
        (DENSE, {"target_modules": LINEAR, "use_dora": True}),
        (DENSE, {"target_modules": LINEAR, "rank_pattern": {"k_proj": 7}, "alpha_pattern": {"up_proj": 1}}),
        (MOE, {"target_modules": LINEAR[:4], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
        (MOE, {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
        (MOE, {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj"], "use_rslora": True}),
    ],
)
def test_we_load_theirs(pair: Pair, tmp_path: Path, fields: dict[str, Any], settings: dict[str, Any]) -> None:
    theirs, ours = pair(fields)
    before = their_logits(theirs)
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6, **settings)).eval()
    fill({name: parameter for name, parameter in wrapped.named_parameters() if "lora_" in name})
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    load_adapter(ours, tmp_path / "adapter")
    expected = their_logits(wrapped)
    torch.testing.assert_close(ours(IDS), expected, rtol=1e-4, atol=1e-5)
    assert float((expected - before).abs().max()) > 0.02


@pytest.mark.parametrize("dora", [False, True])
def test_both_learn_the_same(pair: Pair, tmp_path: Path, dora: bool) -> None:
    """Three steps of AdamW from the same A and B on the same batch: losses, gradients and adapters."""
    theirs, ours = pair(DENSE)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, use_dora=dora)
    wrapped = peft.get_peft_model(theirs, settings).eval()
    with torch.no_grad():
        fill({name: parameter for name, parameter in wrapped.named_parameters() if "lora_B" in name})
    wrapped.save_pretrained(str(tmp_path / "start"))
    load_adapter(ours, tmp_path / "start")
    learning = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in learning)
    optimizers = [torch.optim.AdamW(list(p), lr=1e-2) for p in (learning.values(), lora_parameters(ours).values())]
    for _ in range(3):
        losses = []
        for logits, optimizer in zip((their_logits(wrapped), ours(IDS)), optimizers, strict=True):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.default.weight"
        parameters = lora_parameters(ours)
        for part, here in (("A", slice(0, 4)), ("B", (slice(0, 64), slice(0, 4)))):
            gradient = parameters[f"model.layers.0.self_attn.qkv_proj.lora.lora_{part}"].grad
            assert gradient is not None
            torch.testing.assert_close(gradient[here], learning[q.format(part)].grad, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), their_logits(wrapped), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_peft_passes_over_the_prediction_block(pair: Pair, tmp_path: Path) -> None:
    theirs, ours = pair(DENSE)
    model = build_model(replace(ours.config, num_nextn_predict_layers=1)).eval()
    initialize(model, std=0.1)
    model.load_state_dict(ours.state_dict(), strict=False)
    adapter = add_lora(model, LoraConfig(mtp=True), seed=0)
    fill(dict(lora_parameters(model)))
    (note,) = save_adapter(adapter, model.config, tmp_path / "adapter")
    assert "prediction block" in note
    loaded = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(their_logits(loaded), model(IDS), rtol=1e-4, atol=1e-5)


def test_peft_resumes_from_ours(pair: Pair, tmp_path: Path) -> None:
    """Loaded as trainable, it has the rank, the scale and the dropout that were written."""
    theirs, ours = pair(DENSE)
    adapter = add_lora(ours, LoraConfig(rank=6, alpha=9, dropout=0.2), seed=0)
    save_adapter(adapter, ours.config, tmp_path / "adapter", base="tiny")
    loaded = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"), is_trainable=True)
    layer = loaded.base_model.model.model.layers[0].self_attn.q_proj
    assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout["default"].p) == (6, 1.5, 0.2)
    assert (tmp_path / "adapter" / CONFIG_NAME).is_file()
