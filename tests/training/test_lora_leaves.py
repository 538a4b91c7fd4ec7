"""Adapters in a network: what they compute, their gradients, every option, switching off and merging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ernie45.errors import ConfigError, ShapeError
from ernie45.models.text import CausalLM
from ernie45.training.lora.adapter import (
    Adapter,
    adapter_of,
    adapter_off,
    add_lora,
    lora_parameters,
    merge,
    put_adapter,
)
from ernie45.training.lora.config import TARGETS, LoraConfig
from ernie45.training.lora.low_rank import Block, LowRank

Build = Callable[..., CausalLM]
IDS = torch.tensor([[5, 1, 33, 99, 7, 62], [9, 9, 50, 2, 81, 14]])


def fill_up(adapter: Adapter, seed: int = 3) -> None:
    """As if it had been trained: B is zero before."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for lora in adapter.values():
            lora.lora_B.copy_(torch.empty(lora.lora_B.shape).normal_(0, 0.1, generator=generator))


def by_hand(lora: LowRank, scale: float) -> Tensor:
    """What an adapter of one block adds to its matrix, written out."""
    return scale * torch.einsum("...nr,...rk->...nk", lora.lora_B.detach(), lora.lora_A.detach())


def loss(model: CausalLM) -> Tensor:
    logits = model(IDS)[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten())


@pytest.mark.parametrize("fields", [{}, {"use_bias": True, "tie_word_embeddings": False}, {"moe": True}])
def test_a_new_adapter_changes_no_bit_and_leaves_only_itself_to_learn(
    small_model: Build, fields: dict[str, Any]
) -> None:
    model = small_model(**fields)
    with torch.no_grad():
        before = model(IDS)
    names = set(model.state_dict())
    add_lora(model, LoraConfig(rank=3), seed=0)
    assert torch.equal(model(IDS).detach(), before)
    assert names < set(model.state_dict()), "names of the network stay as they are"
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == lora_parameters(model).keys() == set(model.state_dict()) - names
    loss(model).backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == learning


