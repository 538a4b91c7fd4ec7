"""`silu(gate) * up`, which keeps nothing but its input for the backward pass; computed in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def swiglu_wide(up_gate_TX: Tensor) -> Tensor:
    """(T, 2 I), gate first -> float32 (T, I)."""
    gate, up = up_gate_TX.float().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def swiglu_gradient(up_gate_TX: Tensor, grad_TI: Tensor) -> Tensor:
    """Gradient with respect to gate and up, float32 (T, 2 I)."""
    gate, up = up_gate_TX.float().chunk(2, dim=-1)
    share = gate.sigmoid()
    wide = grad_TI.float()
    return torch.cat((wide * up * share * (1 + gate * (1 - share)), wide * gate * share), dim=-1)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, up_gate_TX: Tensor) -> Tensor:
        ctx.save_for_backward(up_gate_TX)
        return swiglu_wide(up_gate_TX).to(up_gate_TX.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (up_gate_TX,) = ctx.saved_tensors
        return swiglu_gradient(up_gate_TX, grads[0]).to(up_gate_TX.dtype)


def swiglu(up_gate_TX: Tensor) -> Tensor:
    """(T, 2 I), gate first -> (T, I) in the same dtype."""
    apply: Any = _SwiGlu.apply  # unannotated in torch
    out: Tensor = apply(up_gate_TX)
    return out
