"""Training leaves of experts, feed-forward, norm and router against the plain leaves, finite differences, and what they keep."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ernie45.config.model import MoeConfig
from ernie45.kernels.router import Routing, order_by_expert
from ernie45.layers.ffn import SwiGLU
from ernie45.layers.linear import Linear
from ernie45.layers.moe import Experts, Router
from ernie45.layers.norm import RMSNorm
from ernie45.training.leaves import use_training_leaves
from ernie45.training.leaves.experts import TrainingExperts
from ernie45.training.leaves.router import TrainingRouter
from ernie45.training.leaves.swiglu import TrainingSwiGLU
from ernie45.training.memory import LiveMemory

NUM_EXPERTS, HIDDEN, WIDTH = 5, 12, 7


def _drawn(module: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return module


def _training(plain: nn.Module) -> Any:
    leaf = nn.Sequential(copy.deepcopy(plain))
    use_training_leaves(leaf)
    return leaf[0]


def _routing(ids: list[list[int]], dtype: torch.dtype = torch.float32, seed: int = 3) -> tuple[Tensor, Routing]:
    """Given experts per token with random weights, which need gradients."""
    weights = (
        torch.rand(len(ids), len(ids[0]), generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()
    )
    return weights, order_by_expert(weights, torch.tensor(ids), NUM_EXPERTS)


def _gradients(module: nn.Module, out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return list(torch.autograd.grad(out, [*inputs, *module.parameters()], pull))


@given(tokens=st.integers(1, 30), active=st.integers(1, NUM_EXPERTS), seed=st.integers(0, 1000), keeps=st.booleans())
@settings(max_examples=25, deadline=None)
def test_experts_equal_the_plain_leaf(tokens: int, active: int, seed: int, keeps: bool) -> None:
    """Forward and every gradient, with experts that nobody chose among them."""
    generator = torch.Generator().manual_seed(seed)
    plain = _drawn(Experts(NUM_EXPERTS, HIDDEN, WIDTH, torch.float32), seed)
    leaf = _training(plain)
    leaf.keeps_products = keeps
    ids = [torch.randperm(NUM_EXPERTS, generator=generator)[:active].tolist() for _ in range(tokens)]
    x = torch.randn(tokens, HIDDEN, generator=generator, requires_grad=True)
    residual = torch.randn(tokens, HIDDEN, generator=generator)
    results = []
    for module in (plain, leaf):
        weights, routing = _routing(ids)
        out = module(x, routing, residual_TH=residual)
        results.append([out, *_gradients(module, out, [x, weights])])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keeps", [True, False])
def test_experts_against_finite_differences(keeps: bool) -> None:
    leaf = _training(_drawn(Experts(NUM_EXPERTS, 4, 3, torch.float64)))
    leaf.keeps_products = keeps
    weights, _ = _routing([[0, 3], [3, 1], [1, 0], [3, 4]], torch.float64)
    ids = torch.tensor([[0, 3], [3, 1], [1, 0], [3, 4]])
    x = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def run(x: Tensor, weights: Tensor, up_gate: Tensor, down: Tensor) -> Tensor:
        routing = order_by_expert(weights, ids, NUM_EXPERTS)
        return torch.func.functional_call(leaf, {"up_gate_proj": up_gate, "down_proj": down}, (x, routing))

    assert torch.autograd.gradcheck(run, (x, weights, leaf.up_gate_proj, leaf.down_proj))


def test_experts_without_tokens() -> None:
    """As in a batch whose tokens are all of the other modality."""
    leaf = _training(_drawn(Experts(NUM_EXPERTS, HIDDEN, WIDTH, torch.float32)))
    x = torch.zeros(0, HIDDEN, requires_grad=True)
    routing = order_by_expert(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int64), NUM_EXPERTS)
    out = leaf(x, routing)
    out.sum().backward()
    assert out.shape == (0, HIDDEN)
    assert leaf.down_proj.grad.abs().sum() == 0


def test_narrow_experts_stay_near_the_plain_ones() -> None:
    plain = _drawn(Experts(NUM_EXPERTS, HIDDEN, WIDTH, torch.bfloat16))
    leaf = _training(plain)
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16).requires_grad_()
    results = []
    for module in (plain, leaf):
        weights, routing = _routing([[t % 5, (t + 2) % 5] for t in range(9)])
        out = module(x, routing)
        assert out.dtype == torch.bfloat16
        results.append([out, *_gradients(module, out, [x, weights])])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_frozen_experts_pass_gradients_on() -> None:
    leaf = _training(_drawn(Experts(NUM_EXPERTS, HIDDEN, WIDTH, torch.float32))).requires_grad_(False)
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(4), requires_grad=True)
    weights, routing = _routing([[0], [1], [0]])
    leaf(x, routing).sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    assert leaf.up_gate_proj.grad is None


def test_experts_keep_only_what_they_say() -> None:
    """Input aside (not made here): products of T K tokens with gate and up, the weights, and two lists of ids."""
    tokens, active, hidden, width = 64, 2, 128, 32
    leaf = _training(_drawn(Experts(NUM_EXPERTS, hidden, width, torch.float32)))
    ids = torch.arange(2 * tokens).view(tokens, active) % NUM_EXPERTS
    routing = order_by_expert(torch.rand(tokens, active), ids, NUM_EXPERTS)
    x = torch.randn(tokens, hidden, requires_grad=True)
    live = {}
    for keeps in (True, False):
        leaf.keeps_products = keeps
        with LiveMemory() as memory:
            out = leaf(x, routing)
            live[keeps] = sum(memory.live_bytes().values()) - 4 * out.numel()
        del out
    lists = 2 * 8 * tokens * active + 4 * tokens * active
    assert live[True] <= 4 * tokens * active * 2 * width + lists
    assert live[False] <= lists


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
def test_feed_forward_equals_the_plain_leaf(bias: bool, keeps: bool) -> None:
    plain = _drawn(SwiGLU(HIDDEN, WIDTH, bias=bias, dtype=torch.float32))
    leaf = _training(plain)
    leaf.keeps_products = keeps
    x, residual = (
        torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(s), requires_grad=True) for s in (1, 2)
    )
    results = []
    for module in (plain, leaf):
        out = module(x, residual_TH=residual)
        results.append([out, *_gradients(module, out, [x, residual])])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_feed_forward_against_finite_differences() -> None:
    leaf = _training(_drawn(SwiGLU(4, 3, bias=True, dtype=torch.float64)))
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(leaf, (x,))
    parameters = dict(leaf.named_parameters())
    names, values = list(parameters), list(parameters.values())

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(leaf, dict(zip(names, values, strict=True)), (x.detach(),))

    assert torch.autograd.gradcheck(run, tuple(values))


class _Adapted(Linear):
    """A matrix that somebody else has put in, to be called and not looked into."""

    def forward(self, input: Tensor, residual_TH: Tensor | None = None) -> Tensor:
        return super().forward(2 * input, residual_TH)


@pytest.mark.parametrize("keeps", [False, True])
def test_feed_forward_calls_matrices_that_were_replaced(keeps: bool) -> None:
    plain = SwiGLU(HIDDEN, WIDTH, bias=False, dtype=torch.float32)
    plain.down_proj = _Adapted(WIDTH, HIDDEN, bias=False)
    leaf: TrainingSwiGLU = _training(_drawn(plain))
    leaf.keeps_products = keeps
    x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(1), requires_grad=True)
    results = [[module(x), *_gradients(module, module(x), [x])] for module in (plain, leaf)]
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_norm_equals_the_plain_leaf() -> None:
    plain = _drawn(RMSNorm(HIDDEN, 1e-3, torch.float32))
    leaf = _training(plain)
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1), requires_grad=True)
    results = [[module(x), *_gradients(module, module(x), [x])] for module in (plain, leaf)]
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_norm_against_finite_differences() -> None:
    leaf = _training(_drawn(RMSNorm(6, 1e-3, torch.float64)))
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(leaf, {"weight": weight}, (x,)), (x, leaf.weight)
    )


def test_norm_keeps_one_number_per_token() -> None:
    leaf = _training(RMSNorm(64, 1e-5, torch.float32))
    x = torch.randn(32, 64, requires_grad=True)
    with LiveMemory() as memory:
        out = leaf(x)
        assert sum(memory.live_bytes().values()) == 4 * (out.numel() + 32)


def test_router_equals_the_plain_leaf_and_records_when_asked() -> None:
    moe = MoeConfig(moe_num_experts=8, moe_k=3, moe_intermediate_size=4)
    plain = _drawn(Router(HIDDEN, moe))
    plain.e_score_correction_bias.normal_(0, 0.1, generator=torch.Generator().manual_seed(5))
    leaf: TrainingRouter = _training(plain)
    x = torch.randn(10, HIDDEN, generator=torch.Generator().manual_seed(1))
    for expected, found in zip(plain(x), leaf(x), strict=True):
        assert torch.equal(expected, found)
    assert leaf.take() is None
    leaf.recording = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = leaf(x)
    recorded = leaf.take()
    assert recorded is not None
    logits, ids = recorded
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x @ plain.weight.T, atol=1e-5, rtol=1e-5)
    assert torch.equal(ids, routing.ids_TK)
    assert logits.requires_grad
    leaf(x)
    assert leaf.take() is None, "what was taken is forgotten, and nobody asked again"


def test_leaves_are_put_in_once_and_copies_are_their_own() -> None:
    module = nn.Sequential(Experts(NUM_EXPERTS, HIDDEN, WIDTH, torch.float32), RMSNorm(HIDDEN, 1e-5, torch.float32))
    names = list(module.state_dict())
    use_training_leaves(module)
    use_training_leaves(module)
    assert isinstance(module[0], TrainingExperts)
    assert list(module.state_dict()) == names
    twin = copy.deepcopy(module)
    assert twin[0].down_proj is not module[0].down_proj
    assert isinstance(twin[0], TrainingExperts)
