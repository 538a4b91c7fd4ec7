"""Routed experts in fp8: one function from tokens to the weighted sum of their experts, with a backward pass of its own.

    Y[t] = sum over chosen experts e of  down_e( p * swiglu(up_gate_e(x_t)) )

The router's weight p is multiplied in before the down projection, which is the same and needs no output of it in the backward pass.
Kept are the input in fp8, once per token and not once per expert, and the up/gate output or nothing of it (`Fp8Config.keep_up_gate`);
what lies between is computed again. Groups of tokens have any size: the last tile of a sum over tokens is just shorter.

Shape letters: T tokens, H hidden, I expert width, X = 2 I, E experts, n tokens of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ernie45.kernels.router import Routing, expert_groups
from ernie45.layers.linear import add_residual
from ernie45.layers.moe import Experts
from ernie45.training.fp8.config import Backend
from ernie45.training.fp8.products import hand_over, input_gradient, output, weight_gradient
from ernie45.training.fp8.scaled import Scaled, quantize_rows
from ernie45.training.fp8.swiglu import swiglu_gradient, swiglu_wide


class _Plan(NamedTuple):
    """Who computes what, and how."""

    rows: Tensor
    """int64: token of each entry, ordered by expert."""
    counts: Sequence[int]
    """Entries of each expert."""
    backend: Backend
    keep: bool
    """Keep the up/gate output for the backward pass."""


class _RoutedFfn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, up_gate_EXH: Tensor, down_EHI: Tensor, weights: Tensor, plan: _Plan) -> Tensor:
        """Args: weights: the router's, float32, of each entry of the plan."""
        x = quantize_rows(x_TH)
        out = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
        kept: list[Tensor] = []
        for expert, here in expert_groups(plan.counts):
            rows = plan.rows[here]
            up_gate = output(x.take(rows), up_gate_EXH[expert], plan.backend).to(x_TH.dtype)
            inner = quantize_rows(swiglu_wide(up_gate) * weights[here, None])
            out.index_add_(0, rows, output(inner, down_EHI[expert], plan.backend))
            kept += [up_gate] if plan.keep else []
        ctx.save_for_backward(x.values_RC, x.scales_rc, weights, *kept)
        ctx.parameters, ctx.plan, ctx.dtype = (up_gate_EXH, down_EHI), plan, x_TH.dtype
        return out.to(x_TH.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, scales, weights, *kept = ctx.saved_tensors
        x, plan, wants = Scaled(values, scales, 1), ctx.plan, ctx.needs_input_grad[1:3]
        x_grad = torch.zeros(values.shape, dtype=torch.float32, device=values.device)
        weights_grad = torch.zeros_like(weights)
        sums = [
            torch.zeros_like(parameter, dtype=torch.float32) if wanted else None
            for parameter, wanted in zip(ctx.parameters, wants, strict=True)
        ]
        for index, (expert, here) in enumerate(expert_groups(plan.counts)):
            rows = plan.rows[here]
            matrices = [parameter[expert] for parameter in ctx.parameters]
            mine = x.take(rows)
            up_gate = kept[index] if kept else output(mine, matrices[0], plan.backend).to(ctx.dtype)
            gradients = _expert_backward(
                mine, up_gate, weights[here], grads[0][rows], matrices, wants=wants, backend=plan.backend
            )
            x_grad.index_add_(0, rows, gradients.x)
            weights_grad[here] = gradients.weights
            for total, gradient in zip(sums, (gradients.up_gate, gradients.down), strict=True):
                if total is not None and gradient is not None:
                    total[expert] = gradient
        handed = [
            None if total is None else hand_over(parameter, total)
            for parameter, total in zip(ctx.parameters, sums, strict=True)
        ]
        return x_grad.to(ctx.dtype), *handed, weights_grad, None


class _Gradients(NamedTuple):
    """Of one expert, float32."""

    x: Tensor
    weights: Tensor
    up_gate: Tensor | None
    down: Tensor | None


def _expert_backward(
    x: Scaled,
    up_gate_nX: Tensor,
    weights: Tensor,
    grad_nH: Tensor,
    matrices: Sequence[Tensor],
    *,
    wants: Sequence[bool],
    backend: Backend,
) -> _Gradients:
    """Args: matrices: up/gate and down; wants: whether their gradients are asked for."""
    up_gate_XH, down_HI = matrices
    inner_nI = swiglu_wide(up_gate_nX)
    weighted_grad_nI = input_gradient(grad_nH, down_HI, backend)
    down_grad = None
    if wants[1]:
        down_grad = weight_gradient(grad_nH, quantize_rows(inner_nI * weights[:, None]), backend)
    outer_grad_nX = swiglu_gradient(up_gate_nX, weighted_grad_nI * weights[:, None])
    return _Gradients(
        x=input_gradient(outer_grad_nX, up_gate_XH, backend),
        weights=(weighted_grad_nI * inner_nI).sum(1),
        up_gate=weight_gradient(outer_grad_nX, x, backend) if wants[0] else None,
        down=down_grad,
    )


class Fp8Experts(Experts):
    """`layers.moe.Experts` with its six products in fp8; parameters and their names stay."""

    def __init__(
        self, up_gate_proj: nn.Parameter, down_proj: nn.Parameter, backend: Backend, *, keeps_products: bool
    ) -> None:
        nn.Module.__init__(self)  # not that of Experts, which would make new parameters
        self.up_gate_proj, self.down_proj = up_gate_proj, down_proj
        self.backend, self.keeps_products = backend, keeps_products

    def forward(self, x_TH: Tensor, routing: Routing, residual_TH: Tensor | None = None) -> Tensor:
        """Weighted sum of the chosen experts' outputs, plus `residual_TH`; no token is dropped. (T, H) in x's dtype."""
        plan = _Plan(routing.tokens.long(), routing.counts_E.tolist(), self.backend, self.keeps_products)
        apply: Any = _RoutedFfn.apply  # unannotated in torch
        out: Tensor = apply(x_TH, self.up_gate_proj, self.down_proj, routing.token_weights, plan)
        return add_residual(out, residual_TH)
