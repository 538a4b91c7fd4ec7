"""The linear layer in front of the residual stream."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` that ends in the addition of a residual: a leaf with a kernel of its own does both in one pass."""

    def forward(self, input: Tensor, residual_TH: Tensor | None = None) -> Tensor:
        """(T, K) -> (T, N), plus `residual_TH` (T, N)."""
        return add_residual(F.linear(input, self.weight, self.bias), residual_TH)


def add_residual(y_TH: Tensor, residual_TH: Tensor | None) -> Tensor:
    """The sum, or `y_TH` alone; what every leaf that takes a residual does last."""
    return y_TH if residual_TH is None else residual_TH + y_TH
