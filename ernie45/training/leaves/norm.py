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

_BLOCK_VALUES = 1 << 18
"""Values of a block of rows in the backward pass: its seven passes then run in the cache."""


class TrainingRMSNorm(RMSNorm):
    """`layers.norm.RMSNorm`; the squares are added in another order."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return _RmsNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]


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
        needs_x, needs_weight, _ = ctx.needs_input_grad
        weight = weight_H.to(rstd.dtype)
        d_x = torch.empty_like(x)
        d_weight = torch.zeros_like(weight)
        size = max(_BLOCK_VALUES // len(weight), 1)
        parts = (tensor.flatten(0, -2).split(size) for tensor in (x, rstd, grads[0], d_x))
        for x_n, rstd_n, dy_n, d_x_n in zip(*parts, strict=True):
            dy = dy_n.to(rstd.dtype)
            normed = x_n.to(rstd.dtype) * rstd_n
            product = dy * normed
            if needs_weight:
                d_weight.addmv_(product.t(), product.new_ones(len(product)))
            if needs_x:
                share = torch.mv(product, weight).div_(len(weight))[:, None]
                d_x_n.copy_((dy * weight).addcmul_(normed, share, value=-1).mul_(rstd_n))
        return d_x if needs_x else None, d_weight.to(weight_H.dtype) if needs_weight else None, None
