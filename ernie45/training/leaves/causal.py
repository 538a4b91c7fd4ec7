"""Causal attention of packed documents, forward and backward, in blocks of queries.

    for queries i..j of a document: scores = q[i..j] k[..j]'   ->  softmax  ->  probabilities v[..j]

A block sees the keys up to its last query alone, so that only the corner above its diagonal is wasted. The query heads that share a
key head are rows of one product. Blocks are so small that scores stay in the cache; none are kept: the backward pass computes
them again from the rotated projection, the one thing that it needs.

Shape letters: T tokens (packed), B documents of one shape, n own tokens of a document, S tokens that it sees (those before it and
its own), N query heads, G key/value heads, R = N / G, D head size, J = D / 2, X = (N + 2 G) D, Z = B G.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ernie45.training.leaves.precision import sum_dtype
from ernie45.training.leaves.scratch import scratch, take

_BLOCK_ROWS = 256
"""Rows of a block's products: queries times the heads that share a key."""
_BLOCK_SCORES = 1 << 19
"""Scores that exist together, twice in the backward pass; more for very long documents."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Documents of one shape, and which rows they are."""

    num_documents: int
    num_own: int
    num_before: int
    """Tokens that stand before each document's own and that it sees as well."""
    own_rows: slice | Tensor
    """int64 (B n)."""
    seen_rows: slice | Tensor
    """int64 (B S): those before and its own, of each document."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """How a projection is divided."""

    num_query: int
    num_key: int
    dim: int

    @property
    def per_key(self) -> int:
        """R."""
        return self.num_query // self.num_key

    @property
    def query_width(self) -> int:
        """Columns of the queries; those of keys and values follow."""
        return self.num_query * self.dim


class PackedAttention(torch.autograd.Function):
    """Rotary embedding and attention of all documents of a step, (T, X) -> (T, N D); float32 or wider inside."""

    @staticmethod
    def forward(
        ctx: Any, qkv_TX: Tensor, rotation_TJ: Tensor, groups: tuple[Group, ...], heads: Heads, scale: float
    ) -> Tensor:
        rotated_TX = rotated(qkv_TX, rotation_TJ, heads.num_query + heads.num_key)
        out_TX = qkv_TX.new_empty(len(qkv_TX), heads.query_width)
        for group in groups:
            with scratch():
                q, k, v = _gathered(rotated_TX, group, heads)
                out = take(q, *q.shape)
                for block in _blocks(q.mul_(scale), k, group, heads.per_key):
                    torch.bmm(block.probs, v[block.items, : block.seen], out=out[block.items, block.rows])
                _put(out_TX, group.own_rows, out, group, heads.per_key)
        ctx.save_for_backward(rotated_TX, rotation_TJ)
        ctx.groups, ctx.heads, ctx.scale = groups, heads, scale
        return out_TX

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        rotated_TX, rotation_TJ = ctx.saved_tensors
        heads = ctx.heads
        with scratch():
            # A token's keys and values collect gradients from all documents that see it.
            d_rotated_TX = take(rotated_TX, *rotated_TX.shape, dtype=sum_dtype(rotated_TX.dtype)).zero_()
            for group in ctx.groups:
                with scratch():
                    _group_backward(rotated_TX, grads[0], d_rotated_TX, group, heads, ctx.scale)
            back_TJ = rotation_TJ.conj_physical()
            d_qkv_TX = rotated(d_rotated_TX, back_TJ, heads.num_query + heads.num_key)
        return d_qkv_TX.to(rotated_TX.dtype), None, None, None, None


def rotated(x_TX: Tensor, rotation_TJ: Tensor, num_rotated: int) -> Tensor:
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


def _gathered(rotated_TX: Tensor, group: Group, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of queries, (Z, n R, D), and of keys and values, (Z, S, D)."""
    q = rotated_TX[group.own_rows, : heads.query_width]
    k, v = rotated_TX[group.seen_rows, heads.query_width :].chunk(2, dim=-1)
    return _grouped(q, group, heads), _grouped(k, group, heads), _grouped(v, group, heads)


