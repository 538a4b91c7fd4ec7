"""Routed experts with an adapter each: the leaf that takes the place of all experts of a pool.

Shape letters: T tokens, H hidden, I expert width, K inputs, N outputs, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernie45.kernels.router import Routing, expert_groups
from ernie45.layers.linear import add_residual
from ernie45.training.lora.low_rank import LowRank

Factors = list[tuple[Tensor, Tensor]] | None
"""Each expert's A and B; None where nothing is added."""


class StackedExperts(Protocol):
    """Experts that hold their matrices stacked, as `layers.moe.Experts` does."""

    up_gate_proj: nn.Parameter
    """(E, 2 I, H)."""
    down_proj: nn.Parameter
    """(E, H, I)."""


class AdaptedExperts(nn.Module, ABC):
    """The weighted sum of the chosen experts, each with its share of the adapters; the frozen matrices are a subclass's.

    Tokens are taken by expert and sums run in float32 in the order of expert ids, as in `layers.moe.Experts`: while B is
    zero, the result has the same bits.
    """

    def __init__(self, up_gate: LowRank | None, down: LowRank | None) -> None:
        super().__init__()
        self.up_gate_lora, self.down_lora = up_gate, down
        self.enabled = True

    def forward(self, x_TH: Tensor, routing: Routing, residual_TH: Tensor | None = None) -> Tensor:
        """(T, H) -> (T, H), plus `residual_TH`."""
        rows, weights = routing.tokens.long(), routing.token_weights
        factors = _factors(self.up_gate_lora, self.enabled), _factors(self.down_lora, self.enabled)
        out = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
        for expert, here in expert_groups(routing.counts_E.tolist()):
            y_TH = self._expert(x_TH[rows[here]], expert, *factors)
            out.index_add_(0, rows[here], y_TH.float() * weights[here, None].to(x_TH.dtype).float())
        return add_residual(out.to(x_TH.dtype), residual_TH)

    @abstractmethod
    def up_gate_product(self, x_TH: Tensor, expert: int) -> Tensor:
        """What an expert's frozen first matrix gives: gate, then up, (T, 2 I)."""

    @abstractmethod
    def down_product(self, inner_TI: Tensor, expert: int) -> Tensor:
        """What an expert's frozen second matrix gives, (T, H)."""

    @abstractmethod
    def merged(self) -> nn.Module:
        """The plain experts with the adapters inside their weights."""

    def _expert(self, x_TH: Tensor, expert: int, up_gate: Factors, down: Factors) -> Tensor:
        both = _add(self.up_gate_lora, x_TH, self.up_gate_product(x_TH, expert), up_gate, expert)
        gate, up = both.chunk(2, dim=-1)
        inner_TI = F.silu(gate) * up
        return _add(self.down_lora, inner_TI, self.down_product(inner_TI, expert), down, expert)


def _factors(lora: LowRank | None, enabled: bool) -> Factors:
    return lora.of_experts() if lora is not None and enabled else None


def _add(lora: LowRank | None, x_TK: Tensor, y_TN: Tensor, factors: Factors, expert: int) -> Tensor:
    if lora is None or factors is None:
        return y_TN
    return (y_TN + lora.product(lora.dropped(x_TK), *factors[expert])).to(y_TN.dtype)


class LoraExperts(AdaptedExperts):
    """Over experts in floating point; `up_gate_proj` and `down_proj` keep their names."""

    def __init__(self, plain: StackedExperts, up_gate: LowRank | None, down: LowRank | None) -> None:
        super().__init__(up_gate, down)
        self.up_gate_proj, self.down_proj = plain.up_gate_proj, plain.down_proj
        self._plain = (plain,)  # not registered, see LoraLinear

    def up_gate_product(self, x_TH: Tensor, expert: int) -> Tensor:
        return F.linear(x_TH, self.up_gate_proj[expert])

    def down_product(self, inner_TI: Tensor, expert: int) -> Tensor:
        return F.linear(inner_TI, self.down_proj[expert])

    @torch.no_grad()
    def merged(self) -> nn.Module:
        for lora, weight_ENK in ((self.up_gate_lora, self.up_gate_proj), (self.down_lora, self.down_proj)):
            if lora is not None:
                for expert, weight_NK in enumerate(weight_ENK):
                    weight_NK.copy_(lora.merged(weight_NK, expert=expert))
        plain = self._plain[0]
        assert isinstance(plain, nn.Module), "what was replaced was a leaf"
        return plain
