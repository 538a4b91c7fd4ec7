"""Rounding to E4M3 with scales: against a table of all its numbers, at borders, at zero and at the largest values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.training.fp8.scaled import E4M3, LARGEST, TILE, Scaled, quantize_rows, quantize_tiles


def e4m3_table() -> Tensor:
    """All numbers of the format, from its definition: 4 bits of exponent with bias 7, 3 of mantissa, S.1111.111 is NaN."""
    numbers = [0.0]
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) == (15, 7):
                continue
            size = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2 ** (exponent - 7)
            numbers += [size, -size]
    return torch.tensor(sorted(set(numbers)), dtype=torch.float64)


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Rows of very different size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (4 * torch.rand(rows, 1, generator=generator) - 2)
    return torch.randn(rows, columns, generator=generator) * sizes


def scale_per_value(x: Scaled) -> Tensor:
    return x.row_scales().repeat_interleave(TILE, 1)[:, : x.values_RC.shape[1]].double()


def test_the_largest_number_is_448() -> None:
    assert e4m3_table().max() == LARGEST == torch.finfo(E4M3).max


@given(rows=st.integers(0, 5), columns=st.integers(1, 300), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_every_value_goes_to_the_nearest_number_of_its_scale(rows: int, columns: int, seed: int) -> None:
    x = matrix(rows, columns, seed)
    scaled = quantize_rows(x)
    for start in range(0, columns, TILE):
        absmax = x[:, start : start + TILE].abs().amax(1)
        torch.testing.assert_close(scaled.scales_rc[:, start // TILE], absmax / 448)
    table = e4m3_table()
    shares = x.double() / scale_per_value(scaled)
    nearest = (shares[..., None] - table).abs().amin(-1)
    error = (scaled.values_RC.double() - shares).abs()
    torch.testing.assert_close(error, nearest, rtol=1e-4, atol=1e-4)  # the quotient itself is rounded to float32
    bound = torch.maximum(x.double().abs() / 16, scale_per_value(scaled) / 1024)
    assert ((scaled.dequantized().double() - x.double()).abs() <= bound * (1 + 1e-5)).all()


def test_square_tiles_by_hand() -> None:
    x = torch.zeros(130, 129)
    x[0, 0], x[5, 127], x[128, 0], x[0, 128], x[129, 128] = 1.0, -4.48, 8.96, 0.0, 448.0
    scaled = quantize_tiles(x)
    torch.testing.assert_close(scaled.scales_rc[:, 0], torch.tensor([0.01, 0.02]))
    assert scaled.scales_rc[1, 1] == 1.0
    assert scaled.values_RC.shape == x.shape
    found = scaled.dequantized()
    torch.testing.assert_close(found, x, rtol=1 / 16, atol=1e-6)
    assert found[5, 127].item() == pytest.approx(-4.48)
    assert torch.equal(scaled.transposed().dequantized(), found.mT)


@pytest.mark.parametrize("quantize", [quantize_rows, quantize_tiles])
def test_zeros_and_the_ends_of_float32(quantize) -> None:
    zeros = torch.zeros(3, 200)
    assert torch.equal(quantize(zeros).dequantized(), zeros)
    # 1e-37 / 448 is no normal number: the scale is larger, and the value keeps the format's own precision
    for size, tolerance in ((torch.finfo(torch.float32).max, 1e-4), (1e30, 1e-4), (1e-35, 1e-4), (1e-37, 1 / 16)):
        x = matrix(3, 200).sign() * size
        torch.testing.assert_close(quantize(x).dequantized(), x, rtol=tolerance, atol=0)
    tiny = torch.full((2, 3), 1e-44)  # below what a scale can be: rounded to zero, not to NaN
    assert (quantize(tiny).dequantized() - tiny).abs().max() <= 1e-41
    large = torch.full((2, 130), 3.0e38, dtype=torch.bfloat16)
    assert quantize(large).dequantized().isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("quantize", [quantize_rows, quantize_tiles])
def test_what_is_not_finite_stays_visible(quantize, bad: float) -> None:
    x = torch.ones(2, 300)
    x[1, 130] = bad
    found = quantize(x).dequantized()
    assert not found[1, 128:256].isfinite().any()
    assert torch.equal(found[:, :128], x[:, :128])


def test_rows_are_taken_with_their_scales() -> None:
    x = matrix(6, 140)
    rows = torch.tensor([4, 0, 4])
    assert torch.equal(quantize_rows(x).take(rows).dequantized(), quantize_rows(x).dequantized()[rows])


def test_what_a_tiling_cannot_do_is_refused() -> None:
    with pytest.raises(ShapeError, match="no scales for its columns"):
        quantize_rows(torch.ones(2, 2)).transposed()
    with pytest.raises(ShapeError, match="scales of their own"):
        quantize_tiles(torch.ones(2, 2)).take(torch.tensor([0]))
    with pytest.raises(ShapeError, match="expected a floating-point matrix"):
        quantize_rows(torch.ones(2, 2, 2))
