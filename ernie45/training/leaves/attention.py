"""The attention core of training, and the view of sequences that continue others.

Shape letters: T tokens (packed), N query heads, G key/value heads, D head size, J = D / 2, X = (N + 2 G) D.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.layers.attention import AttentionCore
from ernie45.layers.cache import AttentionView
from ernie45.training.leaves.causal import Group, Heads, PackedAttention


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

    def _starts(self) -> list[int]:
        return [sum(self.lengths[i] for i in before) for before in self.ancestors]


class TrainingAttentionCore(AttentionCore):
    """`layers.attention.AttentionCore`; a view with caches runs as there."""

    def forward(self, qkv_TX: Tensor, rotation_TJ: Tensor, view: AttentionView) -> Tensor:
        """Rotate, and attend within each sequence of `view` and those that it continues, (T, X) -> (T, N D)."""
        if view.caches is not None:
            return super().forward(qkv_TX, rotation_TJ, view)
        heads = Heads(num_query=self.num_heads, num_key=self.num_kv_heads, dim=self.head_dim)
        ancestors = view.ancestors if isinstance(view, BranchedView) else ((),) * len(view.lengths)
        return PackedAttention.apply(qkv_TX, rotation_TJ, groups_of(view.lengths, ancestors), heads, self.scale)  # type: ignore[no-untyped-call]


@lru_cache(maxsize=8)  # every layer of a step asks for the same
def groups_of(lengths: tuple[int, ...], ancestors: tuple[tuple[int, ...], ...]) -> tuple[Group, ...]:
    """Sequences of equal shape together: as many own tokens, and as many before them."""
    by_shape: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for sequence, before in enumerate(ancestors):
        by_shape[lengths[sequence], sum(lengths[i] for i in before)].append(sequence)
    ends = list(accumulate(lengths))
    groups = []
    for (num_own, num_before), sequences in by_shape.items():
        own = _rows(sequences, lengths, ends)
        seen = own if not num_before else _rows([i for s in sequences for i in (*ancestors[s], s)], lengths, ends)
        groups.append(
            Group(num_documents=len(sequences), num_own=num_own, num_before=num_before, own_rows=own, seen_rows=seen)
        )
    return tuple(groups)


def _rows(sequences: list[int], lengths: tuple[int, ...], ends: list[int]) -> slice | Tensor:
    """Rows of these sequences in this order; as a slice, which copies nothing, where they stand behind each other."""
    first, last = sequences[0], sequences[-1]
    if sequences == list(range(first, last + 1)):
        return slice(ends[first] - lengths[first], ends[last])
    return torch.cat([torch.arange(ends[i] - lengths[i], ends[i]) for i in sequences])
