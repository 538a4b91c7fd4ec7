"""Grouped-query attention over packed sequences.

Shape letters: B sequences, T tokens (packed), H hidden, N query heads, G key/value heads, R = N / G query heads per
key/value head, D head size. Source: architecture reference 2.2.

`AttentionCore` (rotation, cache and attention) is the leaf that native kernels and an engine replace; `Attention` stays
as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernie45.config.model import ModelConfig
from ernie45.layers.cache import AttentionView
from ernie45.layers.linear import Linear
from ernie45.layers.rope import apply_rotary


class AttentionCore(nn.Module):
    """Rotary embedding and softmax attention; scores and sums in float32 (inside the fused kernel for narrow dtypes)."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5

    def forward(self, qkv_TX: Tensor, rotation_TJ: Tensor, view: AttentionView) -> Tensor:
        """Rotate, append keys and values to the caches of `view`, attend within each of its sequences.

        Args: qkv_TX: projected queries, keys and values, (T, (N + 2 G) * D). rotation_TJ: complex rotation of each
            token, from `rotary_rotation`. Returns: (T, N * D).
        """
        heads = qkv_TX.unflatten(-1, (-1, self.head_dim))
        qk = apply_rotary(heads[:, : self.num_heads + self.num_kv_heads], rotation_TJ)
        q, k = qk.split((self.num_heads, self.num_kv_heads), dim=1)
        return self._attend(q, k, heads[:, -self.num_kv_heads :], view).flatten(1)

    def _attend(self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, view: AttentionView) -> Tensor:
        if view.caches is None:
            return self._without_cache(q_TND, k_TGD, v_TGD, view.lengths)
        outputs = []
        parts = (tensor.split(view.lengths) for tensor in (q_TND, k_TGD, v_TGD))
        for q, k, v, cache in zip(*parts, view.caches, strict=True):
            # A cache of another dtype rounds, and every chunk of a prompt must see what later steps will see.
            k, v = (fresh.to(cache.dtype).to(fresh.dtype) for fresh in (k, v))  # noqa: PLW2901
            if cache.length == 0:
                cache.write(self.layer_idx, k, v)
                outputs.append(self._without_cache(q, k, v, (len(q),)))
            else:
                outputs.append(self._behind_cache(q, *cache.write(self.layer_idx, k, v)))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _without_cache(self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, lengths: tuple[int, ...]) -> Tensor:
        if len(set(lengths)) > 1:
            parts = zip(q_TND.split(lengths), k_TGD.split(lengths), v_TGD.split(lengths), strict=True)
            return torch.cat([self._without_cache(q, k, v, (len(q),)) for q, k, v in parts])
        # Equal lengths: one call over (B, heads, T / B, D).
        q, k, v = (tensor.unflatten(0, (len(lengths), -1)).transpose(1, 2) for tensor in (q_TND, k_TGD, v_TGD))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    def _behind_cache(self, q_TND: Tensor, k_GSD: Tensor, v_GSD: Tensor) -> Tensor:
        """Queries of the last T of S tokens; a group's query heads become rows, so its keys are read once."""
        num_new, num_all = q_TND.shape[0], k_GSD.shape[1]
        num_groups = k_GSD.shape[0]
        k_GSD, v_GSD = k_GSD.to(q_TND.dtype), v_GSD.to(q_TND.dtype)
        rows = q_TND.unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)  # (G, R * T, D)
        mask = None
        if num_new > 1:
            last_visible = torch.arange(num_all - num_new, num_all, device=q_TND.device)
            mask = torch.arange(num_all, device=q_TND.device) <= last_visible[:, None]
            mask = mask.repeat(rows.shape[1] // num_new, 1)
        out = F.scaled_dot_product_attention(rows[None], k_GSD[None], v_GSD[None], attn_mask=mask, scale=self.scale)
        return out[0].unflatten(1, (-1, num_new)).permute(2, 0, 1, 3).flatten(1, 2)


class Attention(nn.Module):
    """Projections, rotary embedding and attention core of one layer.

    `qkv_proj` holds the rows of the published q_proj, k_proj and v_proj one below the other (the -Paddle files store
    them fused as well): one matrix product instead of three.
    """

    def __init__(self, config: ModelConfig, layer_idx: int, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, width + 2 * kv_width, bias=config.use_bias, dtype=dtype)
        self.o_proj = Linear(width, config.hidden_size, bias=config.use_bias, dtype=dtype)
        self.core = AttentionCore(config, layer_idx)

    def forward(
        self, hidden_TH: Tensor, rotation_TJ: Tensor, view: AttentionView, residual_TH: Tensor | None = None
    ) -> Tensor:
        """Args: rotation_TJ: complex rotation of each token, from `rotary_rotation`. residual_TH: added to the result.
        Returns (T, H).
        """
        part: dict[str, Any] = self._modules  # why: see DecoderLayer
        attended_TX = part["core"](part["qkv_proj"](hidden_TH), rotation_TJ, view)
        out: Tensor = part["o_proj"](attended_TX, residual_TH=residual_TH)
        return out
