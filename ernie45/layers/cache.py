"""Keys and values of one sequence, and the view that a forward step has of its sequences.

Shape letters: T tokens, G key/value heads, D head size, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.kernels.attention import Sequences

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
        self.companions: dict[tuple[str, int], object] = {}
        """What leaves keep beside the store, such as kernel views of it; forgotten when the store moves."""

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
        keys, values = self.layer_views(layer, k_TGD.shape[0])
        keys[:, self.length : end] = k_TGD.transpose(0, 1)
        values[:, self.length : end] = v_TGD.transpose(0, 1)
        return keys[:, :end], values[:, :end]

    def layer_views(self, layer: int, num_new: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each (G, capacity, D), with room for `num_new` tokens behind the committed ones."""
        if self.length + num_new > self.capacity:
            self._grow(self.length + num_new)
        return self._store[0, layer], self._store[1, layer]

    def commit(self, num_tokens: int) -> None:
        """Count the tokens of a finished step."""
        self.length += num_tokens

    def truncate(self, length: int) -> None:
        """Forget everything from token `length` on, such as rejected drafts."""
        if not 0 <= length <= self.length:
            raise ShapeError(f"cannot cut a cache of {self.length} tokens to {length}")
        self.length = length

    def _grow(self, needed: int) -> None:
        layers_and_heads, head_dim = self._store.shape[:3], self._store.shape[4]
        larger = self._store.new_empty((*layers_and_heads, max(needed, 2 * self.capacity), head_dim))
        larger[:, :, :, : self.length] = self._store[:, :, :, : self.length]
        self._store = larger
        self.companions.clear()


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

    @cached_property
    def sequences(self) -> tuple[Sequences, ...]:
        """What the attention kernels want to know of each sequence by itself: a cache is one page."""
        starts = [cache.length for cache in self.caches or ()]
        return tuple(_sequences([fresh], [start + fresh]) for start, fresh in zip(starts, self.lengths, strict=True))

    @cached_property
    def all_sequences(self) -> Sequences:
        """The same of all sequences together, when nothing is cached: each has a page of its own."""
        return _sequences(self.lengths, self.lengths)

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Text positions of the step's tokens, int64 (T,): every sequence counts on from its cache."""
        starts = [cache.length for cache in self.caches] if self.caches else [0] * len(self.lengths)
        ranges = [torch.arange(start, start + n) for start, n in zip(starts, self.lengths, strict=True)]
        return torch.cat(ranges).to(device)

    def commit(self) -> None:
        """Count the step's tokens in every cache."""
        for cache, length in zip(self.caches or (), self.lengths, strict=False):
            cache.commit(length)


def _sequences(fresh: Sequence[int], lengths: Sequence[int]) -> Sequences:
    pages = torch.arange(len(lengths), dtype=torch.int32)[:, None]
    return Sequences(
        fresh_B=torch.tensor(fresh, dtype=torch.int32),
        lengths_B=torch.tensor(lengths, dtype=torch.int32),
        pages_BP=pages,
    )
