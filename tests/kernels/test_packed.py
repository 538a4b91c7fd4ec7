"""Packed matrices: layout, products and the whole feed-forward, against references and against dequantized weights."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.kernels import packed
from ernie45.kernels.choice import kernels
from ernie45.kernels.packed import PackedFfn, PackedFormat, PackedMatrix, PackedPool

ACTIVATIONS: tuple[Literal[8, 16], ...] = (8, 16)
FORMATS = [
    PackedFormat(bits=bits, group=group, activation_bits=activation_bits)
    for bits in (4, 8)
    for activation_bits in ACTIVATIONS
    for group in (0, 32, 64, 128)
    if bits == 4 or group != 32
]
EIGHT = PackedFormat(bits=8, group=0)
every_format = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f"w{f.bits}g{f.group}a{f.activation_bits}")
# Native and reference round at different places: one fused multiply-add per group against a multiply and an add.
TOLERANCE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-5}


def matrix(rows: int, columns: int, format: PackedFormat, seed: int = 0) -> PackedMatrix:
    """Random values over the whole range of the format, scales that give outputs around one."""
    generator = torch.Generator().manual_seed(seed)
    low = -8 if format.bits == 4 else -127
    values = torch.randint(low, format.largest + 1, (rows, columns), generator=generator).to(torch.int8)
    scales = (0.5 + torch.rand(format.scale_shape(rows, columns), generator=generator)) / format.largest / columns**0.5
    if format.has_minima:
        scales[..., 1] *= -7.5  # weights around zero
    return packed.pack(values, scales.half(), format)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@every_format
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 64), (17, 65), (50, 300), (3, 200)])
def test_unpack_is_the_inverse_of_pack(format: PackedFormat, rows: int, columns: int) -> None:
    values = torch.randint(-8 if format.bits == 4 else -127, format.largest + 1, (rows, columns)).to(torch.int8)
    scales = torch.rand(format.scale_shape(rows, columns)).half()
    found_values, found_scales = packed.unpack(packed.pack(values, scales, format))
    assert torch.equal(found_values, values)
    assert torch.equal(found_scales, scales)


def test_layout_by_hand() -> None:
    """Row 3, column 6 of a block: 8 bit in vector 1, byte 2 of the row's word; 4 bit in the high nibble of vector 0."""
    values = torch.zeros(16, 64, dtype=torch.int8)
    values[3, 6] = 5
    scales = torch.ones(16, 1).half()
    eight = packed.pack(values, scales, PackedFormat(bits=8, group=0)).weights
    assert {index: int(eight[index]) for index in (eight != 128).nonzero().flatten().tolist()} == {64 + 4 * 3 + 2: 133}
    four = packed.pack(values, scales, PackedFormat(bits=4, group=0)).weights
    assert {index: int(four[index]) for index in (four != 0x88).nonzero().flatten().tolist()} == {4 * 3 + 2: 0xD8}


def test_pack_refuses_what_the_format_cannot_hold() -> None:
    scales = torch.ones(2, 1).half()
    cases: list[tuple[int, Any]] = [(8, 4), (-9, 4), (-128, 8)]
    for value, bits in cases:
        with pytest.raises(ShapeError, match="quantized values run from"):
            packed.pack(torch.full((2, 64), value, dtype=torch.int8), scales, PackedFormat(bits=bits, group=0))
    with pytest.raises(ShapeError, match="scales have shape"):
        packed.pack(torch.zeros(2, 65, dtype=torch.int8), scales, PackedFormat(bits=8, group=64))
    for bits, group in ((5, 0), (4, 63), (8, -64), (8, 32)):
        with pytest.raises(ShapeError, match="packed format"):
            PackedFormat(bits=bits, group=group)  # type: ignore[arg-type]
    good = matrix(16, 64, EIGHT)
    with pytest.raises(ShapeError, match="weights and scales have shapes"):
        PackedMatrix(weights=good.weights[1:], scales=good.scales, rows=16, columns=64)
    with pytest.raises(ShapeError, match="expected uint8 and float16"):
        PackedMatrix(weights=good.weights, scales=good.scales.float(), rows=16, columns=64)


# --- linear --------------------------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize(
    ("rows", "columns", "tokens"), [(1, 1, 1), (33, 130, 3), (16, 64, 8), (100, 700, 17), (40, 2563, 1)]
)
def test_linear_is_its_reference(isa: str, format: PackedFormat, rows: int, columns: int, tokens: int) -> None:
    m, x = matrix(rows, columns, format), random(tokens, columns)
    bias, residual = random(rows, seed=2), random(tokens, rows, seed=3)
    for extras in ((None, None), (bias, None), (None, residual), (bias, residual)):
        torch.testing.assert_close(packed.linear(x, m, *extras), packed.linear_reference(x, m, *extras), **TOLERANCE)


