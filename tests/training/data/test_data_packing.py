"""Packing: nothing lost, nothing twice, the longest waiting first, and what fits best beside it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.training.data.order import Sample
from ernie45.training.data.packing import Packer, Piece

ROOM = 20


def packed(sizes: list[int], *, cuts: bool, shares: bool = True, wait: int = 100) -> list[list[Piece[str]]]:
    packer: Packer[str] = Packer(ROOM, cuts=cuts, shares=shares)
    rows = []
    for idx, size in enumerate(sizes):
        packer.add(Piece(Sample(0, idx), 0, size, f"document {idx}"))
        while packer.waiting_tokens >= wait:
            rows.append(packer.row())
    while packer:
        rows.append(packer.row())
    assert packer.waiting_tokens == 0
    return rows


@given(sizes=st.lists(st.integers(1, ROOM), max_size=60), shares=st.booleans())
def test_whole_documents_come_out_once(sizes: list[int], shares: bool) -> None:
    rows = packed(sizes, cuts=False, shares=shares)
    assert sorted(piece.sample.ordinal for row in rows for piece in row) == list(range(len(sizes)))
    for row in rows:
        assert sum(piece.size for piece in row) <= ROOM
        assert all((piece.start, piece.size) == (0, sizes[piece.sample.ordinal]) for piece in row)
        assert all(piece.item == f"document {piece.sample.ordinal}" for piece in row)
        assert shares or len(row) == 1


@given(sizes=st.lists(st.integers(1, 3 * ROOM), max_size=40))
def test_pieces_tile_their_documents_and_only_long_ones_are_cut(sizes: list[int]) -> None:
    rows = packed(sizes, cuts=True)
    pieces: dict[int, list[tuple[int, int]]] = {idx: [] for idx in range(len(sizes))}
    for row in rows:
        for piece in row:
            pieces[piece.sample.ordinal].append((piece.start, piece.start + piece.size))
    for idx, size in enumerate(sizes):
        assert [0, *(end for _, end in pieces[idx])] == [*(start for start, _ in pieces[idx]), size]
        assert len(pieces[idx]) == 1 or size > ROOM
    for row in rows:
        assert sum(piece.size for piece in row) <= ROOM


@given(sizes=st.lists(st.integers(1, ROOM), min_size=1, max_size=30))
def test_rows_begin_with_the_oldest_and_go_on_with_the_longest_that_fits(sizes: list[int]) -> None:
    waiting = dict(enumerate(sizes))
    for row in packed(sizes, cuts=False, wait=10**9):
        room = ROOM
        for place, piece in enumerate(row):
            fitting = {idx: size for idx, size in waiting.items() if size <= room}
            longest = max(fitting.values())
            expected = min(waiting if place == 0 else (idx for idx, size in fitting.items() if size == longest))
            assert piece.sample.ordinal == expected
            room -= waiting.pop(expected)
        assert all(size > room for size in waiting.values()), "nothing that waits would still have fitted"


def test_the_end_of_a_row_is_filled_from_what_has_to_be_cut() -> None:
    rows = packed([15, 18, 30], cuts=True)
    assert [[(piece.sample.ordinal, piece.start, piece.size) for piece in row] for row in rows] == [
        [(0, 0, 15), (2, 0, 5)],
        [(1, 0, 18), (2, 5, 2)],
        [(2, 7, 20)],
        [(2, 27, 3)],
    ]
    assert [[piece.size for piece in row] for row in packed([15, 18, 20], cuts=True)] == [[15], [18], [20]]


def test_scraps_are_not_cut_off() -> None:
    packer: Packer[None] = Packer(160, cuts=True)
    for idx, size in enumerate([151, 150, 400]):
        packer.add(Piece(Sample(0, idx), 0, size, None))
    assert [[piece.size for piece in packer.row()] for _ in range(2)] == [[151], [150, 10]]


def test_long_documents_alone_when_rows_are_not_shared() -> None:
    rows = packed([45, 3], cuts=True, shares=False)
    assert [[(piece.sample.ordinal, piece.start, piece.size) for piece in row] for row in rows] == [
        [(0, 0, 20)],
        [(1, 0, 3)],
        [(0, 20, 20)],
        [(0, 40, 5)],
    ]


def test_rows_get_full_with_enough_to_choose_from() -> None:
    draw = random.Random(0)
    sizes = [min(ROOM, int(draw.lognormvariate(1.8, 0.7)) + 1) for _ in range(2000)]
    rows = packed(sizes, cuts=False, wait=32 * ROOM)
    assert sum(sizes) / (len(rows) * ROOM) > 0.99


@given(sizes=st.lists(st.integers(1, 2 * ROOM), min_size=2, max_size=30), rows=st.integers(0, 5))
def test_what_waits_is_all_of_the_state(sizes: list[int], rows: int) -> None:
    first: Packer[None] = Packer(ROOM, cuts=True)
    for idx, size in enumerate(sizes):
        first.add(Piece(Sample(0, idx), 0, size, None))
    for _ in range(rows):
        if first:
            first.row()
    second: Packer[None] = Packer(ROOM, cuts=True)
    for piece in first.waiting():
        second.add(piece)
    assert second.waiting_tokens == first.waiting_tokens
    while first:
        assert first.row() == second.row()
    assert not second


def test_what_does_not_fit_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="21 tokens do not fit into 20"):
        Packer[None](ROOM, cuts=False).add(Piece(Sample(0, 0), 0, 21, None))
