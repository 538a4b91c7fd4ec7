"""Narrow moments: the error of one rounding, its mean, and averages that would stand still if they were rounded to the nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from ernie45.training.optim.config import StateDtype
from ernie45.training.optim.moments import BLOCK, Int8Store, Store, new_store, random_of, round_to_bfloat16


def written(store: Store, values: Tensor, seed: int = 0) -> Tensor:
    store.write(0, values.clone(), Generator().manual_seed(seed))
    return store.read(0, len(values))


def spread(size: int, seed: int) -> Tensor:
    """Magnitudes over six decades."""
    generator = Generator().manual_seed(seed)
    return torch.randn(size, generator=generator) * 10 ** (6 * torch.rand(size, generator=generator) - 6)


@given(size=st.integers(1, 3 * BLOCK), seed=st.integers(0, 10**6), is_signed=st.booleans())
@settings(max_examples=60, deadline=None)
def test_error_of_one_rounding(size: int, seed: int, is_signed: bool) -> None:
    """Brute force over the table of all levels: what is read is one of the two neighbours of what was written."""
    values = spread(size, seed) if is_signed else spread(size, seed).square()
    store = Int8Store(values, signed=is_signed)
    back = written(store, values, seed)
    count, power = (127, 2) if is_signed else (255, 4)
    table = (torch.arange(count + 1, dtype=torch.float64) / count) ** power
    for start in range(0, size, BLOCK):
        block = values[start : start + BLOCK].double()
        scale = block.abs().max()
        share = block.abs() / scale
        upper = torch.searchsorted(table, share.clamp(max=1)).clamp(1, count)
        low, high = table[upper - 1], table[upper]
        lowest = table[1] if not is_signed else 0.0
        found = back[start : start + BLOCK].double().abs() / scale
        slack = 1e-5 * high
        assert (
            ((found - low).abs() <= slack) | ((found - high).abs() <= slack) | (found - lowest).abs().le(slack)
        ).all()
        assert ((found - share).abs() <= power / count + 1e-6).all()
        is_large = upper - 1 >= (8 if is_signed else 16)
        assert ((found - share).abs()[is_large] <= 0.28 * share[is_large]).all()
        assert (back[start : start + BLOCK].sign() * block.sign() >= 0).all()


def test_zeros_stay_zeros_and_a_second_moment_never_becomes_one() -> None:
    zeros = torch.zeros(2 * BLOCK)
    for is_signed in (True, False):
        assert torch.equal(written(Int8Store(zeros, signed=is_signed), zeros), zeros)
    values = torch.full((BLOCK,), 1e-30)
    values[3] = 1.0
    assert written(Int8Store(values, signed=False), values).min() > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("is_signed", [True, False])
def test_the_mean_error_is_zero(dtype: StateDtype, is_signed: bool) -> None:
    values = torch.tensor([1.0, 0.3, 0.123, 0.0456, -0.3 if is_signed else 0.9])
    store = new_store(values, dtype, signed=is_signed)
    count = 4000
    total = torch.stack([written(store, values, seed).double() for seed in range(count)]).sum(0)
    # one rounding errs by at most 1.6 % of the scale; the mean of 4000 by a 60th of that, and four times for luck
    torch.testing.assert_close((total / count).float(), values, rtol=0, atol=0.016 / 60 * 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_averages_move_although_a_step_is_smaller_than_a_level(dtype: StateDtype) -> None:
    """0.999^1000 = 0.37; rounded to the nearest, neither form would leave its first value."""
    store = new_store(torch.zeros(8 * BLOCK), dtype, signed=False)
    values = torch.ones(8 * BLOCK)
    values[::2] = 0.5
    current = written(store, values)
    for step in range(1, 1001):
        current.mul_(0.999)
        current[::BLOCK] = 1.0  # keeps the scale of each block
        store.write(0, current, random_of("w", step, torch.device("cpu")))
        current = store.read(0, len(values))
    blocks = current.view(-1, BLOCK)
    assert blocks[:, 2::2].mean().item() == pytest.approx(0.5 * 0.3677, rel=0.05)
    assert blocks[:, 1::2].mean().item() == pytest.approx(0.3677, rel=0.05)


def test_bfloat16_goes_to_a_neighbour() -> None:
    values = spread(10000, 5)
    back = round_to_bfloat16(values, Generator().manual_seed(1)).float()
    assert ((back - values).abs() <= values.abs() * 2**-7).all()
    exact = values.bfloat16().float()
    assert torch.equal(round_to_bfloat16(exact, Generator().manual_seed(2)).float(), exact)


def test_ranges_are_kept_apart() -> None:
    values = spread(3 * BLOCK + 7, 3).abs()
    whole, parts = (Int8Store(values, signed=False) for _ in range(2))
    expected = written(whole, values)
    generator = Generator().manual_seed(0)
    for start, stop in ((0, 2 * BLOCK), (2 * BLOCK, len(values))):
        parts.write(start, values[start:stop].clone(), generator)
    assert torch.equal(parts.read(0, len(values)), expected)
    assert torch.equal(parts.read(BLOCK, 2 * BLOCK + 5), expected[BLOCK : 2 * BLOCK + 5])
    assert {name: tensor.numel() for name, tensor in parts.tensors().items()} == {"": len(values), "_scale": 4}


def test_random_numbers_follow_from_name_and_step() -> None:
    device = torch.device("cpu")
    first, again, later, other = (
        torch.rand(4, generator=random_of(*arguments, device)) for arguments in (("a", 1), ("a", 1), ("a", 2), ("b", 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first, other)
