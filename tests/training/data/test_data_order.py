"""The order of samples: complete in every epoch, true to the weights in every prefix, and known from the seed alone."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.training.data.order import KeyedPermutation, Sample, SampleOrder


@given(size=st.integers(1, 300), key=st.text(max_size=5))
def test_a_permutation_takes_every_place_once(size: int, key: str) -> None:
    order = KeyedPermutation(size, key)
    assert sorted(order(place) for place in range(size)) == list(range(size))


def test_large_permutations_cost_nothing() -> None:
    order = KeyedPermutation(10**12, "k")
    values = {order(place) for place in range(500)}
    assert len(values) == 500
    assert 0.4e12 < sum(values) / 500 < 0.6e12


def test_all_orders_of_three_occur_alike() -> None:
    seen = Counter(tuple(KeyedPermutation(3, str(key))(place) for place in range(3)) for key in range(3000))
    assert len(seen) == 6
    assert all(400 < count < 600 for count in seen.values())


def test_neighbours_do_not_stay_neighbours() -> None:
    order = KeyedPermutation(4096, "k")
    values = [order(place) for place in range(4096)]
    near = sum(abs(a - b) < 64 for a, b in itertools.pairwise(values))
    assert near < 4096 * 2 * 64 / 4096 * 2, "twice what chance brings"


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any), epochs=st.integers(1, 3))
def test_without_weights_every_row_comes_once_per_epoch(sizes: list[int], epochs: int) -> None:
    order = SampleOrder(sizes, seed=3)
    for _ in range(epochs):
        drawn = [order.draw() for _ in range(sum(sizes))]
        rows = Counter((sample.source, order.row(sample)) for sample in drawn)
        assert rows == Counter((source, row) for source, size in enumerate(sizes) for row in range(size))


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5))
def test_every_prefix_keeps_the_shares(weights: list[float]) -> None:
    order = SampleOrder([7] * len(weights), weights)
    for place in range(1, 200):
        order.draw()
        for taken, weight in zip(order.taken, weights, strict=True):
            share = place * weight / sum(weights)
            assert taken < share + 1 + 1e-6
            assert taken > share - len(weights)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def rows(seed: int, epoch: int, shuffle: bool = True) -> list[int]:
        order = SampleOrder([50, 5], seed=seed, shuffle=shuffle)
        return [order.row(Sample(0, epoch * 50 + place)) for place in range(50)]

    assert len({tuple(rows(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert rows(1, 2) == rows(1, 2)
    assert rows(1, 2, shuffle=False) == list(range(50))


def test_sources_of_one_size_have_orders_of_their_own() -> None:
    order = SampleOrder([50, 50])
    assert [order.row(Sample(0, idx)) for idx in range(50)] != [order.row(Sample(1, idx)) for idx in range(50)]


def test_what_was_taken_is_all_of_the_state() -> None:
    first, second = (SampleOrder([10, 20, 5], [3, 1, 2], seed=1) for _ in range(2))
    for _ in range(37):
        first.draw()
    second.taken = list(first.taken)
    after = [(order.draw(), order.draw()) for order in (first, second)]
    assert after[0] == after[1]


def test_only_the_first_epoch_is_new() -> None:
    order = SampleOrder([3])
    assert [order.is_first_epoch(Sample(0, idx)) for idx in (0, 2, 3)] == [True, True, False]
    with pytest.raises(AssertionError, match="place 3 of 3"):
        KeyedPermutation(3, "k")(3)
