"""Fit documents into rows: best fit among the documents that wait.

A row begins with the document that has waited longest, so that none is left behind, and is filled with the longest that
still fits, again and again. Text to pre-train on may be cut. Only what is longer than a row is: its head fills what no waiting
document fits, unless that is so little that the piece would be learnt without any context. Against joining everything and
cutting at every row's end, as is common, documents shorter than a row stay whole (Ding et al., "Fewer truncations improve
language modeling", 2024), and since rows are not padded, a place that stays free costs nothing.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from ernie45.training.data.order import Sample

Item = TypeVar("Item")

_MIN_HEAD = 1 / 16
"""Share of a row below which the end of a row stays free."""


@dataclass(frozen=True)
class Piece(Generic[Item]):
    """A document, or what is left of one."""

    sample: Sample
    start: int
    """First of its tokens; above 0 for the rest of a document that was cut."""
    size: int
    """Tokens that the network reads."""
    item: Item


class Packer(Generic[Item]):
    """Documents that wait, and the rows that are made of them."""

    def __init__(self, room: int, *, cuts: bool, shares: bool = True) -> None:
        """`room`: tokens of a row. `cuts`: whether documents may be cut. `shares`: whether they share rows."""
        self._room, self._cuts, self._shares = room, cuts, shares
        self._by_age: dict[int, Piece[Item]] = {}
        self._by_size: list[tuple[int, int]] = []  # (size, -age): of equal sizes the oldest is found first
        self._age = 0
        self.waiting_tokens = 0

    def __len__(self) -> int:
        return len(self._by_age)

    def add(self, piece: Piece[Item]) -> None:
        """Let a document wait. One that is longer than a row must be one that may be cut."""
        assert self._cuts or piece.size <= self._room, f"{piece.size} tokens do not fit into {self._room}"
        self._by_age[self._age] = piece
        insort(self._by_size, (piece.size, -self._age))
        self._age += 1
        self.waiting_tokens += piece.size

    def waiting(self) -> list[Piece[Item]]:
        """What waits, the oldest first: added in this order to another packer, the same rows come out."""
        return list(self._by_age.values())

    def row(self) -> list[Piece[Item]]:
        """The next row; something must be waiting."""
        age: int | None = next(iter(self._by_age))
        out: list[Piece[Item]] = []
        room = self._room
        while age is not None:
            piece = self._take(age, room)
            out.append(piece)
            room -= piece.size
            age = self._next(room) if self._shares else None
        return out

    def _next(self, room: int) -> int | None:
        """What goes on with a row that has so much room left."""
        idx = bisect_right(self._by_size, (room, 1)) - 1
        if idx < 0:
            needs_cut = self._by_size and self._by_size[-1][0] > self._room
            if not needs_cut or room < self._room * _MIN_HEAD:
                return None
        return -self._by_size[idx][1]  # -1, where none fits, is the longest

    def _take(self, age: int, room: int) -> Piece[Item]:
        piece = self._by_age.pop(age)
        self._by_size.remove((piece.size, -age))
        self.waiting_tokens -= piece.size
        if piece.size <= room:
            return piece
        self.add(replace(piece, start=piece.start + room, size=piece.size - room))
        return replace(piece, size=room)
