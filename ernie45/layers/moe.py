"""Router, routed experts and the mixture-of-experts block, with one pool of experts or two.

Shape letters: T tokens, H hidden, E experts per pool, K experts per token, I expert width.
Source: architecture reference 2.5 (routing), 3.6 (text and vision pools).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernie45.config.model import ModelConfig, MoeConfig
from ernie45.errors import ShapeError
from ernie45.kernels.router import Routing, expert_groups, order_by_expert
from ernie45.layers.ffn import SwiGLU
from ernie45.layers.linear import add_residual


def route(logits_TE: Tensor, bias_E: Tensor | None, num_active: int, norm_min: float) -> tuple[Tensor, Tensor]:
    """Choose experts for every token; the bias steers the choice but not the weights.

    Args: logits_TE: router output, float32. bias_E: correction bias, float32 (E,), or None. num_active: K. norm_min:
        lower bound of the sum that the chosen probabilities are divided by.
    Returns: weights, float32 (T, K), rows sum to 1; ids, int64 (T, K), best first.
    Raises: ShapeError if `bias_E` has not E entries.
    """
    probs = logits_TE.softmax(-1)
    scores = probs
    if bias_E is not None:
        if bias_E.shape != logits_TE.shape[-1:]:
            raise ShapeError(f"correction bias has shape {tuple(bias_E.shape)}, expected ({logits_TE.shape[-1]},)")
        scores = probs + bias_E
    ids_TK = scores.topk(num_active, dim=-1).indices
    chosen = probs.gather(-1, ids_TK)
    return chosen / chosen.sum(-1, keepdim=True).clamp(min=norm_min), ids_TK


class Router(nn.Module):
    """The gate of one pool, in float32 throughout: bfloat16 routing was seen to cost accuracy."""

    e_score_correction_bias: Tensor | None

    def __init__(self, hidden_size: int, moe: MoeConfig) -> None:
        super().__init__()
        self.num_active, self.norm_min = moe.moe_k, moe.moe_norm_min
        self.weight = nn.Parameter(torch.empty(moe.moe_num_experts, hidden_size, dtype=torch.float32))
        # A buffer: balance training moves it by rule, never by gradient.
        bias = torch.zeros(moe.moe_num_experts, dtype=torch.float32) if moe.moe_use_aux_free else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_TH: Tensor) -> Routing:
        """Choose experts for every token; gradients pass through both forms of the weights."""
        with torch.autocast(x_TH.device.type, enabled=False):
            logits = F.linear(x_TH.float(), self.weight.float())
            bias = self.e_score_correction_bias
            weights, ids = route(logits, None if bias is None else bias.float(), self.num_active, self.norm_min)
            return order_by_expert(weights, ids, len(self.weight))


class Experts(nn.Module):
    """All routed experts of one pool, stacked. Routed experts have no bias vectors in any published model."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.up_gate_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size, dtype=dtype))

    def forward(self, x_TH: Tensor, routing: Routing, residual_TH: Tensor | None = None) -> Tensor:
        """Weighted sum of the chosen experts' outputs, plus `residual_TH`.

        Tokens are taken by expert and no token is dropped. Sums run in float32 in the order of expert ids, so a
        token's result does not depend on its neighbours in the batch. Returns (T, H) in x's dtype.
        """
        rows, weights = routing.tokens.long(), routing.token_weights
        out = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
        for expert, here in expert_groups(routing.counts_E.tolist()):
            gate, up = F.linear(x_TH[rows[here]], self.up_gate_proj[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down_proj[expert])
            out = out.index_add(0, rows[here], y.float() * weights[here, None].to(x_TH.dtype).float())
        return add_residual(out.to(x_TH.dtype), residual_TH)


class MoeBlock(nn.Module):
    """Routed and shared experts of one layer.

    In a vision-language model every token is routed inside the pool of its modality only; shared experts serve all
    tokens.
    """

    def __init__(self, config: ModelConfig, moe: MoeConfig, dtype: torch.dtype) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.gate = Router(hidden, moe)
        self.experts = Experts(moe.moe_num_experts, hidden, moe.moe_intermediate_size, dtype)
        self.vision_gate = Router(hidden, moe) if moe.has_vision_pool else None
        self.vision_experts = (
            Experts(moe.moe_num_experts, hidden, moe.moe_vision_intermediate_size, dtype)
            if moe.has_vision_pool
            else None
        )
        self.shared_experts = (
            SwiGLU(hidden, moe.shared_intermediate_size, bias=config.use_bias, dtype=dtype)
            if moe.moe_num_shared_experts
            else None
        )

    def forward(self, x_TH: Tensor, vision_mask_T: Tensor | None = None, residual_TH: Tensor | None = None) -> Tensor:
        """Args: vision_mask_T: bool, True for tokens of the vision pool; None: all are text. residual_TH: added to the
        result. Returns (T, H).
        """
        part: dict[str, Any] = self._modules  # why: see DecoderLayer
        gate, experts, shared_experts = part["gate"], part["experts"], part.get("shared_experts")
        out: Tensor
        if vision_mask_T is None and shared_experts is None:
            out = experts(x_TH, gate(x_TH), residual_TH=residual_TH)
            return out
        out = experts(x_TH, gate(x_TH)) if vision_mask_T is None else self._two_pools(x_TH, vision_mask_T)
        if shared_experts is not None:
            out = shared_experts(x_TH, residual_TH=out)
        # Last, so that a narrow dtype rounds the block's own sum before it meets the larger residual, as published.
        return add_residual(out, residual_TH)

    def _two_pools(self, x_TH: Tensor, vision_mask_T: Tensor) -> Tensor:
        if self.vision_gate is None or self.vision_experts is None:
            raise ShapeError("vision tokens were passed to a model without vision experts")
        routed = torch.empty_like(x_TH)
        for mask, gate, experts in (
            (~vision_mask_T, self.gate, self.experts),
            (vision_mask_T, self.vision_gate, self.vision_experts),
        ):
            rows = mask.nonzero().flatten()
            if len(rows):
                x = x_TH[rows]
                routed = routed.index_copy(0, rows, experts(x, gate(x)))
        return routed
