"""Learning rates against hand numbers of the published formulas, and what every schedule must hold to."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import ConfigError
from ernie45.training.optim import LrSchedule, ScheduleConfig


def test_published_300b_run_by_hand() -> None:
    """Training reference 1.6: 2.2e-4 to 2.2e-5, 200 warm-up steps, plateau to 231084, 1-sqrt."""
    config = ScheduleConfig(steps=256760, warmup_steps=200, decay_start=231084, decay="1-sqrt", min_lr=2.2e-5)
    rate = LrSchedule(config, 2.2e-4)
    assert rate(0) == 0
    assert rate(50) == pytest.approx(0.55e-4)
    assert rate(200) == rate(231083) == 2.2e-4
    # a quarter of the way down: r = 1 - sqrt(1/4) = 1/2
    assert rate(231084 + 6419) == pytest.approx(0.5 * (2.2e-4 - 2.2e-5) + 2.2e-5)
    assert rate(256760) == pytest.approx(2.2e-5)
    assert rate(10**9) == pytest.approx(2.2e-5)


def test_curves_by_hand() -> None:
    """Half-way down from 1 to 0.2; 0.05^0.5 = 0.2236."""

    def half_way(**fields: object) -> float:
        config = ScheduleConfig(steps=100, min_lr=0.2, **fields)  # type: ignore[arg-type]
        return LrSchedule(config, 1.0)(50)

    assert half_way(decay_start=0, decay="half_life") == pytest.approx(0.8 * (0.2236068 - 0.05) / 0.95 + 0.2)
    assert half_way(decay_start=0, decay="1-sqrt") == pytest.approx(0.8 * (1 - math.sqrt(0.5)) + 0.2)
    assert half_way(decay_start=0, decay="linear") == pytest.approx(0.6)
    assert half_way(kind="linear") == pytest.approx(0.6)
    assert half_way(kind="cosine") == pytest.approx(0.6)


def test_cosine_a_quarter_of_the_way() -> None:
    rate = LrSchedule(ScheduleConfig(kind="cosine", steps=110, warmup_steps=10), 1.0)
    assert rate(35) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_constant_after_warm_up() -> None:
    rate = LrSchedule(ScheduleConfig(kind="constant", steps=10, warmup_steps=4), 1.0)
    assert [rate(step) for step in (0, 1, 4, 9, 50)] == [0, 0.25, 1, 1, 1]


def test_the_plateau_ends_at_nine_tenths() -> None:
    rate = LrSchedule(ScheduleConfig(steps=1000), 1.0)
    assert rate(900) == 1
    assert rate(901) < 1


def test_a_run_of_warm_up_alone() -> None:
    rate = LrSchedule(ScheduleConfig(steps=5, warmup_steps=5, min_lr=0.5), 1.0)
    assert rate(4) == pytest.approx(0.8)
    assert rate(5) == 0.5


KINDS = st.sampled_from(
    [("wsd", "half_life"), ("wsd", "1-sqrt"), ("wsd", "linear"), ("cosine", "half_life"), ("linear", "half_life")]
)


@given(kind=KINDS, steps=st.integers(1, 400), warmup=st.floats(0, 1), start=st.floats(0, 1), floor=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_rises_then_falls_within_bounds(
    kind: tuple[str, str], steps: int, warmup: float, start: float, floor: float
) -> None:
    warmup_steps = int(warmup * steps)
    decay_start = warmup_steps + int(start * (steps - warmup_steps)) if kind[0] == "wsd" else None
    config = ScheduleConfig(
        kind=kind[0],  # type: ignore[arg-type]
        steps=steps,
        warmup_steps=warmup_steps,
        decay_start=decay_start,
        decay=kind[1],  # type: ignore[arg-type]
        min_lr=3e-4 * floor,
    )
    rate = LrSchedule(config, 3e-4)
    rates = [rate(step) for step in range(steps + 2)]
    assert all(0 <= value <= 3e-4 * (1 + 1e-12) for value in rates)
    assert rates[:warmup_steps] == sorted(rates[:warmup_steps])
    rest = rates[warmup_steps:]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(rest))
    assert rates[-1] == pytest.approx(config.min_lr, abs=1e-12)


@given(kind=KINDS, steps=st.integers(2000, 4000))
@settings(max_examples=25, deadline=None)
def test_no_jump_at_the_borders(kind: tuple[str, str], steps: int) -> None:
    """1-sqrt is steepest where it starts: the root of one step's share."""
    config = ScheduleConfig(
        kind=kind[0],  # type: ignore[arg-type]
        steps=steps,
        warmup_steps=1000,
        decay=kind[1],  # type: ignore[arg-type]
        min_lr=0.1,
    )
    rate = LrSchedule(config, 1.0)
    largest = max(abs(rate(step + 1) - rate(step)) for step in range(steps + 1))
    assert largest <= 1.01 * math.sqrt(1 / (0.1 * steps))
    if kind[1] != "1-sqrt":
        assert largest <= 0.02


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "0 warm-up steps of 0"),
        ({"steps": 10, "warmup_steps": 11}, "11 warm-up steps of 10"),
        ({"steps": 10, "kind": "cosin"}, "expected one of wsd, cosine, linear, constant"),
        ({"steps": 10, "decay": "sqrt"}, "expected one of half_life, 1-sqrt, linear"),
        ({"steps": 10, "min_lr": -1.0}, "min_lr is -1.0"),
        ({"steps": 10, "kind": "constant", "min_lr": 1e-5}, "never falls"),
        ({"steps": 10, "kind": "cosine", "decay": "1-sqrt"}, "belong to kind 'wsd'"),
        ({"steps": 10, "kind": "linear", "decay_start": 5}, "belong to kind 'wsd'"),
        ({"steps": 10, "warmup_steps": 4, "decay_start": 3}, r"expected 4 \(end of warm-up\) to 10 \(end\)"),
    ],
)
def test_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**fields)  # type: ignore[arg-type]


def test_a_floor_above_the_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"min_lr is 0.1, expected at most the learning rate 0.01"):
        LrSchedule(ScheduleConfig(steps=10, min_lr=0.1), 0.01)
