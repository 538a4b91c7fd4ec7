"""The scale search: never worse than plain rounding, error told as it is, every trick of use."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import CapacityError
from ernie45.kernels.packed import PackedFormat, dequantize, pack
from ernie45.quant.gptq import damped, factor, gptq, shifted_target
from ernie45.quant.rounding import Quantized, quantize, quantize_absmax

MINIMA = PackedFormat(bits=4, group=32)
FORMATS = [*(PackedFormat(bits=bits, group=group) for bits in (4, 8) for group in (0, 64, 128)), MINIMA]


def _dequantized(result: Quantized, format: PackedFormat) -> torch.Tensor:
    return dequantize(pack(result.values_NK, result.scales, format))


def _weighted(weights: torch.Tensor, result: Quantized, format: PackedFormat, importance: torch.Tensor) -> torch.Tensor:
    """Weighted squared error of every row, in float64."""
    return ((_dequantized(result, format) - weights).double().square() * importance).sum(1)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    format=st.sampled_from(FORMATS),
    scale=st.sampled_from([1e-6, 0.02, 1.0, 3e4]),
    heavy=st.booleans(),
    seed=st.integers(0, 999),
)
def test_never_worse_than_plain_rounding(
    rows: int, columns: int, format: PackedFormat, scale: float, heavy: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, columns, generator=generator) * scale
    if heavy:
        weights *= torch.rand(rows, columns, generator=generator) ** -0.5
    importance = torch.rand(columns, generator=generator) + 0.01
    plain = quantize_absmax(weights, format)
    for weight in (None, importance):
        found = quantize(weights, format, weight)
        used = torch.ones(columns) if weight is None else weight
        errors = (_weighted(weights, result, format, used) for result in (found, plain))
        better, worse = errors
        assert bool((better <= worse * (1 + 1e-5)).all())
        difference = (_dequantized(found, format).double() - weights.double()).norm() / weights.double().norm()
        assert found.relative_error == pytest.approx(float(difference), rel=1e-4, abs=1e-9)


def test_errors_of_normal_weights() -> None:
    """Gaussian weights, groups of 64: figures to expect, and clearly below plain rounding at 4 bits."""
    weights = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    narrow = PackedFormat(bits=4, group=64)
    assert quantize(weights, narrow).relative_error < 0.093
    assert quantize_absmax(weights, narrow).relative_error > 0.105
    assert quantize(weights, PackedFormat(bits=8, group=64)).relative_error < 0.0059


@pytest.mark.parametrize("sign", [1, -1])
def test_a_lone_extreme_takes_the_eighth_step(sign: int) -> None:
    """-8 to 7 times a scale of either sign: weights on such a grid are stored exactly, plain rounding errs."""
    weights = sign * torch.arange(-8, 8).repeat(4)[None].float() / 8
    format = PackedFormat(bits=4, group=64)
    found = quantize(weights, format)
    assert found.relative_error == 0
    assert float(found.scales) == sign * 0.125
    assert quantize_absmax(weights, format).relative_error > 0.02


def test_a_grid_with_minima_is_found_exactly() -> None:
    """Weights that are already a scale times 0 .. 15 plus a minimum per 32 columns, as GGUF's Q4_1 holds them."""
    generator = torch.Generator().manual_seed(8)
    codes = torch.randint(0, 16, (50, 6, 32), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15
    scale = (0.01 + 0.05 * torch.rand(50, 6, 1, generator=generator)).half().float()
    minimum = (-scale * 15 * torch.rand(50, 6, 1, generator=generator)).half().float()
    weights = (codes * scale + minimum).flatten(1)
    found = quantize(weights, MINIMA)
    assert found.relative_error < 1e-7
    assert torch.equal(found.values_NK, (codes - 8).flatten(1).to(torch.int8))
    assert quantize(weights, PackedFormat(bits=4, group=64)).relative_error > 0.05


def test_minima_follow_skewed_weights() -> None:
    """Exponential weights lie on one side of zero: half of a symmetric grid is wasted on them."""
    weights = torch.empty(64, 256).exponential_(generator=torch.Generator().manual_seed(9))
    symmetric = quantize(weights, PackedFormat(bits=4, group=64)).relative_error
    assert quantize(weights, MINIMA).relative_error < 0.55 * symmetric


def test_importance_decides_where_the_error_goes() -> None:
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    format, importance = PackedFormat(bits=4, group=64), torch.full((64,), 1e-3)
    importance[:8] = 1.0
    told, untold = quantize(weights, format, importance), quantize(weights, format)
    assert (
        _weighted(weights, told, format, importance).sum() < 0.8 * _weighted(weights, untold, format, importance).sum()
    )


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_and_extremes(format: PackedFormat) -> None:
    for value in (0.0, 1e-9, 6e4, 3e38):
        weights = torch.full((3, 70), value)
        weights[0] = 0
        result = quantize(weights, format)
        assert torch.isfinite(result.scales).all()
        assert not _dequantized(result, format)[0].any()
        assert result.relative_error == 0 or value in (1e-9, 3e38, 6e4)
    assert quantize(torch.empty(0, 70), format).relative_error == 0


def _inputs(columns: int, rank: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2000, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)


def _output_error(weights: torch.Tensor, result: Quantized, format: PackedFormat, inputs: torch.Tensor) -> float:
    exact = inputs @ weights.T
    return float((inputs @ _dequantized(result, format).T - exact).norm() / exact.norm())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("columns", [150, 192])
def test_gptq_changes_outputs_least(format: PackedFormat, columns: int) -> None:
    weights = torch.randn(48, columns, generator=torch.Generator().manual_seed(2))
    inputs = _inputs(columns, rank=40, seed=3) + 0.05 * _inputs(columns, columns, seed=4) / 10
    result = gptq(weights, inputs.T @ inputs, format)
    searched = quantize(weights, format)
    assert _output_error(weights, result, format, inputs) < 0.75 * _output_error(weights, searched, format, inputs)
    difference = (_dequantized(result, format).double() - weights.double()).norm() / weights.double().norm()
    assert result.relative_error == pytest.approx(float(difference), rel=1e-5)


def test_gptq_with_independent_inputs_is_the_search() -> None:
    """A diagonal H leaves nothing to compensate: each column is rounded on its own, with the same scales."""
    weights = torch.randn(16, 128, generator=torch.Generator().manual_seed(5))
    format = PackedFormat(bits=4, group=64)
    rounded = gptq(weights, torch.eye(128), format, sweeps=0)
    assert torch.equal(rounded.values_NK, quantize(weights, format).values_NK)


@pytest.mark.parametrize("format", FORMATS)
def test_every_sweep_brings_outputs_closer(format: PackedFormat) -> None:
    weights = torch.randn(48, 192, generator=torch.Generator().manual_seed(2))
    inputs = _inputs(192, rank=60, seed=3) + 0.1 * _inputs(192, 192, seed=4)
    results = [gptq(weights, inputs.T @ inputs, format, sweeps=n) for n in (0, 1, 3)]
    errors = [_output_error(weights, result, format, inputs) for result in results]
    assert errors[1] < 0.98 * errors[0]
    assert errors[2] < 0.99 * errors[1]


def test_sweeps_refit_scales() -> None:
    """The least-squares scale of the outputs is not that of the weights."""
    weights, format = torch.randn(8, 64, generator=torch.Generator().manual_seed(5)), PackedFormat(bits=4, group=64)
    inputs = _inputs(64, rank=20, seed=3) + 0.1 * _inputs(64, 64, seed=4)
    hessian = damped(inputs.T @ inputs).double()
    result = gptq(weights, hessian.float(), format, sweeps=8)
    values = result.values_NK.double()
    best = ((values @ hessian) * weights).sum(1) / ((values @ hessian) * values).sum(1)
    # Codes move a last time after the last fit, so scales are near the best ones of the codes, not at them.
    torch.testing.assert_close(result.scales[:, 0].double(), best, rtol=2e-3, atol=0)
    assert not torch.allclose(quantize(weights, format).scales[:, 0].double(), best, rtol=2e-3, atol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_gptq_of_odd_weights(format: PackedFormat) -> None:
    """Rows of zeros and of one value, columns without input: scales stay finite, zeros stay zeros."""
    weights = torch.randn(6, 150, generator=torch.Generator().manual_seed(1))
    weights[0], weights[1], weights[2] = 0, 0.25, 3e38
    inputs = _inputs(150, 40, seed=2)
    inputs[:, 30:100] = 0
    result = gptq(weights, inputs.T @ inputs, format)
    assert torch.isfinite(result.scales).all()
    assert not _dequantized(result, format)[0].any()


def test_factor() -> None:
    inputs = _inputs(30, 30, seed=6)
    hessian = inputs.T @ inputs
    mixing, cost = (tensor.double() for tensor in factor(hessian))
    assert torch.equal(mixing, mixing.triu())
    assert torch.equal(mixing.diagonal(), torch.ones(30).double())
    expected = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(30)
    torch.testing.assert_close(mixing @ cost.diag() @ mixing.T, expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
    # One token gives a matrix of rank one: damping makes it invertible. No token gives nothing.
    assert all(torch.isfinite(tensor).all() for tensor in factor(inputs[:1].T @ inputs[:1]))
    with pytest.raises(CapacityError, match="no usable input statistics"):
        factor(torch.zeros(4, 4))


def test_a_shifted_target_makes_up_for_shifted_inputs() -> None:
    """Inputs that a matrix A distorts: the target undoes it, W A^-1; without a shift it is W."""
    weights, inputs = torch.randn(5, 30, generator=torch.Generator().manual_seed(7)), _inputs(30, 30, seed=8)
    distortion = torch.eye(30) + 0.1 * torch.randn(30, 30, generator=torch.Generator().manual_seed(9))
    seen = inputs @ distortion.T
    moments, shift = seen.T @ seen, (inputs - seen).T @ seen
    exact = inputs @ weights.T

    def distance(target: torch.Tensor) -> float:
        return float((seen @ target.T - exact).norm())

    target = shifted_target(weights, moments, shift, tokens=2000)
    assert distance(target) < 0.3 * distance(weights)
    assert torch.equal(shifted_target(weights, moments, torch.zeros(30, 30), tokens=2000), weights)
    # Where columns outnumber tokens the fit proves nothing; in between it is trusted in part.
    half = shifted_target(weights, moments, shift, tokens=60)
    torch.testing.assert_close(2 * (half - weights), (target - weights) / (1 - 30 / 2000))
    assert torch.equal(shifted_target(weights, moments, shift, tokens=30), weights)
