"""The norm with a backward pass of its own: it keeps its input, which the residual stream keeps anyway, and one number per token.

Shape letters: T tokens, H hidden. With n = x / rms(x) and y = n w: dw = sum_T dy n and
dx = (dy w - n mean_H(dy w n)) / rms(x).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ernie45.layers.norm import RMSNorm
from ernie45.training.leaves.precision import sum_dtype


class TrainingRMSNorm(RMSNorm):
    """`layers.norm.RMSNorm`; the squares are added in another order."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return _RmsNorm.apply(x, self.weight, self.eps)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """`1 / sqrt(mean(x^2) + eps)` of the last dimension, kept as one of size 1; float32 or wider."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=sum_dtype(x.dtype))
    return torch.rsqrt(length.square_().div_(x.shape[-1]).add_(eps))


def scaled(x: Tensor, rstd: Tensor, weight_H: Tensor) -> Tensor:
    """`x * rstd` rounded to x's dtype, times the weight."""
    normed = (x.to(rstd.dtype) * rstd).to(x.dtype)
    return normed.mul_(weight_H) if normed.dtype == weight_H.dtype else weight_H * normed


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        rstd = inverse_rms(x, eps)
        ctx.save_for_backward(x, weight_H, rstd)
        return scaled(x, rstd, weight_H)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_H, rstd = ctx.saved_tensors
        dy, weight = grads[0].to(rstd.dtype), weight_H.to(rstd.dtype)
        normed = x.to(rstd.dtype) * rstd
        product = dy * normed
        d_weight = d_x = None
        if ctx.needs_input_grad[1]:
            d_weight = product.flatten(0, -2).sum(0).to(weight_H.dtype)
        if ctx.needs_input_grad[0]:
            share = (product @ weight).div_(x.shape[-1])[..., None]
            d_x = (dy * weight).addcmul_(normed, share, value=-1).mul_(rstd).to(x.dtype)
        return d_x, d_weight, None