@every_format
def test_reference_is_the_product_with_the_dequantized_weights(format: PackedFormat) -> None:
    """Inputs that the activations' bits hold exactly: whole numbers up to 127 or 32512 in each group of 64."""
    m = matrix(40, 200, format)
    x = torch.randint(-127, 128, (5, 200)).float()
    x[:, ::64] = 127 if format.activation_bits == 8 else 32512
    expected = x.double() @ packed.dequantize(m).double().T
    torch.testing.assert_close(packed.linear_reference(x, m).double(), expected, atol=1e-3, rtol=1e-5)
    noisy = random(50, 200)
    exact = noisy.double() @ packed.dequantize(m).double().T
    error = (packed.linear_reference(noisy, m) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.01, "stated error of activations rounded to 8 bits per group of 64"


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 400),
    tokens=st.integers(0, 20),
    format=st.sampled_from(FORMATS),
    threads=st.integers(1, 4),
)
def test_bits_depend_on_nothing_but_the_token(
    extension: ModuleType, isas: list[str], rows: int, columns: int, tokens: int, format: PackedFormat, threads: int
) -> None:
    m, x = matrix(rows, columns, format), random(tokens, columns)
    results = []
    for name in isas:
        extension.set_isa(name)
        extension.set_num_threads(threads)
        results.append(packed.linear(x, m))
    assert all(torch.equal(results[0], result) for result in results)
    alone = [packed.linear(x[i : i + 1], m) for i in range(tokens)]
    assert torch.equal(torch.cat([torch.empty(0, rows), *alone]), results[0])


@every_format
def test_thread_count_changes_no_bit(extension: ModuleType, format: PackedFormat) -> None:
    m, x = matrix(600, 1000, format), random(40, 1000)
    results = []
    for threads in range(1, 9):
        extension.set_num_threads(threads)
        results.append(packed.linear(x, m))
    assert all(torch.equal(results[0], result) for result in results)


@every_format
def test_extreme_weights_and_inputs_do_not_overflow(isa: str, format: PackedFormat) -> None:
    """All weights and all inputs at the ends of their range: the largest sums that 16- and 32-bit lanes have to hold."""
    low, high = (-8, 7) if format.bits == 4 else (-127, 127)
    largest = 127 if format.activation_bits == 8 else 32512
    for value in (low, high):
        scales = torch.ones(format.scale_shape(16, 128)).half()
        if format.has_minima:
            scales[..., 1] = -8
        m = packed.pack(torch.full((16, 128), value, dtype=torch.int8), scales, format)
        for x in (largest, -largest):
            y = packed.linear(torch.full((9, 128), float(x)), m)
            assert torch.equal(y, torch.full((9, 16), float(128 * x * value)))


@pytest.mark.parametrize(("activation_bits", "error"), [(8, 0.01), (16, 3e-5)])
def test_activations_keep_what_their_bits_hold(isa: str, activation_bits: Literal[8, 16], error: float) -> None:
    """Against the exact product of the dequantized weights: the size of the difference over the size of the result."""
    m = matrix(40, 200, PackedFormat(bits=8, group=64, activation_bits=activation_bits))
    x = random(50, 200)
    exact = x.double() @ packed.dequantize(m).double().T
    found = (packed.linear(x, m) - exact).norm() / exact.norm()
    assert error / 10 < found < error


@pytest.mark.parametrize("activation_bits", [8, 16])
def test_tiny_and_zero_inputs_give_zero(isa: str, activation_bits: Literal[8, 16]) -> None:
    """Below 1e-30 a group counts as zero: its scale has no inverse that a float could hold."""
    m = matrix(20, 130, PackedFormat(bits=8, group=64, activation_bits=activation_bits))
    for size in (0.0, 1e-31, 1e-44):
        x = torch.full((2, 130), size)
        assert torch.equal(packed.linear(x, m), torch.zeros(2, 20))
        assert torch.equal(packed.linear_reference(x, m), torch.zeros(2, 20))


def test_linear_refuses_other_inputs() -> None:
    m, x = matrix(20, 100, EIGHT), random(3, 100)
    for bad in (x[0], x[:, :50], x.double(), x.T.contiguous().T, x.to("meta")):
        with pytest.raises(ShapeError, match=r"\[linear\] expected a contiguous float32 tensor"):
            packed.linear(bad, m)
    with pytest.raises(ShapeError, match=r"\[linear\]"):
        packed.linear(x, m, None, random(3, 21))
    for bias in (random(21), random(20).double()):
        with pytest.raises(ShapeError, match=r"\[linear\]"):
            packed.linear(x, m, bias)


