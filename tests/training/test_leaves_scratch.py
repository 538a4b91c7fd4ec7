"""Memory that leaves work in: given once, taken back with the block, never handed out twice at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ernie45.training.leaves.scratch import release, scratch, take


@pytest.fixture(autouse=True)
def no_slab() -> Iterator[None]:
    release()
    yield
    release()


def test_the_next_block_has_the_same_memory() -> None:
    like, places = torch.empty(0), []
    for _ in range(3):
        with scratch():
            places.append(take(like, 100, 7).data_ptr())
    with scratch():
        beside = take(like, 1).data_ptr()
        places.append(take(like, 100, 7).data_ptr())
    assert places[1] == places[2] == beside, "room is made for what the first block asked"
    assert places[3] != beside


def test_pieces_do_not_overlap() -> None:
    like = torch.empty(0, dtype=torch.float64)
    for _ in range(2):
        with scratch():
            pieces = [take(like, 5), take(like, 3, 3, dtype=torch.float32), take(like, 0), take(like, 6)]
            with scratch():
                pieces.append(take(like, 11))
                for number, piece in enumerate(pieces):
                    piece.fill_(number)
            assert all((piece == number).all() for number, piece in enumerate(pieces))
    assert [piece.dtype for piece in pieces[:2]] == [torch.float64, torch.float32]
    assert all(piece.is_contiguous() and piece.data_ptr() % 64 == 0 for piece in pieces if piece.numel())


def test_an_inner_block_gives_back_what_it_took() -> None:
    like = torch.empty(0)
    with scratch():
        take(like, 32)
    with scratch():
        take(like, 16)
        with scratch():
            inner = take(like, 16).data_ptr()
        assert take(like, 16).data_ptr() == inner


def test_memory_made_in_inference_mode_serves_training() -> None:
    like = torch.empty(0)
    with torch.inference_mode():
        for _ in range(2):
            with scratch():
                take(like, 64)
    with scratch():
        torch.mm(torch.ones(8, 8), torch.ones(8, 8), out=take(like, 8, 8))
