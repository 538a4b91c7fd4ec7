"""The page pool: books that balance whatever happens, keys that depend on all that came before."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.engine.pages import Books, PagePool


def keys_of(pool: PagePool, tokens: list[int], salt: str = "") -> list[bytes]:
    keys: list[bytes] = []
    pool.extend_keys(keys, tokens, salt)
    return keys


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 3)), max_size=80), st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_books_balance_after_any_sequence_of_calls(calls: list[tuple[int, int, int]], remembers: bool) -> None:
    """Sequences come (sharing what is known), grow, publish, leave; the model of the books is a list of their pages."""
    pool = PagePool(12, 4, remembers=remembers)
    held: list[list[int]] = []
    for kind, size, seed in calls:
        if kind <= 1:
            keys = keys_of(pool, [seed] * 4 * size)
            known = pool.find(keys)
            assert remembers or not known
            if size - len(known) + pool.num_unused(known) <= pool.available:
                pool.share(known)
                held.append(known + pool.take(size - len(known)))
                if kind == 1:
                    for page, key in zip(held[-1], keys, strict=True):
                        pool.publish(page, key)
        elif kind == 2 and held and size <= pool.available:
            held[seed % len(held)] += pool.take(size)
        elif kind == 3 and held:
            pool.give_back(held.pop(seed % len(held)))
        elif kind == 4 and size == 5:
            pool.forget_all()
        books = pool.check(held)
        assert books.in_use == len({page for pages in held for page in pages})
    for pages in held:
        pool.give_back(pages)
    books = pool.check()
    assert (books.in_use, books.free + books.cached) == (0, 12)
    assert remembers or books.cached == 0
    assert pool.available == 12


def test_what_was_unused_longest_is_forgotten_first_and_ends_before_beginnings() -> None:
    pool = PagePool(4, 2)
    first, second = keys_of(pool, [1, 1, 2, 2]), keys_of(pool, [3, 3])
    pages = pool.take(2)
    for page, key in zip(pages, first, strict=True):
        pool.publish(page, key)
    pool.give_back(pages)
    other = pool.take(1)
    pool.publish(other[0], second[0])
    pool.give_back(other)
    assert pool.books() == Books(free=1, cached=3, in_use=0, total=4)
    pool.take(2)  # the free one and one more
    assert len(pool.find(first)) == 1, "the page at the end of the prefix went, its beginning stayed"
    assert len(pool.find(second)) == 1
    pool.take(1)
    assert (pool.find(first), len(pool.find(second))) == ([], 1)


def test_a_page_in_use_is_never_taken() -> None:
    pool = PagePool(3, 2)
    keys = keys_of(pool, [1, 1])
    page = pool.take(1)
    pool.publish(page[0], keys[0])
    pool.give_back(page)
    pool.share(page)
    assert page[0] not in pool.take(2)
    with pytest.raises(AssertionError, match="1 pages taken, 0 available"):
        pool.take(1)


def test_keys_depend_on_the_whole_prefix_the_salt_and_the_pool() -> None:
    pool = PagePool(1, 2)
    base = keys_of(pool, [1, 2, 3, 4, 5])
    assert len(base) == 2, "full pages only"
    assert keys_of(pool, [1, 2, 3, 4]) == base
    assert keys_of(pool, [9, 2, 3, 4])[1] != base[1]
    assert not set(keys_of(pool, [1, 2, 3, 4], "tenant")) & set(base)
    assert not set(keys_of(PagePool(1, 2), [1, 2, 3, 4])) & set(base), "another secret"
    assert keys_of(pool, [1, 2, 1, 2])[0] != keys_of(pool, [1, 2, 1, 2])[1]


def test_equal_pages_are_known_once() -> None:
    pool = PagePool(4, 2)
    (key,) = keys_of(pool, [1, 2])
    first, second = pool.take(1), pool.take(1)
    pool.publish(first[0], key)
    pool.publish(second[0], key)
    assert pool.find([key]) == first
    pool.give_back(second)
    assert pool.check([first]) == Books(free=3, cached=0, in_use=1, total=4)


def test_check_finds_wrong_books() -> None:
    pool = PagePool(4, 2)
    pages = pool.take(2)
    with pytest.raises(AssertionError, match="users of pages"):
        pool.check([])
    pool._free.append(pages[0])
    with pytest.raises(AssertionError, match="somewhere else"):
        pool.check([pages])
    with pytest.raises(AssertionError, match="has no user"):
        PagePool(2, 2).give_back([1])
