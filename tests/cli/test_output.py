"""Progress bars on terminals and in logs, numbers for people, tables."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from ernie45.cli import output
from ernie45.cli.output import ProgressBar, human_bytes, human_count, print_facts, print_json, print_table


class Stderr(io.StringIO):
    """A stream that says whether it is a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@dataclass
class Clock:
    now: float = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(output, "time", fake)
    return fake


def run(clock: Clock, monkeypatch: pytest.MonkeyPatch, *, terminal: bool, seconds: float, steps: int) -> str:
    """Report `steps` equal parts of 1 GB, spread over `seconds`."""
    stream = Stderr(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressBar() as bar:
        report = bar.stage("loading")
        for step in range(1, steps + 1):
            clock.now += seconds / steps
            report(step * 10**9 // steps, 10**9)
    return stream.getvalue()


def test_a_log_hears_nothing_of_what_takes_a_moment(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(clock, monkeypatch, terminal=False, seconds=2.9, steps=100) == ""


def test_a_log_gets_few_whole_lines_of_what_takes_longer(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run(clock, monkeypatch, terminal=False, seconds=30, steps=1000).splitlines()
    assert 2 <= len(lines) <= 10
    assert "100%" in lines[-1]
    assert lines[0].startswith("loading [##......................]  10%  100 MB of 1.0 GB, 33.3 MB/s, 27 s left")
    assert not any("\r" in line for line in lines)


def test_a_slow_log_gets_a_line_per_five_percent(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(run(clock, monkeypatch, terminal=False, seconds=3600, steps=2000).splitlines()) == 21


def test_a_terminal_gets_one_line_that_is_redrawn(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = run(clock, monkeypatch, terminal=True, seconds=5, steps=10)
    drawn = text.split("\r")
    assert drawn[0] == ""
    assert len(drawn) == 11
    assert drawn[-1] == "loading [########################] 100%  1.0 GB of 1.0 GB, 200 MB/s, 0 s left\x1b[K\n"
    assert "loading [############............]  50%  500 MB of 1.0 GB, 200 MB/s, 2 s left\x1b[K" in drawn


def test_a_terminal_shows_nothing_in_the_first_half_second(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(clock, monkeypatch, terminal=True, seconds=0.4, steps=10) == ""


def test_a_line_is_cut_at_the_width_of_the_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = run(clock, monkeypatch, terminal=True, seconds=5, steps=10)
    assert max(len(line.removesuffix("\n").removesuffix("\x1b[K")) for line in text.split("\r")) == 39


def test_a_failure_does_not_share_the_line_of_the_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stderr(True)
    monkeypatch.setattr(sys, "stderr", stream)

    def fail() -> None:
        with ProgressBar() as bar:
            clock.now += 1
            bar.stage("one")(1, 10)
            clock.now += 1
            report = bar.stage("two")
            clock.now += 1
            report(5, 10)
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    assert stream.getvalue().endswith("\n")
    assert "two [" in stream.getvalue()


def test_an_empty_job_is_done(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stderr(True)
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressBar() as bar:
        report = bar.stage("empty")
        clock.now += 1
        report(0, 0)
    assert "100%  0 B of 0 B" in stream.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1234567, "1.2 MB"), (538_000_000, "538 MB"), (5e12, "5.0 TB")],
)
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(7, "7"), (80_960, "81 k"), (134_515_008, "135 M"), (21_825_437_888, "21.8 B")]
)
def test_human_count(count: int, text: str) -> None:
    assert human_count(count) == text


def test_tables_facts_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Data:
        name: str
        path: Path

    print_table(("A", "B"), [("long cell", "x"), ("y", "")])
    print_facts([("one", "1"), ("", "2")])
    assert capsys.readouterr().out == "A          B\nlong cell  x\ny\none  1\n     2\n"
    print_json([Data("é", Path("/x"))])
    assert json.loads(capsys.readouterr().out) == [{"name": "é", "path": "/x"}]


def test_rows_are_no_bytes(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stderr(terminal=False)
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressBar() as bar:
        report = bar.stage("counting", "rows")
        for done in (1, 1500, 3000):
            clock.now += 10
            report(done, 3000)
    assert (
        stream.getvalue().splitlines()[1]
        == "counting [############............]  50%  1.5 k rows of 3 k rows, 150 rows/s, 10 s left"
    )