# --- top -----------------------------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize(("rows", "tokens", "count"), [(1, 1, 1), (50, 3, 5), (50, 20, 50), (700, 70, 3), (33, 0, 2)])
def test_top_is_what_sorting_the_product_gives(
    isa: str, format: PackedFormat, rows: int, tokens: int, count: int
) -> None:
    m, x, bias = matrix(rows, 130, format), random(tokens, 130), random(rows, seed=2)
    for extra in (None, bias):
        values, ids = packed.top(x, m, count, extra)
        product, order = packed.linear(x, m, extra).sort(dim=-1, descending=True, stable=True)
        assert torch.equal(values, product[:, :count])
        assert torch.equal(ids, order[:, :count])
        expected_values, expected_ids = packed.top_reference(x, m, count, extra)
        torch.testing.assert_close(values, expected_values, **TOLERANCE)
        assert values.shape == expected_ids.shape == (tokens, count)


def test_equal_values_go_to_the_lowest_column(extension: ModuleType) -> None:
    m = packed.pack(torch.ones(3000, 64, dtype=torch.int8), torch.ones(3000, 1).half(), EIGHT)
    for threads in (1, 2, 5):
        extension.set_num_threads(threads)
        assert packed.top(torch.ones(2, 64), m, 4)[1].tolist() == [[0, 1, 2, 3]] * 2


def test_top_refuses_other_counts(extension: ModuleType) -> None:
    m, x = matrix(20, 100, EIGHT), random(3, 100)
    for count in (0, 21, -1):
        with pytest.raises(ShapeError, match=r"\[top\] expected a count from 1 to 20"):
            packed.top(x, m, count)
    with pytest.raises(ShapeError, match=r"\[linear\] expected a contiguous"):
        packed.top(x.double(), m, 1)


# --- rows ----------------------------------------------------------------------------------------------------------------


@every_format
def test_rows_are_those_of_the_dequantized_matrix(isa: str, format: PackedFormat) -> None:
    m = matrix(50, 200, format)
    ids = torch.tensor([0, 49, 3, 3, 16])
    expected = packed.dequantize(m)[ids]
    assert torch.equal(packed.rows(m, ids), expected)
    assert torch.equal(packed.rows_reference(m, ids), expected)
    assert packed.rows(m, ids[:0]).shape == packed.rows_reference(m, ids[:0]).shape == (0, 200)


def test_rows_refuse_other_ids(extension: ModuleType) -> None:
    m = matrix(50, 200, EIGHT)
    for ids in (torch.tensor([50]), torch.tensor([-1]), torch.tensor([1.0]), torch.tensor([[1]])):
        with pytest.raises(ShapeError, match=r"\[rows\]"):
            packed.rows(m, ids)


# --- ffn -----------------------------------------------------------------------------------------------------------------


def unit(hidden: int, width: int, format: PackedFormat, seed: int) -> tuple[PackedFfn, Tensor, Tensor]:
    """A unit and its dequantized gate-and-up (2 I, H) and down (H, I)."""
    both, down = matrix(2 * width, hidden, format, seed), matrix(hidden, width, format, seed + 100)
    values, scales = packed.unpack(both)
    gate_up = packed.pack(packed.interleave_gate_up(values), packed.interleave_gate_up(scales), both.format)
    return PackedFfn(gate_up=gate_up, down=down), packed.dequantize(both), packed.dequantize(down)


