"""The order in which rows are drawn: it follows from seed, sizes and weights alone, and costs no memory.

A sample is the n-th row that is drawn from a source. Which source is next: the one furthest behind its share, so that every
prefix of the sequence keeps the shares. Which of its rows: place n modulo the size in a permutation that is new in every
epoch, and is computed place by place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

_ROUNDS = 8
_MIN_BITS = 6  # with fewer, a Feistel network knows too few permutations; the walk stays short
_WEIGHT_UNITS = 1 << 32
_WORD = (1 << 64) - 1


class Sample(NamedTuple):
    """One draw."""

    source: int
    ordinal: int
    """How many rows of that source were drawn before."""


class KeyedPermutation:
    """An order of 0 to size - 1 that a key chooses: a Feistel network over the next even number of bits, walked until the
    value lies inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002)."""

    def __init__(self, size: int, key: str) -> None:
        bits = max((size - 1).bit_length(), _MIN_BITS)
        self._size = size
        self._half = (bits + 1) // 2
        self._mask = (1 << self._half) - 1
        rounds = (f"{key}/{idx}".encode() for idx in range(_ROUNDS))
        self._keys = [int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") for data in rounds]

    def __call__(self, place: int) -> int:
        """The value at a place, each value at one place."""
        assert 0 <= place < self._size, f"place {place} of {self._size}"
        value = place
        while True:
            left, right = value >> self._half, value & self._mask
            for key in self._keys:
                left, right = right, left ^ (_mixed(right ^ key) & self._mask)
            value = left << self._half | right
            if value < self._size:
                return value


class SampleOrder:
    """An endless sequence of samples; `taken` is all of its state."""

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float] | None = None, *, seed: int = 0, shuffle: bool = True
    ) -> None:
        """`sizes`: rows of each source. `weights`: shares, or None for every row once per epoch."""
        units = sizes if weights is None else [max(1, round(w / max(weights) * _WEIGHT_UNITS)) for w in weights]
        self._sizes, self._units, self._total = list(sizes), list(units), sum(units)
        self._seed, self._shuffle = seed, shuffle
        self._permutations: dict[int, tuple[int, KeyedPermutation]] = {}
        self.taken = [0] * len(sizes)

    def draw(self) -> Sample:
        """The next sample."""
        place = sum(self.taken) + 1
        behind = [unit * place - taken * self._total for unit, taken in zip(self._units, self.taken, strict=True)]
        source = behind.index(max(behind))
        sample = Sample(source, self.taken[source])
        self.taken[source] += 1
        return sample

    def row(self, sample: Sample) -> int:
        """Which row of its source a sample is."""
        size = self._sizes[sample.source]
        epoch, place = divmod(sample.ordinal, size)
        if not self._shuffle:
            return place
        known = self._permutations.get(sample.source)
        if known is None or known[0] != epoch:
            known = (epoch, KeyedPermutation(size, f"{self._seed}/{sample.source}/{epoch}"))
            self._permutations[sample.source] = known
        return known[1](place)

    def is_first_epoch(self, sample: Sample) -> bool:
        """Whether the row was not drawn before."""
        return sample.ordinal < self._sizes[sample.source]


def _mixed(word: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): every bit of the result depends on every bit given."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31
