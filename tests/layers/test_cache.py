"""The key/value cache of a sequence and the view of a step."""

from __future__ import annotations

import pytest
import torch

from ernie45.errors import ShapeError
from ernie45.kernels.attention import KvPages
from ernie45.layers.cache import AttentionView, KVCache, PagedView


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


def test_positions_of_a_decoding_step() -> None:
    cache, _ = _filled(5)
    positions = AttentionView(lengths=(1, 1), caches=(cache, KVCache(2, 3, 4, dtype=torch.float32))).positions()
    assert positions.tolist() == [5, 0]
    assert positions.dtype == torch.int64


def test_stores_are_the_layers_of_each_cache_and_follow_it_when_it_grows() -> None:
    caches = tuple(KVCache(2, 3, 16, dtype=torch.bfloat16, capacity=capacity) for capacity in (4, 9))
    view = AttentionView(lengths=(4, 2), caches=caches)
    assert [len(stores) for stores in view.stores] == [2, 2], "by layer, then by cache"
    assert [tuple(store.keys_PGWD.shape) for store in view.stores[1]] == [(1, 3, 4, 16), (1, 3, 9, 16)]
    assert view.sequences.pages_BP.tolist() == [[0], [0]]
    ones = torch.ones(4, 3, 16, dtype=torch.bfloat16)
    caches[0].write(1, ones, 2 * ones)
    assert (view.stores[1][0].keys_PGWD == 1).all()
    assert (view.stores[1][0].values_PGWD == 2).all()
    view.commit()
    later = AttentionView(lengths=(1, 1), caches=caches)
    assert later.stores[0][0].keys_PGWD.shape[2] >= 5, "room for the step"
    assert later.stores[0][1] is view.stores[0][1], "made once per growth"
    assert later.sequences.lengths_B.tolist() == [5, 3]


@pytest.mark.parametrize("lengths", [(), (0,), (3, 0)])
def test_empty_sequences_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="lengths"):
        AttentionView(lengths=lengths)


def test_caches_and_lengths_must_match() -> None:
    with pytest.raises(ShapeError, match="0 caches for 1 sequences"):
        AttentionView(lengths=(1,), caches=())


def test_a_paged_view_counts_on_from_its_starts_and_has_one_store_per_layer() -> None:
    keys, values = torch.zeros(2, 5, 2, 16, 16)
    pool = KvPages(keys_PGWD=keys, values_PGWD=values)
    pages = torch.tensor([[3, 1], [4, 0]], dtype=torch.int32)
    view = PagedView(lengths=(2, 1), starts=(15, 3), pages_BP=pages, pools=(pool, pool))
    assert view.keeps
    assert view.positions().tolist() == [15, 16, 3]
    assert view.sequences.lengths_B.tolist() == [17, 4]
    assert view.sequences.pages_BP is pages
    assert view.stores == ((pool,), (pool,))
    view.commit()
    assert view.positions().tolist() == [15, 16, 3], "the pool's owner counts"
    with pytest.raises(ShapeError, match="2 sequences with 1 starts"):
        PagedView(lengths=(2, 1), starts=(15,), pages_BP=pages, pools=(pool,))