@pytest.mark.parametrize("moe", [False, True])
def test_outputs_and_gradients_are_those_of_merged_weights(small_model: Build, moe: bool) -> None:
    """An independent way to all of it: plain weights W + s B A, and the chain rule by hand."""
    model, plain = small_model(moe=moe), small_model(moe=moe).requires_grad_(True)
    adapter = add_lora(model, LoraConfig(rank=3, alpha=5), seed=0)
    fill_up(adapter)
    state = plain.state_dict()
    with torch.no_grad():
        for name, lora in adapter.items():
            state[name].add_(by_hand(lora, 5 / 3))
    torch.testing.assert_close(model(IDS), plain(IDS), rtol=1e-5, atol=1e-5)
    loss(model).backward()
    loss(plain).backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, lora in adapter.items():
        gradient, down, up = gradients[name], lora.lora_A.detach(), lora.lora_B.detach()
        assert gradient is not None
        assert lora.lora_A.grad is not None
        assert float(lora.lora_A.grad.abs().max()) > 0
        expected_B = 5 / 3 * torch.einsum("...nk,...rk->...nr", gradient, down)
        expected_A = 5 / 3 * torch.einsum("...nr,...nk->...rk", up, gradient)
        torch.testing.assert_close(lora.lora_B.grad, expected_B, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(lora.lora_A.grad, expected_A, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"rank": 4}, 2.0),
        ({"rank": 9, "rslora": True}, 4 / 3),
        ({"rank": 4, "alpha": 6}, 1.5),
        ({"rank": 4, "alpha": 6, "rslora": True}, 3.0),
    ],
)
def test_scale(small_model: Build, fields: dict[str, Any], scale: float) -> None:
    model, plain = small_model(), small_model()
    adapter = add_lora(model, LoraConfig(**fields), seed=0)
    fill_up(adapter)
    with torch.no_grad():
        for name, lora in adapter.items():
            assert lora.lora_A.shape[0] == fields["rank"]
            plain.state_dict()[name].add_(by_hand(lora, scale))
        torch.testing.assert_close(model(IDS), plain(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_targets_choose_matrices(small_model: Build, target: Any) -> None:
    adapter = add_lora(small_model(moe=True, mtp=1), LoraConfig(targets=(target,)), seed=0)
    names = {name.removesuffix(".weight").rpartition(".")[2] for name in adapter}
    assert names == {target}
    layers = (
        3 if target in ("qkv_proj", "o_proj") else 1 + 2 + 2
    )  # a dense layer; shared and routed experts of two more
    assert len(adapter) == layers


def test_experts_and_mtp_are_chosen(small_model: Build) -> None:
    def names(**fields: Any) -> set[str]:
        return set(add_lora(small_model(moe=True, mtp=1), LoraConfig(**fields), seed=0))

    routed = {f"model.layers.{layer}.mlp.experts.{leaf}" for layer in (1, 2) for leaf in ("up_gate_proj", "down_proj")}
    assert names() - names(experts=False) == routed
    block = "model.mtp_block.0"
    assert names(mtp=True) - names() == {
        f"{block}.self_attn.qkv_proj.weight",
        f"{block}.self_attn.o_proj.weight",
        f"{block}.mlp.up_gate_proj.weight",
        f"{block}.mlp.down_proj.weight",
    }
    assert not any(".gate." in name for name in names(mtp=True))


@pytest.mark.parametrize("moe", [False, True])
def test_dropout_acts_on_the_adapter_alone_and_while_training_alone(small_model: Build, moe: bool) -> None:
    model = small_model(moe=moe)
    adapter = add_lora(model, LoraConfig(dropout=0.5), seed=0)
    with torch.no_grad():
        plain = model(IDS)
        assert torch.equal(model.train()(IDS), plain), "B is zero: whatever the adapter drops changes nothing"
        fill_up(adapter)
        torch.manual_seed(0)
        first, second = model(IDS), model(IDS)
        assert not torch.equal(first, second)
        model.eval()
        assert torch.equal(model(IDS), model(IDS))


def test_seed_and_start(small_model: Build) -> None:
    def drawn(seed: int) -> Tensor:
        adapter = add_lora(small_model(), LoraConfig(rank=16), seed=seed)
        assert all(not bool(lora.lora_B.any()) for lora in adapter.values())
        return next(iter(adapter.values())).lora_A.detach()

    first = drawn(0)
    assert torch.equal(first, drawn(0))
    assert not torch.equal(first, drawn(1))
    bound = 48**-0.5  # uniform within 1 / sqrt(inputs), as linear layers start
    assert 0.95 * bound < float(first.abs().max()) <= bound


def test_adapter_off_is_the_network_before(small_model: Build) -> None:
    model = small_model(moe=True)
    with torch.no_grad():
        before = model(IDS)
        fill_up(add_lora(model, LoraConfig(), seed=0))
        adapted = model(IDS)
        assert not torch.allclose(adapted, before)
        with adapter_off(model):
            assert torch.equal(model(IDS), before)
            with adapter_off(model):
                pass
            assert torch.equal(model(IDS), before), "the inner block puts back what it found"
        assert torch.equal(model(IDS), adapted)

        def fails() -> None:
            with adapter_off(model):
                raise KeyError

        with pytest.raises(KeyError):
            fails()
        assert torch.equal(model(IDS), adapted), "also after an error"


@pytest.mark.parametrize("fields", [{"moe": True, "mtp": 1}, {"use_bias": True}])
def test_merge_gives_the_plain_network_back(small_model: Build, fields: dict[str, Any]) -> None:
    model, plain = small_model(**fields), small_model(**fields)
    fill_up(add_lora(model, LoraConfig(mtp=bool(fields.get("mtp"))), seed=0))
    with torch.no_grad():
        before = model(IDS)
    merge(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert adapter_of(model) == {}
    torch.testing.assert_close(model(IDS), before, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="no adapter to merge"):
        merge(model)


def test_merging_into_bfloat16_rounds_once(small_model: Build) -> None:
    model, plain = small_model(moe=True, dtype=torch.bfloat16), small_model(moe=True, dtype=torch.bfloat16)
    adapter = add_lora(model, LoraConfig(rank=4), seed=0)
    assert all(lora.lora_B.dtype == torch.float32 for lora in adapter.values())
    fill_up(adapter)
    assert model(IDS).dtype == torch.bfloat16
    merge(model)
    for name, tensor in plain.state_dict().items():
        expected = tensor
        if name in adapter:
            expected = (tensor.float() + by_hand(adapter[name], 2.0)).to(torch.bfloat16)
        # the product's sums may run in another order: one step of bfloat16 where it falls between two values
        torch.testing.assert_close(model.state_dict()[name].float(), expected.float(), rtol=2**-7, atol=1e-6)
        assert model.state_dict()[name].dtype == tensor.dtype


def test_dora_turns_rows_and_sets_their_length(small_model: Build) -> None:
    """Against the definition: rows m V / |V| with V = W + s B A."""
    model, plain = small_model(use_bias=True), small_model(use_bias=True)
    with torch.no_grad():
        before = model(IDS)
        adapter = add_lora(model, LoraConfig(rank=3, alpha=3, dora=True), seed=0)
        torch.testing.assert_close(model(IDS), before, rtol=1e-6, atol=1e-6)
        fill_up(adapter)
        for name, lora in adapter.items():
            assert lora.magnitude is not None
            lora.magnitude.mul_(torch.linspace(0.5, 1.5, len(lora.magnitude)))
            rows = plain.state_dict()[name] + by_hand(lora, 1.0)
            plain.state_dict()[name].copy_(rows / rows.norm(dim=1, keepdim=True) * lora.magnitude[:, None])
        adapted = model(IDS)
        torch.testing.assert_close(adapted, plain(IDS), rtol=1e-5, atol=1e-5)
        merge(model)
        torch.testing.assert_close(model(IDS), adapted, rtol=1e-5, atol=1e-5)


def test_blocks_write_into_their_rows_alone(small_model: Build) -> None:
    """q and v with an A each, k without: as three separate adapters would."""
    model, plain = small_model(), small_model()
    name = "model.layers.1.self_attn.qkv_proj.weight"  # 96 + 32 + 32 rows
    blocks = [Block(rows=(0, 96), ranks=(0, 2), alpha=4), Block(rows=(128, 160), ranks=(2, 5), alpha=3)]
    lora = LowRank(160, 48, blocks)
    lora.initialize(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(lora.lora_B, std=0.1, generator=torch.Generator().manual_seed(1))
    put_adapter(model, {name: lora})
    with torch.no_grad():
        weight = plain.state_dict()[name]
        weight[:96] += 2.0 * lora.lora_B[:96, :2] @ lora.lora_A[:2]
        weight[128:] += 1.0 * lora.lora_B[128:, 2:] @ lora.lora_A[2:]
        torch.testing.assert_close(model(IDS), plain(IDS), rtol=1e-5, atol=1e-5)
    loss(model).backward()
    assert lora.lora_B.grad is not None
    assert not bool(lora.lora_B.grad[:96, 2:].any())
    assert not bool(lora.lora_B.grad[96:128].any())
    assert not bool(lora.lora_B.grad[128:, :2].any())
    merge(model)
    torch.testing.assert_close(model.state_dict()[name], plain.state_dict()[name])


@pytest.mark.parametrize(
    "blocks", [[], [((0, 9), (0, 2))], [((4, 8), (0, 2)), ((0, 4), (2, 3))], [((0, 4), (1, 2))], [((0, 4), (0, 0))]]
)
def test_blocks_that_do_not_fit(blocks: list[tuple[tuple[int, int], tuple[int, int]]]) -> None:
    with pytest.raises(ShapeError, match="block"):
        LowRank(8, 4, [Block(rows=rows, ranks=ranks, alpha=1) for rows, ranks in blocks])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": -2}, "alpha is -2"),
        ({"lora_plus_scale": 0}, "lora_plus_scale is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"targets": ()}, "targets are none"),
        ({"targets": ("gate",)}, "expected some of qkv_proj"),
    ],
)
def test_settings_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**fields)


def test_what_cannot_be_adapted(small_model: Build) -> None:
    model = small_model()
    with pytest.raises(ConfigError, match="no adapter to switch off"), adapter_off(model):
        pass
    add_lora(model, LoraConfig(), seed=0)
    with pytest.raises(ConfigError, match="already"):
        add_lora(model, LoraConfig(), seed=0)
    with pytest.raises(ConfigError, match="DoRA is for plain linear layers"):
        add_lora(small_model(moe=True), LoraConfig(dora=True), seed=0)
    add_lora(small_model(moe=True), LoraConfig(dora=True, experts=False), seed=0)
    lora = LowRank(4, 4, [Block(rows=(0, 4), ranks=(0, 1), alpha=1)])
    with pytest.raises(ConfigError, match="another network"):
        put_adapter(small_model(), {"model.layers.7.self_attn.o_proj.weight": lora})


def test_training_steps_make_the_loss_smaller(small_model: Build) -> None:
    model = small_model(moe=True)
    adapter = add_lora(model, LoraConfig(rank=8), seed=0)
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=2e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.2 * losses[0]
    assert all(bool(lora.lora_B.any()) for lora in adapter.values())
