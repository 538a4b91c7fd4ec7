"""Attention over packed documents for training, and the view of documents that continue others.

Documents of the same length are one call, the others one call each; none is padded. Kept for the backward pass are the rotated
projection, the attended values and one number per token and head.

Shape letters: B documents of one length, T tokens (packed), n tokens of a document, N query heads, G key/value heads, D head
size, J = D / 2, X = (N + 2 G) D.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.layers.attention import AttentionCore
from ernie45.layers.cache import AttentionView


@dataclass(frozen=True, kw_only=True)
class BranchedView(AttentionView):
    """Sequences that may continue an earlier one of the same step: answers that share a prompt which is computed once.

    A token sees all tokens of the sequences that its own continues, its own sequence up to itself, and nothing else.
    """

    parents: tuple[int | None, ...]
    """The sequence that stands before each, an earlier one of the view; None where a sequence begins by itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.caches is not None or len(self.parents) != len(self.lengths):
            raise ShapeError(
                f"{len(self.lengths)} sequences with {len(self.parents)} parents and "
                f"{'no' if self.caches is None else 'some'} caches, expected as many parents and no caches"
            )
        for sequence, parent in enumerate(self.parents):
            if parent is not None and not 0 <= parent < sequence:
                raise ShapeError(f"sequence {sequence} continues sequence {parent}, expected one before it")

    @cached_property
    def ancestors(self) -> tuple[tuple[int, ...], ...]:
        """The sequences before each, first to last."""
        found: list[tuple[int, ...]] = []
        for parent in self.parents:
            found.append(() if parent is None else (*found[parent], parent))
        return tuple(found)

    @cached_property
    def masks(self) -> tuple[Tensor | None, ...]:
        """What is added to the scores of each sequence that continues another: float32 (own tokens, tokens before and own)."""
        return tuple(
            _continuing(own, before) if before else None
            for own, before in zip(self.lengths, self._starts(), strict=True)
        )

    def _starts(self) -> list[int]:
        return [sum(self.lengths[i] for i in before) for before in self.ancestors]


class TrainingAttentionCore(AttentionCore):
    """`layers.attention.AttentionCore`; a view with caches runs as there."""

    def forward(self, qkv_TX: Tensor, rotation_TJ: Tensor, view: AttentionView) -> Tensor:
        """Rotate, and attend within each sequence of `view` and those that it continues, (T, X) -> (T, N D)."""
        if view.caches is not None:
            return super().forward(qkv_TX, rotation_TJ, view)
        rotated_TX = _Rotate.apply(qkv_TX, rotation_TJ, self.num_heads + self.num_kv_heads)
        lengths = view.lengths
        if not isinstance(view, BranchedView) and len(set(lengths)) == 1:
            return self._attend_within(rotated_TX.unflatten(0, (len(lengths), -1))).flatten(0, 1)
        documents = rotated_TX.split(lengths)
        outputs: dict[int, Tensor] = {}
        for group in _by_length(view):
            attended = self._attend_within(torch.stack([documents[i] for i in group]))
            outputs |= zip(group, attended, strict=True)
        if isinstance(view, BranchedView):
            for i in range(len(lengths)):
                if i not in outputs:
                    outputs[i] = self._attend_behind([documents[j] for j in (*view.ancestors[i], i)], view.masks[i])
        return torch.cat([outputs[i] for i in range(len(lengths))])

    def _attend_within(self, rotated_BnX: Tensor) -> Tensor:
        """Documents of one length, each causal, (B, n, X) -> (B, n, N D)."""
        q, k, v = self._heads(rotated_BnX)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    def _attend_behind(self, rotated: list[Tensor], mask: Tensor | None) -> Tensor:
        """The last of several sequences that continue each other, (n, X) each -> (n, N D)."""
        q = self._heads(rotated[-1][None])[0]
        _, k, v = self._heads(torch.cat(rotated)[None])
        assert mask is not None, "a sequence that continues another has a mask"
        mask = mask.to(q.device, q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)[0]

    def _heads(self, rotated_BnX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, heads, n, D)."""
        heads = rotated_BnX.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        return q, k, v


class _Rotate(torch.autograd.Function):
    """Rotary embedding of the first heads; the backward pass turns back and needs nothing but the angles."""

    @staticmethod
    def forward(ctx: Any, qkv_TX: Tensor, rotation_TJ: Tensor, num_rotated: int) -> Tensor:
        ctx.save_for_backward(rotation_TJ)
        ctx.num_rotated = num_rotated
        return _rotated(qkv_TX, rotation_TJ, num_rotated)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (rotation_TJ,) = ctx.saved_tensors
        return _rotated(grads[0], rotation_TJ.conj_physical(), ctx.num_rotated), None, None


def _rotated(x_TX: Tensor, rotation_TJ: Tensor, num_rotated: int) -> Tensor:
    """Turn the pairs of the first `num_rotated` heads in float32 or wider, copy the rest."""
    width = 2 * num_rotated * rotation_TJ.shape[1]
    x_TX = x_TX.contiguous()
    out_TX = torch.empty_like(x_TX)
    out_TX[:, width:] = x_TX[:, width:]
    turned, straight = out_TX[:, :width], x_TX[:, :width]
    if x_TX.dtype in (torch.float32, torch.float64):
        torch.mul(_as_complex(straight, num_rotated), rotation_TJ[:, None], out=_as_complex(turned, num_rotated))
    else:
        wide = _as_complex(straight.float(), num_rotated) * rotation_TJ[:, None]
        turned.copy_(torch.view_as_real(wide).flatten(1))
    return out_TX


def _as_complex(x: Tensor, num_heads: int) -> Tensor:
    """Pairs as complex numbers, (T, heads * D) -> (T, heads, J), the same memory."""
    return torch.view_as_complex(x.unflatten(-1, (num_heads, -1, 2)))


def _by_length(view: AttentionView) -> list[list[int]]:
    """The sequences that begin by themselves, those of the same length together."""
    parents = view.parents if isinstance(view, BranchedView) else (None,) * len(view.lengths)
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for sequence, (length, parent) in enumerate(zip(view.lengths, parents, strict=True)):
        if parent is None:
            groups[length].append(sequence)
    return list(groups.values())


def _continuing(num_own: int, num_before: int) -> Tensor:
    """Everything before and the own tokens up to each one itself: 0 where seen, -inf elsewhere."""
    hidden = torch.full((num_own, num_own), float("-inf")).triu(1)
    return torch.cat((torch.zeros(num_own, num_before), hidden), dim=1)
