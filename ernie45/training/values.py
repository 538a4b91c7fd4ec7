"""The critic: how much reward is still to come, read from the residual stream by one linear layer.

Shape letters: L scored tokens, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ernie45.training.branches import BranchBatch
from ernie45.training.head import label_logprobs


class Critic(nn.Module):
    """A linear layer on the network's final norm, in float32; begins at 0, so that first values are 0 whatever the network says."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, normed_LH: Tensor) -> Tensor:
        """(L, H) -> (L,)."""
        with torch.autocast(normed_LH.device.type, enabled=False):
            return self.linear(normed_LH.float()).squeeze(-1)


def values_of(network: Any, critic: nn.Module, hidden_LH: Tensor) -> Tensor:
    """Values of residual states, (L, H) -> float32 (L,). Args: network: a `TrainingNetwork`."""
    values_L: Tensor = critic(network.final_norm(hidden_LH))
    return values_L


def logprobs_and_values(network: Any, batch: BranchBatch, critic: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Of every scored token its log-probability and the value before it, both (L,); None without a critic."""
    hidden_LH = network.run(batch).hidden_TH.index_select(0, batch.rows_L)
    logprobs_L = label_logprobs(network, hidden_LH, batch.labels_L)
    return logprobs_L, None if critic is None else values_of(network, critic, hidden_LH)
