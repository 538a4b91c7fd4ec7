"""Linear layers and the dense feed-forward layer in fp8.

Shape letters: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ernie45.layers.ffn import SwiGLU
from ernie45.layers.linear import Linear, add_residual
from ernie45.training.fp8.config import Backend
from ernie45.training.fp8.products import hand_over, input_gradient, output, weight_gradient
from ernie45.training.fp8.scaled import Scaled, quantize_rows
from ernie45.training.fp8.swiglu import swiglu


class _Product(torch.autograd.Function):
    """X W^T + b; keeps the input in fp8, and only if the weight learns."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, backend: Backend) -> Tensor:
        x = quantize_rows(x_TK)
        ctx.weight, ctx.bias, ctx.backend, ctx.dtype = weight_NK, bias_N, backend, x_TK.dtype
        ctx.save_for_backward(*((x.values_RC, x.scales_rc) if ctx.needs_input_grad[1] else ()))
        y_TN = output(x, weight_NK, backend)
        return (y_TN if bias_N is None else y_TN + bias_N.float()).to(x_TK.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TN,) = grads
        x_grad = weight_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = input_gradient(grad_TN, ctx.weight, ctx.backend).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            values, scales = ctx.saved_tensors
            wide = weight_gradient(grad_TN, Scaled(values, scales, 1), ctx.backend)
            weight_grad = hand_over(ctx.weight, wide)
        if ctx.needs_input_grad[2]:
            bias_grad = hand_over(ctx.bias, grad_TN.float().sum(0))
        return x_grad, weight_grad, bias_grad, None


class Fp8Linear(Linear):
    """`layers.linear.Linear` with its three products in fp8; parameters and their names stay."""

    def __init__(self, plain: nn.Linear, backend: Backend) -> None:
        nn.Module.__init__(self)  # not Linear's own, which would draw new weights
        self.in_features, self.out_features, self.backend = plain.in_features, plain.out_features, backend
        self.weight, self.bias = plain.weight, plain.bias

    def forward(self, input: Tensor, residual_TH: Tensor | None = None) -> Tensor:
        """(T, K) -> (T, N) in the input's dtype, plus `residual_TH` (T, N)."""
        apply: Any = _Product.apply  # unannotated in torch
        y_TN: Tensor = apply(input, self.weight, self.bias, self.backend)
        return add_residual(y_TN, residual_TH)


class Fp8SwiGLU(SwiGLU):
    """`layers.ffn.SwiGLU` with linear layers in fp8; of the values between them only the up/gate output is kept, or nothing."""

    def __init__(
        self, up_gate_proj: nn.Linear, down_proj: nn.Linear, backend: Backend, *, keeps_products: bool
    ) -> None:
        nn.Module.__init__(self)
        self.up_gate_proj, self.down_proj = Fp8Linear(up_gate_proj, backend), Fp8Linear(down_proj, backend)
        self.keeps_products = keeps_products

    def forward(self, x_TH: Tensor, residual_TH: Tensor | None = None) -> Tensor:
        """(T, H) -> (T, H), plus `residual_TH`."""
        if self.keeps_products or not torch.is_grad_enabled():
            return add_residual(self._by_parts(x_TH), residual_TH)
        return add_residual(checkpoint(self._by_parts, x_TH, use_reentrant=False), residual_TH)

    def _by_parts(self, x_TH: Tensor) -> Tensor:
        out: Tensor = self.down_proj(swiglu(self.up_gate_proj(x_TH)))
        return out
