"""The product of fp8 matrices: against float64 with the stated bound, on the device against emulation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ernie45.errors import ConfigError, ShapeError
from ernie45.training.fp8 import Fp8Config
from ernie45.training.fp8.matmul import matmul, resolve_backend, why_no_scaled_mm
from ernie45.training.fp8.products import input_gradient, output, weight_gradient
from ernie45.training.fp8.scaled import Scaled, quantize_rows, quantize_tiles

CPU = torch.device("cpu")
needs_scaled_mm = pytest.mark.skipif(bool(why_no_scaled_mm(CPU)), reason="torch._scaled_mm does not run here")
SIZES = [(5, 7, 9), (130, 200, 300), (1, 128, 128), (64, 40, 257)]
"""Tokens, outputs, inputs."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounding(x: Tensor, quantized: Scaled) -> Tensor:
    """The most that rounding moved each value: a sixteenth of it, or a 1024th of the scale."""
    scale = quantized.row_scales().repeat_interleave(128, 1)[:, : x.shape[1]]
    return torch.maximum(x.abs() / 16, scale / 1024).double()


def check_product(found: Tensor, a: Tensor, b: Tensor, a_error: Tensor, b_error: Tensor) -> None:
    """A B^T within |A| dB + dA |B| + dA dB entry by entry, and within 5 % of its size over all entries.

    Rounding errs by 2.6 % of a normal number in the root mean square, two operands by 3.7 %.
    """
    exact = a.double() @ b.double().mT
    bound = a.double().abs() @ b_error.mT + a_error @ b.double().abs().mT + a_error @ b_error.mT
    error = (found.double() - exact).abs()
    assert (error <= bound * 1.001 + 1e-6).all()
    assert error.norm() <= 0.05 * exact.norm()
    assert error.norm() > 0.005 * exact.norm(), "nothing was rounded"


@pytest.mark.parametrize("sizes", SIZES)
def test_the_three_products(sizes: tuple[int, int, int]) -> None:
    tokens, outputs, inputs = sizes
    x, w, grad = drawn(tokens, inputs), drawn(outputs, inputs, seed=1), drawn(tokens, outputs, seed=2)
    x_scaled, w_scaled = quantize_rows(x), quantize_tiles(w)
    w_error = rounding(w, w_scaled)
    check_product(output(x_scaled, w, "emulate"), x, w, rounding(x, x_scaled), w_error)
    grad_error = rounding(grad, quantize_rows(grad))
    check_product(input_gradient(grad, w, "emulate"), grad, w.mT, grad_error, w_error.mT)
    turned = quantize_rows(grad.mT)
    x_once = x_scaled.dequantized().mT
    x_twice_error = rounding(x, x_scaled).mT + rounding(x_once, quantize_rows(x_once))
    check_product(weight_gradient(grad, x_scaled, "emulate"), grad.mT, x.mT, rounding(grad.mT, turned), x_twice_error)


def test_the_weight_gradient_takes_the_input_as_it_was_in_fp8() -> None:
    """Rounded along the inputs, turned, rounded along the tokens: by hand."""
    x, grad = drawn(10, 300), drawn(10, 4, seed=1)
    again = quantize_rows(quantize_rows(x).dequantized().mT.contiguous()).dequantized()
    expected = quantize_rows(grad.mT.contiguous()).dequantized() @ again.mT
    torch.testing.assert_close(weight_gradient(grad, quantize_rows(x), "emulate"), expected)
    once = quantize_rows(grad.mT.contiguous()).dequantized() @ quantize_rows(x.mT.contiguous()).dequantized().mT
    assert not torch.equal(weight_gradient(grad, quantize_rows(x), "emulate"), once)


@needs_scaled_mm
@pytest.mark.parametrize("sizes", [(5, 7, 9), (12, 40, 300), (1, 16, 257)])
def test_on_the_device_equals_emulation(sizes: tuple[int, int, int]) -> None:
    """The same fp8 numbers in another order of sums."""
    rows, columns, inner = sizes
    a, square = quantize_rows(drawn(rows, inner)), quantize_tiles(drawn(columns, inner, seed=1))
    for b in (square, quantize_rows(drawn(columns, inner, seed=1)), quantize_tiles(drawn(inner, columns)).transposed()):
        expected = matmul(a, b, "emulate")
        torch.testing.assert_close(
            matmul(a, b, "scaled_mm"), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
        )


@needs_scaled_mm
def test_empty_products_on_the_device() -> None:
    full, none = quantize_rows(drawn(3, 20)), quantize_rows(drawn(0, 20))
    assert matmul(none, full, "scaled_mm").shape == (0, 3)
    assert matmul(full, none, "scaled_mm").shape == (3, 0)
    assert matmul(none, full, "emulate").shape == (0, 3)


def test_autocast_does_not_narrow_the_product() -> None:
    a, b = quantize_rows(drawn(20, 300)), quantize_tiles(drawn(30, 300, seed=1))
    expected = matmul(a, b, "emulate")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(matmul(a, b, "emulate"), expected)


def test_unequal_columns_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"got \(2, 3\) and \(2, 4\)"):
        matmul(quantize_rows(drawn(2, 3)), quantize_rows(drawn(2, 4)), "emulate")


def test_choice_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_backend(Fp8Config(), CPU) == "emulate"
    assert resolve_backend(Fp8Config(backend="emulate"), CPU) == "emulate"
    if not why_no_scaled_mm(CPU):
        assert resolve_backend(Fp8Config(backend="scaled_mm"), CPU) == "scaled_mm"

    def refuse(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no such units\nat line 3")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    with pytest.raises(ConfigError, match="does not run on cpu: no such units. Use 'emulate'"):
        resolve_backend(Fp8Config(backend="scaled_mm"), CPU)
    with pytest.raises(ConfigError, match="expected one of auto, emulate, scaled_mm"):
        Fp8Config(backend="cuda")  # type: ignore[arg-type]
