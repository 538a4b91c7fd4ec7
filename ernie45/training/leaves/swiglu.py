"""The SwiGLU feed-forward block with a backward pass of its own.

Kept for the backward pass are the input and the products with gate and up (or the input alone); `silu(gate) * up`, cheap and
as large as half of the products, is computed again.

Shape letters: T tokens, H hidden, I feed-forward width, J = 2 I: gate first, then up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ernie45.kernels.swiglu import swiglu, swiglu_backward
from ernie45.layers.ffn import SwiGLU
from ernie45.layers.linear import Linear, add_residual
from ernie45.training.leaves.precision import product_dtype
from ernie45.training.leaves.scratch import scratch, take


class TrainingSwiGLU(SwiGLU):
    """`layers.ffn.SwiGLU`."""

    keeps_products: bool = True
    """Whether the products with gate and up wait for the backward pass or are computed again there."""

    def forward(self, x_TH: Tensor, residual_TH: Tensor | None = None) -> Tensor:
        """(T, H) -> (T, H), plus `residual_TH`."""
        up_gate, down = self.up_gate_proj, self.down_proj
        if type(up_gate) is nn.Linear and type(down) is Linear:
            dtype = product_dtype(x_TH)
            cast = (
                None if t is None else t.to(dtype) for t in (x_TH, up_gate.weight, up_gate.bias, down.weight, down.bias)
            )
            return add_residual(_FeedForward.apply(*cast, self.keeps_products), residual_TH)  # type: ignore[no-untyped-call]
        # Somebody has replaced a matrix, by one with an adapter or of a narrow format: theirs are the products.
        if self.keeps_products or not torch.is_grad_enabled():
            return add_residual(self._by_parts(x_TH), residual_TH)
        return add_residual(checkpoint(self._by_parts, x_TH, use_reentrant=False), residual_TH)

    def _by_parts(self, x_TH: Tensor) -> Tensor:
        return self.down_proj(_Activation.apply(self.up_gate_proj(x_TH)))  # type: ignore[no-untyped-call]


class _Activation(torch.autograd.Function):
    """`swiglu`, which keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, products_TJ: Tensor) -> Tensor:
        ctx.save_for_backward(products_TJ)
        return swiglu(products_TJ)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (products_TJ,) = ctx.saved_tensors
        return swiglu_backward(products_TJ, grads[0].clone(memory_format=torch.contiguous_format))


class _FeedForward(torch.autograd.Function):
    """The whole block; bias vectors may be None."""

    @staticmethod
    def forward(  # noqa: PLR0917  # torch hands inputs over by position
        ctx: Any,
        x_TH: Tensor,
        up_gate_JH: Tensor,
        up_gate_bias_J: Tensor | None,
        down_HI: Tensor,
        down_bias_H: Tensor | None,
        keeps_products: bool,
    ) -> Tensor:
        products_TJ = F.linear(x_TH, up_gate_JH, up_gate_bias_J)
        ctx.save_for_backward(x_TH, up_gate_JH, up_gate_bias_J, down_HI, products_TJ if keeps_products else None)
        with scratch():
            hidden_TI = swiglu(products_TJ, take(x_TH, len(x_TH), down_HI.shape[1]))
            return F.linear(hidden_TI, down_HI, down_bias_H)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, up_gate_JH, up_gate_bias_J, down_HI, products_TJ = ctx.saved_tensors
        needs_x, needs_up_gate, needs_up_gate_bias, needs_down, needs_down_bias, _ = ctx.needs_input_grad
        dy_TH = grads[0]
        if products_TJ is None:
            products_TJ = F.linear(x_TH, up_gate_JH, up_gate_bias_J)
        with scratch():
            hidden_TI = take(dy_TH, len(dy_TH), down_HI.shape[1])
            torch.mm(dy_TH, down_HI, out=hidden_TI)  # its gradient, until the next line
            d_products_TJ = swiglu_backward(products_TJ, hidden_TI, out_TJ=take(dy_TH, *products_TJ.shape))
            return (
                d_products_TJ @ up_gate_JH if needs_x else None,
                d_products_TJ.t() @ x_TH if needs_up_gate else None,
                d_products_TJ.sum(0) if needs_up_gate_bias else None,
                dy_TH.t() @ hidden_TI if needs_down else None,
                dy_TH.sum(0) if needs_down_bias else None,
                None,
            )
