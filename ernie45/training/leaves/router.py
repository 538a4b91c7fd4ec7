"""The router as training sees it: it remembers what its losses need of the pass that is under way.

Shape letters: T tokens, H hidden, E experts, K experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie45.kernels.router import Routing, order_by_expert
from ernie45.layers.moe import Router, route


class TrainingRouter(Router):
    """`layers.moe.Router`, which keeps its logits while it is asked to.

    Recomputation calls it again in the backward pass, when nobody asks: a pass is recorded once.
    """

    recording: bool = False
    """Whether the next call is recorded."""
    recorded: tuple[Tensor, Tensor] | None = None
    """Logits, float32 (T, E), with gradient, and the experts used, int64 (T, K), of the last recorded call."""

    def forward(self, x_TH: Tensor) -> Routing:
        """Choose experts for every token, in float32 whatever autocast says."""
        with torch.autocast(x_TH.device.type, enabled=False):
            logits_TE = F.linear(x_TH.float(), self.weight.float())
            bias = self.e_score_correction_bias
            weights, ids = route(logits_TE, None if bias is None else bias.float(), self.num_active, self.norm_min)
            routing = order_by_expert(weights, ids, len(self.weight))
        if self.recording:
            self.recorded = logits_TE, ids
        return routing

    def take(self) -> tuple[Tensor, Tensor] | None:
        """What was recorded; it is forgotten, because it holds the graph of its pass."""
        recorded, self.recorded, self.recording = self.recorded, None, False
        return recorded
