"""Draw, log-probability and random number: against NumPy, exact distributions, and the same answers everywhere."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.kernels.choice import kernels
from ernie45.kernels.sampling import (
    NOT_FINITE,
    NOTHING_TO_DRAW,
    draw,
    logprob,
    place_of,
    uniform,
    uniform_reference,
)

WORDS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 2, 2**64 - 1]))
BOTH = pytest.mark.parametrize("choice", ["native", "reference"])
SHARED: Any = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@st.composite
def rows(draw_value: Any) -> Tensor:
    """Logits of odd sizes, with holes, ties and spreads from nothing to nearly all that float32 holds; never all -inf."""
    size, seed = draw_value(st.integers(1, 5000)), draw_value(st.integers(0, 2**32 - 1))
    spread = draw_value(st.sampled_from([0.0, 0.3, 3.0, 60.0, 1e4, 1e37]))
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread
    if draw_value(st.booleans()):
        logits = logits.round()
    holes = torch.rand(size, generator=torch.Generator().manual_seed(seed + 1)) < draw_value(
        st.sampled_from([0, 0.5, 1])
    )
    holes[draw_value(st.integers(0, size - 1))] = False
    return logits.masked_fill(holes, -math.inf)


def probabilities(logits: Tensor, temperature: float) -> np.ndarray[Any, Any]:
    """Of each id, in the widest floats that NumPy has."""
    wide = logits.numpy().astype(np.longdouble)
    weights = np.exp((wide - wide.max()) / np.longdouble(temperature))
    return np.asarray(weights / weights.sum())


@settings(max_examples=300, **SHARED)
@given(seed=WORDS, step=WORDS)
@example(seed=2**64 - 1, step=2**64 - 1)
def test_numbers_are_those_of_numpy(extension: ModuleType, seed: int, step: int) -> None:
    assert uniform(seed, step) == uniform_reference(seed, step)
    assert 0 <= uniform(seed, step) < 1


@settings(max_examples=100, **SHARED)
@given(logits=rows(), temperature=st.sampled_from([1e-6, 0.1, 0.8, 1.0, 3.0, 100.0]), seed=WORDS, step=WORDS)
def test_the_draw_is_the_inverse_of_the_cumulative_distribution(
    extension: ModuleType, isas: list[str], logits: Tensor, temperature: float, seed: int, step: int
) -> None:
    found = []
    for name in isas:
        extension.set_isa(name)
        found.append(draw(logits, temperature, seed, step))
    with kernels("reference"):
        expected = draw(logits, temperature, seed, step)
    assert len(set(found)) == 1, "each instruction set gives the same id"
    assert logits[found[0]] > -math.inf
    shares, target = probabilities(logits, temperature).cumsum(), uniform(seed, step)
    # At a border between two ids the last bits of a sum decide.
    margin = float(np.abs(shares - target).min())
    assert margin < 1e-12 or found[0] == expected == np.searchsorted(shares, target, side="right")


@settings(max_examples=150, **SHARED)
@given(
    logits=rows(), temperature=st.sampled_from([0.1, 0.8, 3.0, 100.0]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.8, 0.99, 1 - 1e-9]), seed=WORDS,
)  # fmt: skip
def test_a_nucleus_is_the_fewest_largest_that_reach_top_p(
    extension: ModuleType, isas: list[str], logits: Tensor, temperature: float, top_p: float, seed: int
) -> None:
    found = []
    for name in isas:
        extension.set_isa(name)
        found.append(draw(logits, temperature, seed, 1, top_p))
    with kernels("reference"):
        expected = draw(logits, temperature, seed, 1, top_p)
    assert len(set(found)) == 1, "each instruction set gives the same id"
    weights = probabilities(logits, temperature)
    descending = np.argsort(-weights, kind="stable")
    reached = weights[descending].cumsum()
    kept = np.sort(descending[: int((reached < top_p).sum()) + 1])
    shares, target = weights[kept].cumsum() / weights[kept].sum(), uniform(seed, 1)
    margin = min(float(np.abs(shares - target).min()), float(np.abs(reached - top_p).min()))
    assert margin < 1e-11 or found[0] == expected == kept[np.searchsorted(shares, target, side="right")]


@BOTH
@pytest.mark.parametrize(("top_p", "members"), [(0.5, 4), (0.51, 5), (1e-9, 1), (0.999, 8), (1.0, 8)])
def test_of_equals_the_lowest_ids_are_in_the_nucleus(
    extension: ModuleType, choice: Any, top_p: float, members: int
) -> None:
    """Eight of weight 1 among 900 without any."""
    logits = torch.full((900,), -math.inf)
    best = list(range(5, 900, 120))
    logits[best] = 2.0
    with kernels(choice):
        assert {draw(logits, 1.0, seed, 0, top_p) for seed in range(200)} == set(best[:members])


@BOTH
def test_a_nucleus_reaches_beyond_what_is_near_the_best(extension: ModuleType, choice: Any) -> None:
    """One id holds half of the weight, 2^9 and 2^18 others hold the rest: all of them must be found."""
    for exponent in (9, 18):
        logits = torch.full((2**exponent + 1,), -exponent * math.log(2))
        logits[7] = 0.0
        with kernels(choice):
            drawn = [draw(logits, 1.0, seed, 0, 0.75) for seed in range(300)]
        near = 2 ** (exponent - 1)  # half of the others
        assert max(drawn) <= near + 1
        assert max(drawn) > 0.9 * near
        assert 0.55 < drawn.count(7) / 300 < 0.78, "two thirds"


@BOTH
def test_frequencies_match_the_distribution(extension: ModuleType, choice: Any) -> None:
    """Chi-squared over 20000 draws from 700 ids, two blocks of the native sum."""
    logits = torch.randn(700, generator=torch.Generator().manual_seed(0))
    expected = 20000 * (logits.double() / 0.9).softmax(-1)
    with kernels(choice):
        drawn = torch.tensor([draw(logits, 0.9, seed, 7) for seed in range(20000)])
    counts = torch.bincount(drawn, minlength=700)
    chi_squared = float(((counts - expected).square() / expected).sum())
    assert abs(chi_squared - 699) < 5 * math.sqrt(2 * 699)


@BOTH
def test_ids_without_weight_are_never_drawn(extension: ModuleType, choice: Any) -> None:
    logits = torch.full((1100,), -math.inf)
    logits[[3, 600]] = torch.tensor([0.0, 0.5])
    logits[700] = -800.0  # e^-800 is no normal number
    with kernels(choice):
        assert {draw(logits, 1.0, seed, 0) for seed in range(200)} == {3, 600}
        assert {draw(logits, 1e-6, seed, 0) for seed in range(50)} == {600}


def test_a_number_at_the_very_end_finds_the_last_id_that_adds_to_the_sum() -> None:
    cumulative = np.array([0.0, 0.3, 0.3, 1.1, 1.1])
    assert place_of(math.nextafter(1, 0), cumulative) == 3
    assert place_of(1.0, cumulative) == 3, "as if rounding had given the whole sum"
    assert place_of(0.0, cumulative) == 1
    assert place_of(0.5, cumulative) == 3


@BOTH
def test_rows_that_nothing_can_be_drawn_from(extension: ModuleType, isas: list[str], choice: Any) -> None:
    quiet_nan, odd_nan = torch.tensor([0x7FC00000, 0x7FC12345], dtype=torch.int32).view(torch.float32)
    for name in isas:
        extension.set_isa(name)
        with kernels(choice):
            for size in (1, 16, 700):
                logits = torch.full((size,), -math.inf)
                assert draw(logits, 1.0, 0, 0) == NOTHING_TO_DRAW
                assert math.isnan(logprob(logits, 0))
                for rest in (-math.inf, 0.0):
                    for bad in (quiet_nan, odd_nan, -odd_nan, math.inf):
                        logits = torch.full((size,), rest)
                        logits[size // 2] = bad
                        assert draw(logits, 1.0, 0, 0) == NOT_FINITE
                        assert math.isnan(logprob(logits, 0))


@settings(max_examples=100, **SHARED)
@given(logits=rows(), data=st.data())
def test_log_probability_is_that_of_float64(
    extension: ModuleType, isas: list[str], logits: Tensor, data: st.DataObject
) -> None:
    token = data.draw(st.integers(0, len(logits) - 1))
    found = []
    for name in isas:
        extension.set_isa(name)
        found.append(logprob(logits, token))
    expected = float(logits.double().log_softmax(-1)[token])
    assert found[0] == pytest.approx(expected, abs=1e-6, rel=1e-12)
    assert len(set(found)) == 1, "each instruction set gives the same bits"
    with kernels("reference"):
        assert logprob(logits, token) == expected


@BOTH
def test_wrong_inputs_are_refused(extension: ModuleType, choice: Any) -> None:
    good = torch.zeros(6)
    with kernels(choice):
        for bad in (good.double(), good[::2], good[None], good[:0], good.to("meta"), torch.tensor(1.0)):
            with pytest.raises(ShapeError, match=r"\[draw\] logits: expected a contiguous float32"):
                draw(bad, 1.0, 0, 0)
            with pytest.raises(ShapeError, match=r"\[logprob\] logits: expected a contiguous float32"):
                logprob(bad, 0)
        for temperature in (0.0, -1.0, 1e-7, math.nan, math.inf):
            with pytest.raises(ShapeError, match=rf"temperature: .* from 1e-06, got {temperature}"):
                draw(good, temperature, 0, 0)
        for top_p in (0.0, -0.1, 1.1, math.nan):
            with pytest.raises(ShapeError, match=rf"top_p: .* above 0, up to 1, got {top_p}"):
                draw(good, 1.0, 0, 0, top_p)
        for seed, step, name in ((-1, 0, "seed"), (2**64, 0, "seed"), (0, 2**64, "step")):
            with pytest.raises(ShapeError, match=rf"\[draw\] {name}: expected a whole number from 0 to 2\^64 - 1"):
                draw(good, 1.0, seed, step)
            with pytest.raises(ShapeError, match=rf"\[uniform\] {name}: expected"):
                uniform(seed, step)
        for token in (-1, 6):
            with pytest.raises(ShapeError, match=rf"\[logprob\] token: expected an id from 0 to 5, got {token}"):
                logprob(good, token)