def routed(tokens: int, experts: int, active: int) -> tuple[list[int], Tensor, Tensor]:
    """Counts, tokens and weights of a random choice of experts."""
    generator = torch.Generator().manual_seed(7)
    ids = (
        torch.stack([torch.randperm(experts, generator=generator)[:active] for _ in range(tokens)])
        if tokens
        else torch.empty(0, active, dtype=torch.int64)
    )
    order = ids.flatten().argsort(stable=True)
    weights = torch.rand(tokens * active, generator=generator)
    return torch.bincount(ids.flatten(), minlength=experts).tolist(), (order // active).to(torch.int32), weights


@every_format
@pytest.mark.parametrize("tokens", [0, 1, 11])
def test_ffn_is_its_reference_and_near_the_exact(isa: str, format: PackedFormat, tokens: int) -> None:
    """Five routed experts, two of a narrower width, and a shared one of all tokens."""
    made = [unit(130, 70 if index % 2 else 200, format, index) for index in range(6)]
    units, x, residual = [one[0] for one in made], random(tokens, 130), random(tokens, 130, seed=5)
    counts, chosen, weights = routed(tokens, 5, 2)
    y = packed.ffn(x, units, [*counts, -1], chosen, weights, residual)
    torch.testing.assert_close(
        y, packed.ffn_reference(x, units, [*counts, -1], chosen, weights, residual), atol=1e-4, rtol=1e-4
    )

    exact, start = residual.double(), 0
    for (_, gate_up, down), count in zip(made, [*counts, -1], strict=True):
        here = slice(start, start + count) if count >= 0 else None
        rows = torch.arange(tokens) if here is None else chosen[here].long()
        weight = torch.ones(tokens) if here is None else weights[here]
        start += max(count, 0)
        gate, up = (x[rows].double() @ gate_up.double().T).chunk(2, dim=1)
        exact.index_add_(0, rows, (F.silu(gate) * up) @ down.double().T * weight.double()[:, None])
    if tokens:
        error = (y - exact).square().mean().sqrt() / (exact - residual).square().mean().sqrt()
        assert error < 0.02, "stated error of two roundings of activations to 8 bits"


@every_format
def test_ffn_bits_depend_on_nothing_but_the_token(extension: ModuleType, isas: list[str], format: PackedFormat) -> None:
    """Units of one call may round their inputs differently."""
    formats = [format, format, EIGHT, PackedFormat(bits=8, group=0, activation_bits=16)]
    units = [unit(96, 80, formats[index], index)[0] for index in range(4)]
    x = random(23, 96)
    counts, chosen, weights = routed(23, 4, 2)
    results = []
    for name in isas:
        extension.set_isa(name)
        for threads in (1, 2, 3, 8):
            extension.set_num_threads(threads)
            results.append(packed.ffn(x, units, counts, chosen, weights))
    assert all(torch.equal(results[0], result) for result in results)
    bounds = torch.tensor([0, *counts]).cumsum(0).tolist()
    for token in (0, 9, 22):
        mine = [chosen[a:b] == token for a, b in itertools.pairwise(bounds)]
        one = [weights[a:b][hit] for a, b, hit in zip(bounds, bounds[1:], mine, strict=False)]
        alone = packed.ffn(
            x[token : token + 1], units, [len(w) for w in one], torch.zeros(2, dtype=torch.int32), torch.cat(one)
        )
        assert torch.equal(alone[0], results[0][token])


def test_ffn_refuses_inconsistent_routing(extension: ModuleType) -> None:
    units, x = [unit(64, 64, EIGHT, 0)[0]], random(3, 64)
    tokens, weights = torch.tensor([0, 1], dtype=torch.int32), torch.ones(2)
    for arguments in (
        ([3], tokens, weights),
        ([1], tokens, weights),
        ([2, 2], tokens, weights),
        ([2], torch.tensor([0, 3], dtype=torch.int32), weights),
        ([2], None, None),
        ([-1], tokens, None),
        ([2], tokens, weights[:1]),
    ):
        with pytest.raises(ShapeError, match=r"\[ffn\]"):
            packed.ffn(x, units, *arguments)


@pytest.mark.parametrize("choice", ["native", "reference"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 11])
def test_a_pool_is_its_units_in_order(extension: ModuleType, choice: Any, shared: bool, tokens: int) -> None:
    """To the bit what `ffn` gives for the shared unit and the experts that serve any token."""
    units = tuple(unit(96, 80 if index % 2 else 200, PackedFormat(bits=4, group=64), index)[0] for index in range(9))
    pool = PackedPool(units=units[1:], shared=units[0] if shared else None)
    counts, chosen, weights = routed(tokens, 8, 3)
    x, residual = random(tokens, 96), random(tokens, 96, seed=5)
    active = [(made, count) for made, count in zip(pool.units, counts, strict=True) if count]
    if shared:
        active.insert(0, (units[0], -1))
    with kernels(choice):
        found = packed.ffn_pool(x, pool, torch.tensor(counts), chosen, weights, residual)
        expected = packed.ffn(
            x, [made for made, _ in active], [count for _, count in active], chosen, weights, residual
        )
    assert torch.equal(found, expected)


def test_a_pool_refuses_inconsistent_routing(extension: ModuleType) -> None:
    pool = PackedPool(units=tuple(unit(64, 64, PackedFormat(bits=8, group=0), index)[0] for index in range(2)))
    x, counts, tokens, weights = random(3, 64), torch.tensor([2, 1]), torch.arange(3, dtype=torch.int32), torch.ones(3)
    assert packed.ffn_pool(x, pool, counts, tokens, weights).shape == (3, 64)
    for arguments in (
        (x.double(), counts, tokens, weights),
        (x[:, :32], counts, tokens, weights),
        (x, counts.to(torch.int32), tokens, weights),
        (x, torch.tensor([3]), tokens, weights),
        (x, torch.tensor([4, -1]), tokens, weights),
        (x, torch.tensor([1, 1]), tokens, weights),
        (x, torch.tensor([1 << 62, 1 << 62]), tokens, weights),
        (x, counts, tokens + 1, weights),
        (x, counts, tokens, weights[:2]),
        (x, counts, tokens, weights, x[:2]),
    ):
        with pytest.raises(ShapeError, match=r"\[ffn_pool\]"):
            packed.ffn_pool(arguments[0], pool, *arguments[1:])
