"""Linear layers with an adapter: the leaf that takes a linear layer's place.

Parameters keep their names: `X.weight` and `X.bias` are those of the layer that was there, `X.lora.lora_A` and `X.lora.lora_B`
come with the adapter. Shape letters: T tokens, N rows (outputs), K columns (inputs).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernie45.layers.linear import add_residual
from ernie45.training.lora.low_rank import LowRank


class LoraLinear(nn.Module):
    """`x W^T + bias` plus the adapter's share, with frozen W."""

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, plain: nn.Linear, lora: LowRank) -> None:
        super().__init__()
        self.weight, self.bias = plain.weight, plain.bias
        self.lora = lora
        self.enabled = True
        # Not registered: its parameters are this leaf's, and merging puts it back.
        self._plain = (plain,)

    def forward(self, x_TK: Tensor, residual_TH: Tensor | None = None) -> Tensor:
        """(T, K) -> (T, N), plus `residual_TH`."""
        y_TN = self.product(x_TK)
        if self.enabled:
            y_TN = self._adapted(x_TK, y_TN).to(y_TN.dtype)
        return add_residual(y_TN, residual_TH)

    def product(self, x_TK: Tensor) -> Tensor:
        """The frozen layer's output."""
        return F.linear(x_TK, self.weight, self.bias)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The plain layer with the adapter inside its weight, which keeps its dtype."""
        self.weight.copy_(self.lora.merged(self.weight))
        return self._plain[0]

    def _adapted(self, x_TK: Tensor, y_TN: Tensor) -> Tensor:
        seen_TK = self.lora.dropped(x_TK)
        if self.lora.magnitude is None:
            return y_TN + self.lora(seen_TK)
        # DoRA: every row of the sum is brought to its learnt length. The length that it has counts as a constant (section 4.3
        # of the paper), and the bias is no part of it. The frozen matrix sees the input after dropout, as the adapter does.
        with torch.no_grad():
            length_N = torch.linalg.vector_norm(self.lora.added(self.weight), dim=1)
        share_N = self.lora.magnitude / length_N
        return y_TN + (share_N - 1) * F.linear(seen_TK, self.weight) + share_N * self.lora(seen_TK)
