"""Paged attention and the rotary append: reference against a plain formula, native against reference, and the same bits on every
instruction set, for any thread count, any neighbours and any cut of a prompt into chunks.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.kernels.attention import (
    KvPages,
    Sequences,
    attend,
    attention,
    attention_reference,
    rope_append,
    rope_append_reference,
    to_int8,
)
from ernie45.kernels.choice import kernels
from ernie45.layers.rope import apply_rotary, rotary_rotation

DTYPES = (torch.float32, torch.bfloat16, torch.int8)
# Outputs are averages of values around 1 in size; both sides sum at most some hundred float32 terms.
TOLERANCE: dict[str, Any] = {"atol": 5e-6, "rtol": 1e-5}


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_sequences(steps: list[tuple[int, int]], slots: int, *, seed: int = 0) -> tuple[Sequences, int]:
    """Sequences of (new tokens, length) with shuffled pages of their own, and the number of pages in all."""
    needed = [-(-length // slots) for _, length in steps]
    num_pages = sum(needed) + 3
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist()
    table = torch.full((len(steps), max([1, *needed])), -1, dtype=torch.int32)  # -1: must not be looked at
    for row, count in zip(table, needed, strict=True):
        row[:count] = int32([order.pop() for _ in range(count)])
    sequences = Sequences(
        fresh_B=int32([fresh for fresh, _ in steps]), lengths_B=int32([length for _, length in steps]), pages_BP=table
    )
    return sequences, num_pages


def make_store(
    num_pages: int, heads: int, slots: int, dim: int, dtype: torch.dtype, *, size: float = 1.0, seed: int = 1
) -> KvPages:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (size * torch.randn(num_pages, heads, slots, dim, generator=generator) for _ in range(2))
    if dtype != torch.int8:
        return KvPages(keys_PGWD=keys.to(dtype), values_PGWD=values.to(dtype))
    (keys, key_scales), (values, value_scales) = to_int8(keys), to_int8(values)
    return KvPages(keys_PGWD=keys, values_PGWD=values, key_scales_PGW=key_scales, value_scales_PGW=value_scales)


def plain(q_TND: Tensor, store: KvPages, sequences: Sequences, scale: float) -> Tensor:
    """Softmax attention in float64, one query head of one token at a time."""
    out, token = torch.empty_like(q_TND), 0
    groups, slots = store.keys_PGWD.shape[1:3]
    per_group = q_TND.shape[1] // groups
    for fresh, length, pages in zip(
        sequences.fresh_B.tolist(), sequences.lengths_B.tolist(), sequences.pages_BP.tolist(), strict=True
    ):
        for position in range(length - fresh, length):
            for head in range(q_TND.shape[1]):
                rows = []
                for tensor, scales in (
                    (store.keys_PGWD, store.key_scales_PGW),
                    (store.values_PGWD, store.value_scales_PGW),
                ):
                    at = [(pages[i // slots], head // per_group, i % slots) for i in range(position + 1)]
                    wide = torch.stack([tensor[where].double() for where in at])
                    if scales is not None:
                        wide = wide * torch.stack([scales[where].double() for where in at])[:, None]
                    rows.append(wide)
                weights = (rows[0] @ q_TND[token, head].double() * scale).softmax(0)
                out[token, head] = (weights @ rows[1]).float()
            token += 1
    return out


def queries(sequences: Sequences, heads: int, dim: int, seed: int = 2) -> Tensor:
    return torch.randn(sequences.num_tokens, heads, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_the_plain_formula(dtype: torch.dtype) -> None:
    sequences, num_pages = make_sequences([(1, 9), (5, 5), (0, 3), (3, 21)], slots=4)
    store, q = make_store(num_pages, 2, 4, 16, dtype), queries(sequences, 6, 16)
    out = attention_reference(q, store, sequences, 0.25)
    torch.testing.assert_close(out, plain(q, store, sequences, 0.25), **TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("steps", "heads", "groups", "dim", "slots"),
    [
        ([(1, 1)], 1, 1, 16, 16),
        ([(1, 600)], 16, 2, 128, 64),  # three blocks of keys
        ([(1, 256), (1, 257), (1, 512)], 20, 4, 128, 16),  # at the borders of a block
        ([(40, 300), (1, 77)], 10, 2, 64, 64),  # tiles that hold several queries
        ([(3, 3), (7, 270)], 33, 3, 48, 300),  # 11 heads per group; one page each
        ([(2, 40)], 3, 3, 256, 1),
    ],
)
def test_native_is_the_reference(
    isa: str, dtype: torch.dtype, steps: list[tuple[int, int]], heads: int, groups: int, dim: int, slots: int
) -> None:
    sequences, num_pages = make_sequences(steps, slots)
    store, q = make_store(num_pages, groups, slots, dim, dtype), queries(sequences, heads, dim)
    expected = attention_reference(q, store, sequences, dim**-0.5)
    torch.testing.assert_close(attention(q, store, sequences, dim**-0.5), expected, **TOLERANCE)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_gives_the_reference_and_the_same_bits_everywhere(
    extension: ModuleType, isas: list[str], data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.integers(0, 300), min_size=0, max_size=4))
    steps = [(data.draw(st.integers(0, min(length, 40))), length) for length in lengths]
    groups, per_group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    dim, slots = 16 * data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 5, 16, 64]))
    sequences, num_pages = make_sequences(steps, slots)
    store = make_store(num_pages, groups, slots, dim, data.draw(st.sampled_from(DTYPES)))
    q = queries(sequences, groups * per_group, dim)
    results = []
    for name in isas:
        extension.set_isa(name)
        extension.set_num_threads(data.draw(st.integers(1, 3)))
        results.append(attention(q, store, sequences, dim**-0.5))
    torch.testing.assert_close(results[0], attention_reference(q, store, sequences, dim**-0.5), **TOLERANCE)
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_thread_count_changes_no_bit(extension: ModuleType, dtype: torch.dtype) -> None:
    sequences, num_pages = make_sequences([(1, 1500), (33, 700), (1, 3)], slots=64)
    store, q = make_store(num_pages, 2, 64, 64, dtype), queries(sequences, 10, 64)
    results = []
    for threads in range(1, 9):
        extension.set_num_threads(threads)
        results.append(attention(q, store, sequences, 0.125))
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_of_blocks_change_no_bit(extension: ModuleType, isas: list[str], dtype: torch.dtype) -> None:
    """So many blocks that a task takes several; pages end within the vectors of keys; 5 and 7 rows need passes of their own."""
    sequences, num_pages = make_sequences([(1, 8200), (1, 4100)], slots=77)
    for per_group in (5, 7):
        store, q = make_store(num_pages, 1, 77, 48, dtype), queries(sequences, per_group, 48)
        results = []
        for name in isas:
            extension.set_isa(name)
            for threads in (1, 2, 5):
                extension.set_num_threads(threads)
                results.append(attention(q, store, sequences, 0.2))
        assert all(torch.equal(results[0], result) for result in results)
        torch.testing.assert_close(results[0], attention_reference(q, store, sequences, 0.2), **TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 15, 17, 33, 255, 257])
def test_slots_behind_the_end_are_not_looked_at(isa: str, dtype: torch.dtype, length: int) -> None:
    """Keys are taken 16 at a time: what lies behind the last one may be anything."""
    sequences, num_pages = make_sequences([(1, length)], slots=20)
    store, q = make_store(num_pages, 2, 20, 32, dtype), queries(sequences, 6, 32)
    before = attention(q, store, sequences, 0.2)
    used = sequences.pages_BP[0].tolist()
    behind = [page for page in range(num_pages) if page not in used]
    for tensor in (store.keys_PGWD, store.values_PGWD, store.key_scales_PGW, store.value_scales_PGW):
        if tensor is not None:
            fill = torch.nan if tensor.is_floating_point() else 127
            tensor[behind] = fill
            tensor[used[-1], :, (length - 1) % 20 + 1 :] = fill
    assert torch.equal(attention(q, store, sequences, 0.2), before)


def test_neighbours_change_no_bit(isa: str) -> None:
    steps = [(1, 900), (40, 300), (1, 1), (5, 261)]
    sequences, num_pages = make_sequences(steps, slots=16)
    store, q = make_store(num_pages, 2, 16, 32, torch.bfloat16), queries(sequences, 10, 32)
    together = attention(q, store, sequences, 0.2).split([fresh for fresh, _ in steps])
    for index, part in enumerate(q.split([fresh for fresh, _ in steps])):
        one = Sequences(
            fresh_B=sequences.fresh_B[index : index + 1],
            lengths_B=sequences.lengths_B[index : index + 1],
            pages_BP=sequences.pages_BP[index : index + 1],
        )
        assert torch.equal(attention(part, store, one, 0.2), together[index])


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_change_no_bit(isa: str, dtype: torch.dtype) -> None:
    heads, groups, dim, length = 10, 2, 32, 290
    qkv = torch.randn(length, (heads + 2 * groups) * dim, generator=torch.Generator().manual_seed(5))
    rotation = rotary_rotation(torch.arange(length), dim, 10000.0)

    def run(chunks: list[int]) -> Tensor:
        sequences, num_pages = make_sequences([(0, length)], slots=16)
        store, outputs, end = make_store(num_pages, groups, 16, dim, dtype, seed=len(chunks)), [], 0
        for chunk in chunks:
            end += chunk
            step = replace(sequences, fresh_B=int32([chunk]), lengths_B=int32([end]))
            here = slice(end - chunk, end)
            q = rope_append(qkv[here], rotation[here], heads, store, step)
            outputs.append(attention(q, store, step, dim**-0.5))
        return torch.cat(outputs)

    at_once = run([length])
    assert torch.equal(run([100, 1, 189]), at_once)
    assert torch.equal(run([250] + [1] * 40), at_once)


def test_pages_and_a_contiguous_cache_give_the_same_bits(isa: str) -> None:
    """The layer of a cache (2, L, G, capacity, D) is one page; a pool may hold layers between page and head."""
    length, groups, dim, slots = 70, 2, 32, 16
    cache = torch.randn(2, 3, groups, 100, dim, generator=torch.Generator().manual_seed(1))
    pool = torch.zeros(9, 2, 3, groups, slots, dim)
    order = [8, 2, 5, 0, 7]
    for index, page in enumerate(order):
        part = cache[:, :, :, index * slots : (index + 1) * slots]
        pool[page, :, :, :, : part.shape[3]] = part
    contiguous = KvPages(keys_PGWD=cache[0, 1][None], values_PGWD=cache[1, 1][None])
    paged = KvPages(keys_PGWD=pool[:, 0, 1], values_PGWD=pool[:, 1, 1])
    counts = {"fresh_B": int32([4]), "lengths_B": int32([length])}
    q = torch.randn(4, 4, dim, generator=torch.Generator().manual_seed(2))
    first = attention(q, contiguous, Sequences(**counts, pages_BP=int32([0])[None]), 0.2)
    second = attention(q, paged, Sequences(**counts, pages_BP=int32(order)[None]), 0.2)
    assert torch.equal(first, second)
    torch.testing.assert_close(
        second, plain(q, paged, Sequences(**counts, pages_BP=int32(order)[None]), 0.2), **TOLERANCE
    )


def test_huge_scores_pick_one_key_and_do_not_overflow(isa: str) -> None:
    sequences, num_pages = make_sequences([(2, 400)], slots=64)
    store, q = make_store(num_pages, 1, 64, 64, torch.float32, size=30.0), 30 * queries(sequences, 2, 64)
    out = attention(q, store, sequences, 1.0)
    # One ulp of a score of some 10,000 is 0.001, which is the relative error of its weight.
    torch.testing.assert_close(out, plain(q, store, sequences, 1.0), atol=0.2, rtol=1e-2)
    assert out.isfinite().all()


def test_a_nan_stays_visible(isa: str) -> None:
    sequences, num_pages = make_sequences([(1, 30), (1, 30)], slots=16)
    store, q = make_store(num_pages, 1, 16, 16, torch.float32), queries(sequences, 1, 16)
    q[0, 0, 3] = torch.nan
    out = attention(q, store, sequences, 0.25)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_int8_keys_and_values_stay_near_the_unrounded(isa: str) -> None:
    """Stated error of 8-bit keys and values: 2 % of the output's root mean square, for normal values."""
    sequences, num_pages = make_sequences([(8, 500)], slots=64)
    q = queries(sequences, 4, 128)
    exact = attention(q, make_store(num_pages, 2, 64, 128, torch.float32), sequences, 128**-0.5)
    rounded = attention(q, make_store(num_pages, 2, 64, 128, torch.int8), sequences, 128**-0.5)
    error = (rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 0.02


@pytest.mark.parametrize("native", [True, False])
def test_no_tokens(native: bool, extension: ModuleType) -> None:
    for steps in ([], [(0, 0), (0, 5)]):
        sequences, num_pages = make_sequences(steps, slots=4)
        store = make_store(num_pages, 1, 4, 16, torch.float32)
        before = store.keys_PGWD.clone()
        with kernels("native" if native else "reference"):
            assert attention(torch.empty(0, 2, 16), store, sequences, 1.0).shape == (0, 2, 16)
            q = rope_append(torch.empty(0, 64), torch.empty(0, 8, dtype=torch.complex64), 2, store, sequences)
        assert q.shape == (0, 2, 16)
        assert torch.equal(store.keys_PGWD, before)


# --- rope_append ---------------------------------------------------------------------------------------------------------


def append_case(dtype: torch.dtype) -> tuple[Tensor, Tensor, KvPages, Sequences]:
    sequences, num_pages = make_sequences([(1, 9), (6, 6), (3, 21)], slots=4)
    qkv = torch.randn(10, (6 + 4) * 48, generator=torch.Generator().manual_seed(3))
    rotation = rotary_rotation(torch.arange(100, 110), 48, 10000.0)
    return qkv, rotation, make_store(num_pages, 2, 4, 48, dtype), sequences


def test_rope_append_writes_what_the_layers_compute(isa: str) -> None:
    qkv, rotation, store, sequences = append_case(torch.float32)
    expected = replace(store, keys_PGWD=store.keys_PGWD.clone(), values_PGWD=store.values_PGWD.clone())
    q = rope_append(qkv, rotation, 6, store, sequences)
    heads = qkv.unflatten(1, (10, 48))
    turned = apply_rotary(heads[:, :8], rotation)
    token = 0
    for fresh, length, pages in zip(
        sequences.fresh_B.tolist(), sequences.lengths_B.tolist(), sequences.pages_BP.tolist(), strict=True
    ):
        for position in range(length - fresh, length):
            expected.keys_PGWD[pages[position // 4], :, position % 4] = turned[token, 6:]
            expected.values_PGWD[pages[position // 4], :, position % 4] = heads[token, 8:]
            token += 1
    torch.testing.assert_close(q, turned[:, :6], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(store.keys_PGWD, expected.keys_PGWD, atol=1e-6, rtol=1e-6)
    assert torch.equal(store.values_PGWD, expected.values_PGWD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_narrow_stores_hold_the_rounded_float32(isa: str, dtype: torch.dtype) -> None:
    """Bit for bit: float32 keys of the same kernel, rounded by PyTorch."""
    qkv, rotation, wide, sequences = append_case(torch.float32)
    wide.keys_PGWD.zero_()
    wide.values_PGWD.zero_()
    store = append_case(dtype)[2]
    for tensor in (store.keys_PGWD, store.values_PGWD, store.key_scales_PGW, store.value_scales_PGW):
        if tensor is not None:
            tensor.zero_()
    qkv[0, :] = 0.0
    rope_append(qkv, rotation, 6, wide, sequences)
    rope_append(qkv, rotation, 6, store, sequences)
    for narrow, scales, full in (
        (store.keys_PGWD, store.key_scales_PGW, wide.keys_PGWD),
        (store.values_PGWD, store.value_scales_PGW, wide.values_PGWD),
    ):
        if scales is None:
            assert torch.equal(narrow, full.to(dtype))
        else:
            values, expected_scales = to_int8(full)
            assert torch.equal(narrow, values)
            assert torch.equal(scales, expected_scales)


def test_bfloat16_rounding_of_special_values(isa: str) -> None:
    special = [0.0, -0.0, 1.00390625, 1.01171875, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-40, -1.2345678]
    sequences, num_pages = make_sequences([(1, 1)], slots=4)
    store = make_store(num_pages, 1, 4, 16, torch.bfloat16)
    qkv = torch.zeros(1, 48)
    qkv[0, 32 : 32 + len(special)] = torch.tensor(special)
    rope_append(qkv, torch.ones(1, 8, dtype=torch.complex64), 1, store, sequences)
    page = int(sequences.pages_BP[0, 0])
    found, expected = store.values_PGWD[page, 0, 0, : len(special)], torch.tensor(special).to(torch.bfloat16)
    assert torch.equal(found.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(found[number].view(torch.int16), expected[number].view(torch.int16))


def test_rope_append_bits_are_those_of_the_baseline(extension: ModuleType, isas: list[str]) -> None:
    results = []
    for name in isas:
        extension.set_isa(name)
        qkv, rotation, store, sequences = append_case(torch.float32)
        results.append((rope_append(qkv, rotation, 6, store, sequences), store.keys_PGWD))
    assert all(torch.equal(a, b) for result in results for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_reference_is_the_native(extension: ModuleType, dtype: torch.dtype) -> None:
    qkv, rotation, store, sequences = append_case(dtype)
    other = append_case(dtype)[2]
    q, expected = (
        rope_append(qkv, rotation, 6, store, sequences),
        rope_append_reference(qkv, rotation, 6, other, sequences),
    )
    torch.testing.assert_close(q, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(store.values_PGWD, other.values_PGWD)
    # A key may fall on the other side of a rounding border.
    torch.testing.assert_close(
        store.keys_PGWD.float(), other.keys_PGWD.float(), atol=1.0 if dtype == torch.int8 else 1e-6, rtol=0.01
    )


# --- several stores, and both operations in one --------------------------------------------------------------------------


def separate_stores(steps: list[tuple[int, int]], slots: list[int], dtypes: list[torch.dtype]) -> list[KvPages]:
    """A store per sequence, of its own page size and type."""
    return [
        make_store(-(-length // size) + 1, 2, size, 32, dtype, seed=index)
        for index, ((_, length), size, dtype) in enumerate(zip(steps, slots, dtypes, strict=True))
    ]


def in_order(steps: list[tuple[int, int]], slots: list[int]) -> Sequences:
    """Sequences that use the pages of their own stores from the last one down."""
    needed = [-(-length // size) for (_, length), size in zip(steps, slots, strict=True)]
    table = torch.full((len(steps), max(needed)), -1, dtype=torch.int32)
    for row, count in zip(table, needed, strict=True):
        row[:count] = torch.arange(count, 0, -1, dtype=torch.int32)
    return Sequences(
        fresh_B=int32([fresh for fresh, _ in steps]), lengths_B=int32([length for _, length in steps]), pages_BP=table
    )


@pytest.mark.parametrize("choice", ["native", "reference"])
def test_one_call_over_several_stores_is_a_call_for_each(extension: ModuleType, choice: Any) -> None:
    """To the bit, outputs and stores; page sizes and types may differ."""
    steps, slots = [(1, 700), (30, 300), (1, 1), (4, 259)], [700, 16, 64, 300]
    dtypes = [torch.float32, torch.bfloat16, torch.int8, torch.bfloat16]
    together, alone = separate_stores(steps, slots, dtypes), separate_stores(steps, slots, dtypes)
    sequences = in_order(steps, slots)
    qkv = torch.randn(36, 14 * 32, generator=torch.Generator().manual_seed(3))
    rotation = rotary_rotation(torch.arange(36), 32, 10000.0)
    with kernels(choice):
        out = attend(qkv, rotation, 10, tuple(together), sequences, 0.2)
        lengths = [fresh for fresh, _ in steps]
        for index, (part, turn, expected) in enumerate(
            zip(qkv.split(lengths), rotation.split(lengths), out.split(lengths), strict=True)
        ):
            here = slice(index, index + 1)
            one = Sequences(
                fresh_B=sequences.fresh_B[here],
                lengths_B=sequences.lengths_B[here],
                pages_BP=sequences.pages_BP[here],
            )
            q = rope_append(part, turn, 10, alone[index], one)
            assert torch.equal(attention(q, alone[index], one, 0.2).flatten(1), expected)
            assert torch.equal(alone[index].keys_PGWD, together[index].keys_PGWD)
            assert torch.equal(alone[index].values_PGWD, together[index].values_PGWD)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_stores_give_the_reference_and_the_same_bits_everywhere(
    extension: ModuleType, isas: list[str], data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=5))
    steps = [(data.draw(st.integers(0, min(length, 20))), length) for length in lengths]
    slots = [data.draw(st.sampled_from([5, 64, 300])) for _ in steps]
    dtypes = [data.draw(st.sampled_from(DTYPES)) for _ in steps]
    sequences = in_order(steps, slots)
    q = queries(sequences, 6, 32)
    stores = tuple(separate_stores(steps, slots, dtypes))
    results = []
    for name in isas:
        extension.set_isa(name)
        extension.set_num_threads(data.draw(st.integers(1, 3)))
        results.append(attention(q, stores, sequences, 0.2))
    torch.testing.assert_close(results[0], attention_reference(q, stores, sequences, 0.2), **TOLERANCE)
    assert all(torch.equal(results[0], result) for result in results)


# --- refusals ------------------------------------------------------------------------------------------------------------


def test_wrong_inputs_are_refused() -> None:
    sequences, num_pages = make_sequences([(2, 9)], slots=4)
    store, q = make_store(num_pages, 2, 4, 16, torch.float32), queries(sequences, 4, 16)
    for bad in (
        q.double(),
        q[:1],
        q[..., :8],
        torch.randn(2, 16, 4).mT,
        q[:, :3].contiguous(),
        q.flatten(1),
        q.to("meta"),
    ):
        with pytest.raises(ShapeError, match=r"\[attention\]"):
            attention(bad, store, sequences, 1.0)
    qkv, rotation = torch.randn(2, 8 * 16), torch.ones(2, 8, dtype=torch.complex64)
    for bad_qkv, bad_rotation in (
        (qkv[:, :-16], rotation),
        (qkv, rotation.real),
        (qkv[:1], rotation),
        (qkv.double(), rotation),
    ):
        with pytest.raises(ShapeError, match=r"\[rope_append\]"):
            rope_append(bad_qkv, bad_rotation, 4, store, sequences)


def test_wrong_stores_are_refused() -> None:
    keys = torch.randn(3, 2, 4, 16)
    scales = torch.randn(3, 2, 4)
    for arguments in (
        {"keys_PGWD": keys[0], "values_PGWD": keys[0]},
        {"keys_PGWD": keys, "values_PGWD": keys.bfloat16()},
        {"keys_PGWD": keys, "values_PGWD": keys[:2]},
        {"keys_PGWD": keys.half(), "values_PGWD": keys.half()},
        {"keys_PGWD": keys[..., :8], "values_PGWD": keys[..., :8]},
        {"keys_PGWD": torch.randn(3, 4, 2, 16).transpose(1, 2), "values_PGWD": keys},
        {"keys_PGWD": keys, "values_PGWD": keys, "key_scales_PGW": scales, "value_scales_PGW": scales},
        {"keys_PGWD": keys.to(torch.int8), "values_PGWD": keys.to(torch.int8), "key_scales_PGW": scales},
        {"keys_PGWD": keys.to("meta"), "values_PGWD": keys.to("meta")},
    ):
        with pytest.raises(ShapeError, match=r"\[KvPages\]"):
            KvPages(**arguments)


def test_wrong_sequences_are_refused() -> None:
    pages = int32([0, 1])[None]
    for fresh, length in ((-1, 3), (4, 3)):
        with pytest.raises(ShapeError, match=r"\[Sequences\]"):
            Sequences(fresh_B=int32([fresh]), lengths_B=int32([length]), pages_BP=pages)
    with pytest.raises(ShapeError, match="lengths"):
        Sequences(fresh_B=int32([1]), lengths_B=int32([1, 1]), pages_BP=pages)
    with pytest.raises(ShapeError, match="int32"):
        Sequences(fresh_B=int32([1]).long(), lengths_B=int32([1]), pages_BP=pages)


@pytest.mark.parametrize("choice", ["native", "reference"])
@pytest.mark.parametrize(
    ("pages", "message"),
    [([0, 1], "expected 3 pages for 9 tokens"), ([0, 1, 3], "pages from 0 to 2, got 3"), ([0, -1, 1], "got -1")],
)
def test_pages_outside_the_store_are_refused(
    extension: ModuleType, choice: str, pages: list[int], message: str
) -> None:
    sequences = Sequences(fresh_B=int32([1]), lengths_B=int32([9]), pages_BP=int32(pages)[None])
    store = make_store(3, 1, 4, 16, torch.float32)
    with kernels(choice):  # type: ignore[arg-type]
        with pytest.raises(ShapeError, match=message):
            attention(torch.randn(1, 1, 16), store, sequences, 1.0)
        with pytest.raises(ShapeError, match=message):
            rope_append(torch.randn(1, 48), torch.ones(1, 8, dtype=torch.complex64), 1, store, sequences)


@pytest.mark.parametrize("choice", ["native", "reference"])
def test_stores_that_do_not_belong_together_are_refused(extension: ModuleType, choice: Any) -> None:
    steps = [(1, 9), (1, 5), (1, 2)]
    sequences = in_order(steps, [4, 4, 4])
    stores = tuple(separate_stores(steps, [4, 4, 4], [torch.float32] * 3))
    other = make_store(3, 1, 4, 32, torch.float32)
    with kernels(choice):
        for wrong, message in (
            ((), "got none"),
            (stores[:2], "one for each of 3 sequences, got 2"),
            ((*stores[:2], other), "equal heads"),
            ((stores[2],), "sequence 0"),
        ):
            with pytest.raises(ShapeError, match=message):
                attention(queries(sequences, 4, 32), wrong, sequences, 1.0)
            with pytest.raises(ShapeError, match=message):
                attend(torch.randn(3, 8 * 32), torch.ones(3, 16, dtype=torch.complex64), 4, wrong, sequences, 1.0)


def test_sequences_keep_what_was_checked(extension: ModuleType) -> None:
    """Numbers that change afterwards must not lead a kernel out of its memory."""
    sequences, num_pages = make_sequences([(2, 9)], slots=4)
    store, q = make_store(num_pages, 2, 4, 16, torch.float32), queries(sequences, 4, 16)
    before = attention(q, store, sequences, 1.0)
    sequences.pages_BP.fill_(1 << 20)
    assert torch.equal(attention(q, store, sequences, 1.0), before)


def test_tensors_that_a_kernel_cannot_take_as_they_are_are_refused(extension: ModuleType) -> None:
    """A gradient would be dropped and a lazy conjugation overlooked, in silence."""
    sequences, num_pages = make_sequences([(2, 9)], slots=4)
    store, qkv = make_store(num_pages, 2, 4, 16, torch.float32), torch.randn(2, 8 * 16)
    rotation = torch.ones(2, 8, dtype=torch.complex64)
    for bad_qkv, bad_rotation in ((qkv.requires_grad_(), rotation), (qkv.detach(), rotation.conj())):
        with pytest.raises(ShapeError, match="incompatible function arguments"):
            attend(bad_qkv, bad_rotation, 4, store, sequences, 1.0)
