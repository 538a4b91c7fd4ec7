"""The pace against machines whose costs are known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.engine.pace import Pace


def settled(pace: Pace, num_decodes: int, quiet_s: float, per_token_s: float, steps: int = 60) -> int:
    """Tokens per step after some steps of a prompt beside decoding sequences."""
    pace.observe(num_decodes, 0, quiet_s)
    for _ in range(steps):
        room = pace.room(num_decodes)
        pace.observe(num_decodes, room, quiet_s + room * per_token_s)
    return pace.room(num_decodes)


@given(
    num_decodes=st.integers(1, 64),
    quiet_s=st.floats(1e-3, 1.0),
    per_token_s=st.floats(1e-5, 1e-1),
)
def test_steps_with_prompts_take_less_than_twice_as_long(num_decodes: int, quiet_s: float, per_token_s: float) -> None:
    room = settled(Pace(512), num_decodes, quiet_s, per_token_s)
    assert 4 <= room <= 512
    if room > 4:
        assert quiet_s + room * per_token_s <= 2 * quiet_s
    if room < 512:
        assert quiet_s + (room + 2) * per_token_s >= 1.75 * quiet_s, "room was left unused"


def test_it_follows_a_cost_that_grows_with_the_context() -> None:
    pace = Pace(512)
    short = settled(pace, 4, 0.02, 0.001)
    long = settled(pace, 4, 0.02, 0.002)
    assert long == pytest.approx(short / 2, abs=1)


def test_nothing_measured_and_nothing_decoding() -> None:
    assert Pace(512).room(1) == 32
    assert Pace(16).room(1) == 16
    pace = Pace(512)
    pace.observe(0, 512, 1.0)  # a prompt alone says nothing about decoding
    assert pace.room(1) == 32


def test_the_nearest_number_of_sequences_stands_in() -> None:
    pace = Pace(512)
    settled(pace, 2, 0.01, 0.001)
    settled(pace, 30, 0.1, 0.001)
    assert pace.room(3) == pace.room(2) < pace.room(28) == pace.room(30)


def test_more_who_wait_get_more() -> None:
    pace = Pace(512)
    base = settled(pace, 2, 0.02, 0.001)
    assert pace.room(2, 0) == pace.room(2, 1) == base
    assert pace.room(2, 3) == pytest.approx(3 * base, abs=3)
    assert pace.room(2, 16) == pace.room(2, 100) == pytest.approx(16 * base, abs=16)


def test_a_fixed_number_stays() -> None:
    pace = Pace(512, fixed=5)
    assert settled(pace, 1, 1.0, 1e-6) == 5
