"""The key/value cache of a sequence and the view of a step."""

from __future__ import annotations

import pytest
import torch

from ernie45.errors import ShapeError
from ernie45.layers.cache import AttentionView, KVCache


def _filled(tokens: int) -> tuple[KVCache, torch.Tensor]:
    cache = KVCache(2, 3, 4, dtype=torch.float32, capacity=1)
    rows = torch.arange(tokens * 12, dtype=torch.float32).view(tokens, 3, 4)
    for row in rows:
        for layer in range(2):
            cache.write(layer, row[None] + layer, -row[None])
        cache.commit(1)
    return cache, rows


def test_growing_keeps_what_was_written() -> None:
    cache, rows = _filled(9)
    assert cache.length == 9
    assert cache.capacity >= 9
    keys, values = cache.write(1, rows[:2] + 1, -rows[:2])
    assert torch.equal(keys.transpose(0, 1), torch.cat((rows, rows[:2])) + 1)
    assert torch.equal(values.transpose(0, 1), -torch.cat((rows, rows[:2])))
    assert cache.length == 9, "a write counts only when the step is committed"


def test_truncated_tokens_are_overwritten() -> None:
    cache, rows = _filled(5)
    cache.truncate(2)
    keys, _ = cache.write(0, rows[4:], rows[4:])
    assert torch.equal(keys.transpose(0, 1), torch.cat((rows[:2], rows[4:])))
    with pytest.raises(ShapeError, match="cut a cache of 2 tokens to 3"):
        cache.truncate(3)


def test_positions_go_on_from_the_caches() -> None:
    cache, _ = _filled(5)
    fresh = KVCache(2, 3, 4, dtype=torch.float32)
    view = AttentionView(lengths=(2, 3), caches=(cache, fresh))
    assert view.positions().tolist() == [5, 6, 0, 1, 2]
    view.commit()
    assert (cache.length, fresh.length) == (7, 3)
    assert AttentionView(lengths=(2, 3)).positions().tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("lengths", [(), (0,), (3, 0)])
def test_empty_sequences_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="lengths"):
        AttentionView(lengths=lengths)


def test_caches_and_lengths_must_match() -> None:
    with pytest.raises(ShapeError, match="0 caches for 1 sequences"):
        AttentionView(lengths=(1,), caches=())
