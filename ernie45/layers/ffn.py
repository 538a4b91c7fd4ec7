"""The SwiGLU feed-forward block of dense layers and shared experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernie45.layers.linear import Linear


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`.

    `up_gate_proj` holds the gate's rows first, then the up rows, as the fused -Paddle tensor of that name does (its
    name notwithstanding). Source: architecture reference 2.4 and 4.3.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.up_gate_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=bias, dtype=dtype)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias, dtype=dtype)

    def forward(self, x_TH: Tensor, residual_TH: Tensor | None = None) -> Tensor:
        """(T, H) -> (T, H), plus `residual_TH`."""
        gate, up = self.up_gate_proj(x_TH).chunk(2, dim=-1)
        out: Tensor = self.down_proj(F.silu(gate) * up, residual_TH=residual_TH)
        return out
