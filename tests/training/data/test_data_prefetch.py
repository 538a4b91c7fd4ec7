"""Rows prepared ahead: the same rows, and the state of the one who takes them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest

from ernie45.errors import ConfigError
from ernie45.training.data.prefetch import Prefetch


class Counting:
    """Rows 0, 1, 2, ..; fails at `fails_at`."""

    def __init__(self, fails_at: int = 10**9) -> None:
        self.place = 0
        self.fails_at = fails_at

    def next_row(self) -> list[int]:
        if self.place >= self.fails_at:
            raise ConfigError(f"no row {self.place}")
        self.place += 1
        return [self.place - 1]

    def state(self) -> dict[str, Any]:
        return {"place": self.place}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.place = state["place"]


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "waited five seconds"
        time.sleep(0.001)


def test_rows_and_states_are_those_of_the_stream() -> None:
    source = Counting()
    with Prefetch(source, 4) as stream:
        assert stream.state() == {"place": 0}
        for place in range(50):
            assert stream.next_row() == [place]
            assert stream.state() == {"place": place + 1}


def test_so_many_rows_are_prepared_and_no_more() -> None:
    source = Counting()
    with Prefetch(source, 4) as stream:
        wait_for(lambda: source.place == 4)
        time.sleep(0.02)
        assert source.place == 4
        stream.next_row()
        wait_for(lambda: source.place == 5)
        assert stream.state() == {"place": 1}, "not the producer's"


def test_restoring_forgets_what_was_prepared() -> None:
    with Prefetch(Counting(), 3) as stream:
        for _ in range(7):
            stream.next_row()
        state = stream.state()
        after = [stream.next_row() for _ in range(5)]
        stream.restore(state)
        assert stream.state() == state
        assert [stream.next_row() for _ in range(5)] == after


def test_an_error_comes_in_its_place_and_stays() -> None:
    with Prefetch(Counting(fails_at=2), 5) as stream:
        wait_for(lambda: not stream._thread or not stream._thread.is_alive())
        assert [stream.next_row(), stream.next_row()] == [[0], [1]]
        for _ in range(2):
            with pytest.raises(ConfigError, match="no row 2"):
                stream.next_row()
        stream.restore({"place": 1})
        assert stream.next_row() == [1]


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    stream = Prefetch(Counting(), 2)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before
    with pytest.raises(ConfigError, match="the stream was closed"):
        stream.next_row()
    stream.close()
    with pytest.raises(ConfigError, match="0 rows cannot be prepared ahead"):
        Prefetch(Counting(), 0)
