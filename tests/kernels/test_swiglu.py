"""The activation and its backward pass: against autograd in float64, the same bits everywhere, and what goes to PyTorch instead."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.kernels.choice import kernels
from ernie45.kernels.swiglu import swiglu, swiglu_backward


def inputs(tokens: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Products, gradient, weights."""
    generator = torch.Generator().manual_seed(seed)
    products = 4 * torch.randn(tokens, 2 * width, generator=generator)
    return products, torch.randn(tokens, width, generator=generator), torch.rand(tokens, generator=generator)


def in_float64(products: Tensor, gradient: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted hidden, gradients of products and weights, by autograd."""
    products, weights = (x.clone().double().requires_grad_() for x in (products, weights))
    gate, up = products.chunk(2, dim=-1)
    weighted = gate * torch.sigmoid(gate) * up * weights[:, None]
    d_products, d_weights = torch.autograd.grad(weighted, (products, weights), gradient.double())
    return weighted.detach(), d_products, d_weights


@pytest.mark.parametrize("choice", ["native", "reference"])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 96, 331])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_it_is_the_formula(extension: ModuleType, choice: str, tokens: int, width: int) -> None:
    products, gradient, weights = inputs(tokens, width)
    weighted, d_products, d_weights = in_float64(products, gradient, weights)
    dots = torch.empty(tokens)
    with kernels(choice):  # type: ignore[arg-type]
        hidden = swiglu(products)
        found = swiglu_backward(products, gradient, weights, dots)
    for mine, expected in ((hidden * weights[:, None], weighted), (gradient, weighted), (found, d_products)):
        torch.testing.assert_close(mine, expected.float(), atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(dots, d_weights.float(), atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.integers(0, 9), width=st.integers(1, 200), seed=st.integers(0, 9))
def test_bits_depend_on_nothing_but_the_row(
    extension: ModuleType, isas: list[str], tokens: int, width: int, seed: int
) -> None:
    products, gradient, weights = inputs(tokens, width, seed)
    results = []
    for name in isas:
        extension.set_isa(name)
        hidden, dots = gradient.clone(), torch.empty(tokens)
        results.append((swiglu(products), swiglu_backward(products, hidden, weights, dots), hidden, dots))
        rows = [
            swiglu_backward(products[i : i + 1], gradient[i : i + 1].clone(), weights[i : i + 1]) for i in range(tokens)
        ]
        assert torch.equal(torch.cat([torch.empty(0, 2 * width), *rows]), results[-1][1])
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))


def test_large_gates_stay_numbers(isa: str) -> None:
    gates = torch.tensor([-1e4, -88.0, 0.0, 88.0, 1e4])[:, None].expand(5, 16)
    products, gradient = torch.cat([gates, torch.ones(5, 16)], -1).contiguous(), torch.ones(5, 16)
    torch.testing.assert_close(swiglu(products), F.silu(gates))
    d_products = swiglu_backward(products, gradient)
    torch.testing.assert_close(d_products[:, 0], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def test_not_a_number_stays_one(isa: str) -> None:
    products, gradient, _ = inputs(1, 16)
    products[0, 3] = float("nan")
    assert swiglu(products).isnan().sum() == 1
    assert swiglu_backward(products, gradient).isnan().sum() == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_on_pytorch(extension: ModuleType, dtype: torch.dtype) -> None:
    products, gradient, weights = (x.to(dtype) for x in inputs(6, 24))
    weighted, d_products, _ = in_float64(products, gradient, weights)
    atol, rtol = (0.1, 0.05) if dtype == torch.bfloat16 else (1e-12, 1e-12)
    found = swiglu_backward(products, gradient, weights)
    torch.testing.assert_close(found.double(), d_products, atol=atol, rtol=rtol)
    torch.testing.assert_close(gradient.double(), weighted, atol=atol, rtol=rtol)


def test_strided_rows_give_the_same(extension: ModuleType) -> None:
    products, gradient, weights = inputs(6, 24)
    strided, out = products.t().contiguous().t(), torch.empty(6, 24)
    torch.testing.assert_close(swiglu(strided), swiglu(products, out))
    torch.testing.assert_close(
        swiglu_backward(strided, gradient.clone(), weights), swiglu_backward(products, gradient, weights)
    )


def test_shapes_that_do_not_fit_are_refused() -> None:
    products, gradient, weights = inputs(4, 8)
    with pytest.raises(ShapeError, match=r"\[swiglu\] products: expected \(T, 2 I\)"):
        swiglu(products[:, :15])
    with pytest.raises(ShapeError, match=r"\[swiglu\] expected \(4, 8\)"):
        swiglu(products, torch.empty(4, 9))
    with pytest.raises(ShapeError, match=r"\[swiglu_backward\] expected \(4, 8\)"):
        swiglu_backward(products, gradient[:3])
    with pytest.raises(ShapeError, match=r"\[swiglu_backward\] expected \(4,\)"):
        swiglu_backward(products, gradient, weights[:3])


def test_the_module_refuses_what_does_not_fit(extension: ModuleType) -> None:
    products, gradient, weights = inputs(4, 8)
    with pytest.raises(ValueError, match=r"\[swiglu\] products: expected shape \(4, 16\), got \(4, 14\)"):
        extension.swiglu(products[:, :14].contiguous(), gradient)
    with pytest.raises(ValueError, match=r"d_products: expected shape \(4, 16\)"):
        extension.swiglu_backward(products, gradient, torch.empty(4, 15))
    with pytest.raises(ValueError, match="weights: expected one for each of 4 tokens, got 3"):
        extension.swiglu_backward(products, gradient, torch.empty(4, 16), weights[:3])
