"""Routed experts, forward and backward, over tokens ordered by expert: no padding, no token dropped.

The tokens of an expert stand behind each other, so each expert is three plain matrix products over its group, and everything
elementwise happens while the group is in the cache. What is kept for the backward pass is the block's input (not its copies, one
per chosen expert) and the products with gate and up, or the input alone. Outputs of experts are not kept: with
y = sum_k w_k D h_k the gradient of a weight is (D' dy) . h_k, which the backward pass has in its hands anyway.

Shape letters: T tokens, H hidden, E experts, K experts per token, I expert width, J = 2 I: gate first, then up; L = T K slots,
ordered by expert, then by token.
Source: training reference 2.3 (weights of the sum inside the expert, products of the activation computed again).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie45.kernels.router import Routing, expert_groups
from ernie45.kernels.swiglu import swiglu, swiglu_backward
from ernie45.layers.linear import add_residual
from ernie45.layers.moe import Experts
from ernie45.training.leaves.precision import product_dtype, sum_dtype
from ernie45.training.leaves.scratch import scratch, take


class TrainingExperts(Experts):
    """`layers.moe.Experts`."""

    keeps_products: bool = True
    """Whether the products with gate and up wait for the backward pass or are computed again there."""

    def forward(self, x_TH: Tensor, routing: Routing, residual_TH: Tensor | None = None) -> Tensor:
        """Weighted sum of the chosen experts' outputs in the order of expert ids, in float32, plus `residual_TH`."""
        dtype = product_dtype(x_TH)
        tokens_L = routing.tokens.long()
        # Every token stands in K slots; sorted by token they come in the order of expert ids.
        slots_TK = tokens_L.argsort(stable=True).view(routing.ids_TK.shape)
        out = _GroupedExperts.apply(  # type: ignore[no-untyped-call]
            x_TH.to(dtype),
            self.up_gate_proj.to(dtype),
            self.down_proj.to(dtype),
            routing.token_weights.to(dtype),
            tokens_L,
            slots_TK,
            routing.counts_E.tolist(),
            self.keeps_products,
        )
        return add_residual(out.to(x_TH.dtype), residual_TH)


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917  # torch hands inputs over by position
        ctx: Any,
        x_TH: Tensor,
        up_gate_EJH: Tensor,
        down_EHI: Tensor,
        weights_L: Tensor,
        tokens_L: Tensor,
        slots_TK: Tensor,
        counts: list[int],
        keeps_products: bool,
    ) -> Tensor:
        products_LJ = x_TH.new_empty(len(tokens_L), up_gate_EJH.shape[1]) if keeps_products else None
        ctx.save_for_backward(x_TH, up_gate_EJH, down_EHI, weights_L, tokens_L, slots_TK, products_LJ)
        ctx.counts = counts
        with scratch():
            outputs_LH = take(x_TH, len(tokens_L), x_TH.shape[1])
            x_LH = take(x_TH, max(counts), x_TH.shape[1])
            hidden_LI = take(x_TH, max(counts), down_EHI.shape[2])
            if products_LJ is None:
                products_LJ = take(x_TH, max(counts), up_gate_EJH.shape[1])
            for expert, here in expert_groups(counts):
                products = products_LJ[here] if keeps_products else products_LJ[: counts[expert]]
                x = torch.index_select(x_TH, 0, tokens_L[here], out=x_LH[: counts[expert]])
                torch.mm(x, up_gate_EJH[expert].t(), out=products)
                hidden = swiglu(products, hidden_LI[: counts[expert]])
                torch.mm(hidden, down_EHI[expert].t(), out=outputs_LH[here])
            return _sum_of_slots(outputs_LH, slots_TK, weights_L)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, up_gate_EJH, down_EHI, weights_L, tokens_L, slots_TK, products_LJ = ctx.saved_tensors
        needs_x, needs_up_gate, needs_down, needs_weights = ctx.needs_input_grad[:4]
        dy_TH, weights_L = grads[0].to(x_TH.dtype), weights_L.detach()
        d_up_gate_EJH = torch.empty_like(up_gate_EJH) if needs_up_gate else None
        d_down_EHI = torch.empty_like(down_EHI) if needs_down else None
        d_weights_L = torch.empty_like(weights_L) if needs_weights else None
        with scratch():
            d_x_LH = take(x_TH, len(tokens_L), x_TH.shape[1]) if needs_x else None
            x_LH, dy_LH = (take(x_TH, max(ctx.counts), x_TH.shape[1]) for _ in range(2))
            hidden_LI = take(x_TH, max(ctx.counts), down_EHI.shape[2])
            again_LJ, d_products_LJ = (take(x_TH, max(ctx.counts), up_gate_EJH.shape[1]) for _ in range(2))
            for expert, here in expert_groups(ctx.counts):
                count = ctx.counts[expert]
                x = torch.index_select(x_TH, 0, tokens_L[here], out=x_LH[:count])
                dy = torch.index_select(dy_TH, 0, tokens_L[here], out=dy_LH[:count])
                products = again_LJ[:count] if products_LJ is None else products_LJ[here]
                if products_LJ is None:
                    torch.mm(x, up_gate_EJH[expert].t(), out=products)
                hidden = torch.mm(dy, down_EHI[expert], out=hidden_LI[:count])  # its gradient, until the next line
                dots = None if d_weights_L is None else d_weights_L[here]
                d_products = swiglu_backward(products, hidden, weights_L[here], dots, d_products_LJ[:count])
                if d_down_EHI is not None:
                    torch.mm(dy.t(), hidden, out=d_down_EHI[expert])
                if d_up_gate_EJH is not None:
                    torch.mm(d_products.t(), x, out=d_up_gate_EJH[expert])
                if d_x_LH is not None:
                    torch.mm(d_products, up_gate_EJH[expert], out=d_x_LH[here])
            d_x_TH = None if d_x_LH is None else _sum_of_slots(d_x_LH, slots_TK).to(x_TH.dtype)
        for gradient in (d_up_gate_EJH, d_down_EHI):
            _clear_unused(gradient, ctx.counts)
        return d_x_TH, d_up_gate_EJH, d_down_EHI, d_weights_L, None, None, None, None


def _sum_of_slots(values_LH: Tensor, slots_TK: Tensor, weights_L: Tensor | None = None) -> Tensor:
    """Each token's (weighted) sum over its slots, in their order; float32 or wider, (T, H).

    One pass that reads every slot once; index_add would take the rows one by one.
    """
    wide_LH = values_LH.to(sum_dtype(values_LH.dtype))
    weights_TK = None if weights_L is None else weights_L.to(wide_LH.dtype)[slots_TK]
    return F.embedding_bag(slots_TK, wide_LH, per_sample_weights=weights_TK, mode="sum")


def _clear_unused(gradient_E: Tensor | None, counts: list[int]) -> None:
    """Zero for experts without tokens: nothing was written there."""
    for expert, count in enumerate(counts):
        if gradient_E is not None and not count:
            gradient_E[expert].zero_()
