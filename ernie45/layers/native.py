"""Leaves that compute with the kernels package: attention core, norm and router in float32 on the CPU.

They take the place of the plain PyTorch leaves in a network that is built (`use_kernel_leaves`); the network stays as it is. Which
kernels run, native or reference, is the kernels package's choice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ernie45.kernels import attention, norm, router
from ernie45.kernels.attention import KvPages
from ernie45.kernels.router import Routing
from ernie45.layers.attention import AttentionCore
from ernie45.layers.cache import AttentionView
from ernie45.layers.moe import Router
from ernie45.layers.norm import RMSNorm


class KernelRMSNorm(nn.Module):
    """`layers.norm.RMSNorm` in one call."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """(T, H) -> (T, H)."""
        return norm.rms_norm(x, self.weight, self.eps)


class KernelRouter(nn.Module):
    """`layers.moe.Router` in one call."""

    e_score_correction_bias: Tensor | None

    def __init__(self, plain: Router) -> None:
        super().__init__()
        self.num_active, self.norm_min = plain.num_active, plain.norm_min
        self.weight = plain.weight
        self.register_buffer("e_score_correction_bias", plain.e_score_correction_bias)

    def forward(self, x_TH: Tensor) -> Routing:
        """Choose experts for every token."""
        return router.route(x_TH, self.weight, self.e_score_correction_bias, self.num_active, self.norm_min)


class KernelAttentionCore(nn.Module):
    """`layers.attention.AttentionCore` in one call for all sequences: rotate, append, attend."""

    def __init__(self, plain: AttentionCore) -> None:
        super().__init__()
        self.layer_idx, self.scale = plain.layer_idx, plain.scale
        self.num_heads, self.num_kv_heads, self.head_dim = plain.num_heads, plain.num_kv_heads, plain.head_dim

    def forward(self, qkv_TX: Tensor, rotation_TJ: Tensor, view: AttentionView) -> Tensor:
        """(T, (N + 2 G) * D) -> (T, N * D)."""
        stores = view.stores[self.layer_idx] if view.keeps else self._passing_store(view)
        return attention.attend(qkv_TX, rotation_TJ, self.num_heads, stores, view.sequences, self.scale)

    def _passing_store(self, view: AttentionView) -> KvPages:
        """Keys and values that nobody keeps: one page per sequence, as long as the longest."""
        shape = (2, len(view.lengths), self.num_kv_heads, max(view.lengths), self.head_dim)
        keys, values = torch.empty(shape)
        return KvPages(keys_PGWD=keys, values_PGWD=values)


def can_use_kernels(head_dim: int) -> bool:
    """Whether the attention kernels take heads of this size."""
    return head_dim % 16 == 0 and head_dim <= attention.MAX_HEAD_DIM


def use_kernel_leaves(model: nn.Module) -> None:
    """Put the kernel leaves into a network of float32 activations, in place; leaves the vision encoder's alone."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, AttentionCore) and can_use_kernels(child.head_dim):
                setattr(parent, name, KernelAttentionCore(child))
            elif isinstance(child, RMSNorm):
                setattr(parent, name, KernelRMSNorm(child.weight, child.eps))
            elif isinstance(child, Router):
                setattr(parent, name, KernelRouter(child))
