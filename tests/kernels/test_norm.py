"""RMS norm with and without residual: against a formula in float64, and the same bits everywhere."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.kernels.choice import kernels
from ernie45.kernels.norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from ernie45.layers.norm import RMSNorm

TOLERANCE: dict[str, Any] = {"atol": 1e-6, "rtol": 2e-6}


def inputs(tokens: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, residual = (3 * torch.randn(tokens, width, generator=generator) for _ in range(2))
    return x, residual, 1 + 0.1 * torch.randn(width, generator=generator)


def in_float64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()).float()


@pytest.mark.parametrize("choice", ["native", "reference"])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 1024, 2563])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_norm_is_the_formula(extension: ModuleType, choice: str, tokens: int, width: int) -> None:
    x, residual, weight = inputs(tokens, width)
    with kernels(choice):  # type: ignore[arg-type]
        torch.testing.assert_close(rms_norm(x, weight, 1e-5), in_float64(x, weight, 1e-5), **TOLERANCE)
        y, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y, in_float64(x + residual, weight, 1e-5), **TOLERANCE)


def test_reference_is_the_layer() -> None:
    x, residual, weight = inputs(7, 100)
    layer = RMSNorm(100, 1e-5, torch.float32)
    layer.weight.data = weight
    torch.testing.assert_close(rms_norm_reference(x, weight, 1e-5), layer(x), **TOLERANCE)
    torch.testing.assert_close(add_rms_norm_reference(x, residual, weight, 1e-5)[0], layer(x + residual), **TOLERANCE)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.integers(0, 40), width=st.integers(1, 1500), seed=st.integers(0, 9))
def test_bits_depend_on_nothing_but_the_row(
    extension: ModuleType, isas: list[str], tokens: int, width: int, seed: int
) -> None:
    x, residual, weight = inputs(tokens, width, seed)
    results = []
    for index, name in enumerate(isas):
        extension.set_isa(name)
        extension.set_num_threads(index + 1)
        results.append(add_rms_norm(x, residual, weight, 1e-6))
        rows = [add_rms_norm(x[i : i + 1], residual[i : i + 1], weight, 1e-6)[0] for i in range(tokens)]
        assert torch.equal(torch.cat([torch.empty(0, width), *rows]), results[-1][0])
        assert torch.equal(rms_norm(results[-1][1], weight, 1e-6), results[-1][0])
    assert all(torch.equal(results[0][0], y) for y, _ in results)


def test_zero_row_needs_eps_and_huge_row_is_normal(isa: str) -> None:
    x, weight = torch.stack([torch.zeros(64), torch.full((64,), 1e15)]), torch.ones(64)
    y = rms_norm(x, weight, 1e-5)
    assert torch.equal(y[0], torch.zeros(64))
    torch.testing.assert_close(y[1], torch.ones(64))


def test_wrong_inputs_are_refused() -> None:
    x, residual, weight = inputs(4, 32)
    for bad_x, bad_weight in (
        (x[0], weight),
        (x.double(), weight),
        (x, weight[:5]),
        (x.T.contiguous().T, weight),
        (x, weight.bfloat16()),
        (x.to("meta"), weight),
        (torch.tensor(1.0), weight),
    ):
        with pytest.raises(ShapeError, match=r"\[rms_norm\] (x|weight): expected a contiguous float32"):
            rms_norm(bad_x, bad_weight, 1e-5)
    with pytest.raises(ShapeError, match=r"\[add_rms_norm\] residual"):
        add_rms_norm(x, residual[:2], weight, 1e-5)
