"""Keys and values of one sequence, and the view that a forward step has of its sequences.

Shape letters: T tokens, G key/value heads, D head size, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.kernels.attention import KvPages, Sequences

_FIRST_CAPACITY = 64


class KVCache:
    """Contiguous keys and values of one sequence for all layers; grows by doubling.

    A step writes every layer first and is committed once at its end, so `length` always counts whole steps.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        capacity: int = _FIRST_CAPACITY,
    ) -> None:
        shape = (2, num_layers, num_kv_heads, max(capacity, 1), head_dim)
        self._store = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self._pages: tuple[KvPages, ...] = ()

    @property
    def capacity(self) -> int:
        """Tokens that fit without another allocation."""
        return self._store.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of stored keys and values."""
        return self._store.dtype

    @property
    def bytes_per_value(self) -> int:
        """Width of one stored key or value."""
        return self._store.element_size()

    def write(self, layer: int, k_TGD: Tensor, v_TGD: Tensor) -> tuple[Tensor, Tensor]:
        """Put this step's keys and values behind the committed ones.

        Returns: all keys and values of the layer so far, each (G, length + T, D), views of the store.
        """
        end = self.length + k_TGD.shape[0]
        self._make_room(k_TGD.shape[0])
        keys, values = self._store[0, layer], self._store[1, layer]
        keys[:, self.length : end] = k_TGD.transpose(0, 1)
        values[:, self.length : end] = v_TGD.transpose(0, 1)
        return keys[:, :end], values[:, :end]

    def pages(self, num_new: int) -> tuple[KvPages, ...]:
        """Every layer as a store of one page for the kernels, with room for `num_new` tokens behind the committed ones."""
        self._make_room(num_new)
        if not self._pages:
            keys, values = self._store[:, :, None]
            self._pages = tuple(KvPages(keys_PGWD=k, values_PGWD=v) for k, v in zip(keys, values, strict=True))
        return self._pages

    def commit(self, num_tokens: int) -> None:
        """Count the tokens of a finished step."""
        self.length += num_tokens

    def truncate(self, length: int) -> None:
        """Forget everything from token `length` on, such as rejected drafts."""
        if not 0 <= length <= self.length:
            raise ShapeError(f"cannot cut a cache of {self.length} tokens to {length}")
        self.length = length

    def _make_room(self, num_new: int) -> None:
        needed = self.length + num_new
        if needed <= self.capacity:
            return
        layers_and_heads, head_dim = self._store.shape[:3], self._store.shape[4]
        larger = self._store.new_empty((*layers_and_heads, max(needed, 2 * self.capacity), head_dim))
        larger[:, :, :, : self.length] = self._store[:, :, :, : self.length]
        self._store = larger
        self._pages = ()


@dataclass(frozen=True, kw_only=True)
class AttentionView:
    """What a forward step sees: sequences packed one behind the other along T, each causal, none seeing another."""

    lengths: tuple[int, ...]
    """New tokens of each sequence in this step; they add up to T."""
    caches: tuple[KVCache, ...] | None = None
    """One cache per sequence, holding its earlier tokens; None when nothing is kept (training, scoring)."""

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) <= 0:
            raise ShapeError(f"sequence lengths are {self.lengths}, expected at least one and all positive")
        if self.caches is not None and len(self.caches) != len(self.lengths):
            raise ShapeError(f"{len(self.caches)} caches for {len(self.lengths)} sequences")

    @property
    def num_tokens(self) -> int:
        """T of the step."""
        return sum(self.lengths)

    @property
    def keeps(self) -> bool:
        """Whether keys and values of the step are kept."""
        return self.caches is not None

    @cached_property
    def sequences(self) -> Sequences:
        """The sequences as the attention kernels want them: each is one page, of its cache or of a store for the step."""
        count = len(self.lengths)
        if self.caches is None:
            pages, lengths = torch.arange(count, dtype=torch.int32)[:, None], self.lengths
        else:
            pages = torch.zeros(count, 1, dtype=torch.int32)
            lengths = tuple(c.length + fresh for c, fresh in zip(self.caches, self.lengths, strict=True))
        return Sequences(
            fresh_B=torch.tensor(self.lengths, dtype=torch.int32),
            lengths_B=torch.tensor(lengths, dtype=torch.int32),
            pages_BP=pages,
        )

    @cached_property
    def stores(self) -> tuple[tuple[KvPages, ...], ...]:
        """By layer, the caches as the attention kernels want them, with room for the step; nothing without caches."""
        pages = (cache.pages(fresh) for cache, fresh in zip(self.caches or (), self.lengths, strict=False))
        return tuple(zip(*pages, strict=True))

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Text positions of the step's tokens, int64 (T,): every sequence counts on from its cache."""
        starts = self._starts()
        if max(self.lengths) == 1:  # decoding: one tensor instead of one per sequence
            return torch.tensor(starts, device=device)
        ranges = [torch.arange(start, start + n) for start, n in zip(starts, self.lengths, strict=True)]
        return torch.cat(ranges).to(device)

    def commit(self) -> None:
        """Count the step's tokens in every cache."""
        for cache, length in zip(self.caches or (), self.lengths, strict=False):
            cache.commit(length)

    def _starts(self) -> list[int]:
        """Earlier tokens of each sequence."""
        return [cache.length for cache in self.caches] if self.caches else [0] * len(self.lengths)


@dataclass(frozen=True, kw_only=True)
class PagedView(AttentionView):
    """A step over sequences whose keys and values lie in one page pool; for networks with kernel leaves.

    Nothing is counted here: how many tokens of a sequence are valid is known to the pool's owner, who says where to start.
    """

    starts: tuple[int, ...]
    """Earlier tokens of each sequence."""
    pages_BP: Tensor
    """int32: the pages of each sequence in order, with room for its new tokens; rows are filled up with anything."""
    pools: tuple[KvPages, ...]
    """The store of each layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.caches is not None or len(self.starts) != len(self.lengths) or len(self.pages_BP) != len(self.lengths):
            raise ShapeError(
                f"{len(self.lengths)} sequences with {len(self.starts)} starts, {len(self.pages_BP)} rows of pages and "
                f"{'no' if self.caches is None else 'some'} caches, expected as many of each and no caches"
            )

    @property
    def keeps(self) -> bool:
        """Always: in the pool."""
        return True

    @cached_property
    def sequences(self) -> Sequences:
        """The sequences as the attention kernels want them."""
        lengths = [start + fresh for start, fresh in zip(self.starts, self.lengths, strict=True)]
        return Sequences(
            fresh_B=torch.tensor(self.lengths, dtype=torch.int32),
            lengths_B=torch.tensor(lengths, dtype=torch.int32),
            pages_BP=self.pages_BP,
        )

    @cached_property
    def stores(self) -> tuple[tuple[KvPages, ...], ...]:
        """By layer, the one store of all sequences."""
        return tuple((pool,) for pool in self.pools)

    def _starts(self) -> list[int]:
        return list(self.starts)