def _grouped(x: Tensor, group: Group, heads: Heads) -> Tensor:
    """By key head: (B tokens, G heads D) -> (Z, tokens heads, D), a copy."""
    by_key = x.view(group.num_documents, -1, heads.num_key, x.shape[1] // heads.num_key)
    wide = take(x, *by_key.transpose(1, 2).shape, dtype=sum_dtype(x.dtype))
    return wide.copy_(by_key.transpose(1, 2)).view(group.num_documents * heads.num_key, -1, heads.dim)


def _ungrouped(x: Tensor, group: Group, heads_per_key: int) -> Tensor:
    """The way back, a view: (Z, tokens heads, D) -> (B, tokens, G, heads D)."""
    by_key = x.view(group.num_documents, len(x) // group.num_documents, -1, heads_per_key * x.shape[-1])
    return by_key.transpose(1, 2)


def _put(
    rows_TX: Tensor, rows: slice | Tensor, x: Tensor, group: Group, heads_per_key: int, *, adds: bool = False
) -> None:
    """Write what is grouped by key head into rows of (T, G heads D), or add it there."""
    values = _ungrouped(x, group, heads_per_key)
    if isinstance(rows, slice):
        there = rows_TX[rows].view(values.shape)
        if adds:
            there.add_(values)
        else:
            there.copy_(values)
        return
    flat = values.flatten(2).flatten(0, 1)
    if adds:
        rows_TX.index_add_(0, rows, flat)
    else:
        rows_TX[rows] = flat.to(rows_TX.dtype)


@dataclass(frozen=True, kw_only=True)
class _Block:
    items: slice
    """Of Z."""
    rows: slice
    """Of n R."""
    seen: int
    """Keys."""
    probs: Tensor
    """(items, rows, seen), until the next block."""
    spare: Tensor
    """As much memory again."""


def _blocks(q: Tensor, k: Tensor, group: Group, per_key: int, *, wants_spare: bool = False) -> Iterator[_Block]:
    """Probabilities block by block. Args: q: scaled, (Z, n R, D). k: (Z, S, D)."""
    size = min(max(_BLOCK_ROWS // per_key, 16), 128, group.num_own)
    scores_per_item = size * per_key * k.shape[1]
    num_items = min(len(q), max(torch.get_num_threads(), _BLOCK_SCORES // scores_per_item))
    memory = take(q, 1 + wants_spare, num_items * scores_per_item)
    corner = q.new_full((size, size), float("-inf")).triu(1).repeat_interleave(per_key, dim=0)
    for first in range(0, len(q), num_items):
        items = slice(first, min(first + num_items, len(q)))
        for start in range(0, group.num_own, size):
            count = min(size, group.num_own - start)
            rows, seen = slice(start * per_key, (start + count) * per_key), group.num_before + start + count
            shape = (items.stop - first, count * per_key, seen)
            scores, spare = memory[0], memory[-1]
            scores, spare = (each[: shape[0] * shape[1] * shape[2]].view(shape) for each in (scores, spare))
            torch.bmm(q[items, rows], k[items, :seen].transpose(1, 2), out=scores)
            scores[..., seen - count :].add_(corner[: count * per_key, :count])
            torch.softmax(scores, -1, out=scores)  # row by row, so it may write where it reads
            yield _Block(items=items, rows=rows, seen=seen, probs=scores, spare=spare)


def _group_backward(
    rotated_TX: Tensor, grad_TX: Tensor, d_rotated_TX: Tensor, group: Group, heads: Heads, scale: float
) -> None:
    """Put or add the gradients of queries, keys and values of a group to those of the rotated projection."""
    q, k, v = _gathered(rotated_TX, group, heads)
    d_out = _grouped(grad_TX[group.own_rows], group, heads)
    d_q, d_k, d_v = take(q, *q.shape), take(k, *k.shape).zero_(), take(v, *v.shape).zero_()
    for block in _blocks(q.mul_(scale), k, group, heads.per_key, wants_spare=True):
        items, rows, seen, probs = block.items, block.rows, block.seen, block.probs
        d_v[items, :seen].baddbmm_(probs.transpose(1, 2), d_out[items, rows])
        d_probs = torch.bmm(d_out[items, rows], v[items, :seen].transpose(1, 2), out=block.spare)
        d_scores = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype, grad_input=d_probs)
        torch.bmm(d_scores, k[items, :seen], out=d_q[items, rows])
        d_k[items, :seen].baddbmm_(d_scores.transpose(1, 2), q[items, rows])
    width = heads.query_width
    _put(d_rotated_TX[:, :width], group.own_rows, d_q.mul_(scale), group, heads.per_key)
    for part, columns in zip((d_k, d_v), d_rotated_TX[:, width:].chunk(2, dim=-1), strict=True):
        _put(columns, group.seen_rows, part, group, 1, adds=True)
