"""Router and experts against hand numbers and a loop over tokens."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.config.model import MoeConfig
from ernie45.errors import ShapeError
from ernie45.kernels.router import order_by_expert
from ernie45.layers.linear import Linear
from ernie45.layers.moe import Experts, Router, route


def test_route_by_hand() -> None:
    """Probabilities 0.5, 0.3, 0.2; the bias lifts the last over the middle one, but does not enter the weights."""
    logits = torch.tensor([[math.log(0.5), math.log(0.3), math.log(0.2)]])
    weights, ids = route(logits, None, 2, 1e-12)
    assert ids.tolist() == [[0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.625, 0.375]]))
    weights, ids = route(logits, torch.tensor([0.0, 0.0, 0.15]), 2, 1e-12)
    assert ids.tolist() == [[0, 2]]
    torch.testing.assert_close(weights, torch.tensor([[5 / 7, 2 / 7]]))


def test_a_constant_bias_changes_nothing() -> None:
    logits = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    plain, shifted = route(logits, None, 3, 1e-12), route(logits, torch.full((8,), 0.7), 3, 1e-12)
    assert torch.equal(plain[1], shifted[1])
    assert torch.equal(plain[0], shifted[0])


def test_the_sum_is_bounded_below() -> None:
    weights, _ = route(torch.tensor([[0.0, 0.0]]), None, 1, 2.0)
    assert weights.item() == pytest.approx(0.25)


def test_a_bias_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"expected \(4,\)"):
        route(torch.zeros(1, 4), torch.zeros(3), 1, 1e-12)


@given(tokens=st.integers(0, 40), active=st.integers(1, 5), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_experts_equal_a_loop_over_tokens(tokens: int, active: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = Experts(5, 12, 7, torch.float32)
    for parameter in experts.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    x = torch.randn(tokens, 12, generator=generator)
    orders = [torch.randperm(5, generator=generator)[:active] for _ in range(tokens)]
    ids = torch.stack(orders) if orders else torch.zeros(0, active, dtype=torch.int64)
    weights = torch.rand(tokens, active, generator=generator)
    expected = torch.zeros(tokens, 12)
    for t in range(tokens):
        for k in range(active):
            gate, up = (experts.up_gate_proj[ids[t, k]] @ x[t]).chunk(2)
            expected[t] += weights[t, k] * (experts.down_proj[ids[t, k]] @ (F.silu(gate) * up))
    torch.testing.assert_close(experts(x, order_by_expert(weights, ids, 5)), expected, atol=1e-5, rtol=1e-5)


def test_experts_pass_gradients_to_the_chosen_ones_only() -> None:
    experts = Experts(3, 8, 4, torch.float32)
    for parameter in experts.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 8, requires_grad=True)
    weights = torch.ones(4, 1, requires_grad=True)
    experts(x, order_by_expert(weights, torch.tensor([[0], [2], [0], [2]]), 3)).sum().backward()
    assert experts.down_proj.grad is not None
    assert experts.down_proj.grad[0].abs().sum() > 0
    assert experts.down_proj.grad[1].abs().sum() == 0
    assert x.grad is not None
    assert weights.grad is not None
    assert weights.grad.abs().min() > 0


def test_gradients_reach_the_gate_through_the_order_by_expert() -> None:
    """Those of the weighted sum written out token by token."""
    router, experts = (
        Router(8, MoeConfig(moe_num_experts=4, moe_k=2, moe_intermediate_size=4)),
        Experts(4, 8, 4, torch.float32),
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in (*router.parameters(), *experts.parameters()):
        parameter.data.normal_(generator=generator)
    x, residual = torch.randn(2, 6, 8, generator=generator).unbind()
    experts(x, router(x), residual).square().sum().backward()
    found = [parameter.grad for parameter in (*router.parameters(), *experts.parameters())]
    for parameter in (*router.parameters(), *experts.parameters()):
        parameter.grad = None
    weights, ids = route(x @ router.weight.T, router.e_score_correction_bias, 2, router.norm_min)
    rows = list(residual)
    for t in range(6):
        for k in range(2):
            gate, up = (experts.up_gate_proj[ids[t, k]] @ x[t]).chunk(2)
            rows[t] = rows[t] + weights[t, k] * (experts.down_proj[ids[t, k]] @ (F.silu(gate) * up))
    torch.stack(rows).square().sum().backward()
    for mine, parameter in zip(found, (*router.parameters(), *experts.parameters()), strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, parameter.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_leaf_adds_the_residual_behind_its_own_rounding(dtype: torch.dtype) -> None:
    layer = Linear(12, 7, dtype=dtype)
    x, residual = torch.randn(5, 12, dtype=dtype), torch.randn(5, 7, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer(x, residual_TH=residual), residual + layer(x))
