"""Root-mean-square norm in float32, with or without the addition of a residual before it.

Shape letters: T tokens, H hidden. The native twin is in `csrc/kernels/elementwise.cpp`; bytes moved: each input once, each
output once. The native module checks what it is given by itself; the checks here say what was wrong with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.kernels.check import check_tensor
from ernie45.kernels.choice import native


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`.

    Args: x_TH, weight_H: float32, contiguous, on the CPU. Returns: float32 (T, H).
    Raises: ShapeError for other shapes, dtypes, devices or strides.
    """
    extension = native()
    if extension is None:
        _check("rms_norm", x_TH, weight_H)
        return rms_norm_reference(x_TH, weight_H, eps)
    y = torch.empty_like(x_TH)
    try:
        extension.rms_norm(x_TH, weight_H, eps, y)
    except (TypeError, ValueError) as error:
        _check("rms_norm", x_TH, weight_H)
        raise ShapeError(str(error)) from error
    return y


def add_rms_norm(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of `x + residual`, and the sum itself, which is the next residual.

    Args: as for `rms_norm`; residual_TH like x_TH. Returns: norm and sum, float32 (T, H).
    Raises: ShapeError for other shapes, dtypes, devices or strides.
    """
    extension = native()
    if extension is None:
        _check("add_rms_norm", x_TH, weight_H, residual_TH)
        return add_rms_norm_reference(x_TH, residual_TH, weight_H, eps)
    y, total = torch.empty_like(x_TH), torch.empty_like(x_TH)
    try:
        extension.rms_norm(x_TH, weight_H, eps, y, residual_TH, total)
    except (TypeError, ValueError) as error:
        _check("add_rms_norm", x_TH, weight_H, residual_TH)
        raise ShapeError(str(error)) from error
    return y, total


def rms_norm_reference(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """What `rms_norm` computes; differs from the native twin by the order in which the squares are added."""
    return x_TH * torch.rsqrt(x_TH.square().mean(-1, keepdim=True) + eps) * weight_H


def add_rms_norm_reference(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What `add_rms_norm` computes; the sum is exact to the bit."""
    total = x_TH + residual_TH
    return rms_norm_reference(total, weight_H, eps), total


def _check(operation: str, x_TH: Tensor, weight_H: Tensor, residual_TH: Tensor | None = None) -> None:
    width = x_TH.shape[-1] if x_TH.ndim else 0
    check_tensor(operation, "x", x_TH, (len(x_TH) if x_TH.ndim else 0, width))
    check_tensor(operation, "weight", weight_H, (width,))
    if residual_TH is not None:
        check_tensor(operation, "residual", residual_TH, tuple(x_TH.shape))
