"""What a run wrote, read back: values and tables against hand numbers, damaged files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie45.errors import CheckpointError, NotFoundError
from ernie45.training.run_log import Series, read_run, read_runs
from ernie45.training.run_tables import configuration, duration, experts_csv, measurements, overview, scalars_csv, shown


def series(values: Sequence[float], steps: Sequence[int] | None = None) -> Series:
    return Series(steps=np.array(steps or range(len(values))), values=np.array(values, dtype=np.float64))


def test_every_kind_of_value_is_read(write_run: Any, metrics: Any, about: Any) -> None:
    run = read_run(write_run("a", metrics(10)), "a")
    assert run.about == about
    assert run.notes == ()
    assert run.series["loss"].steps.tolist() == list(range(10, 101, 10))
    assert run.series["loss"].values.tolist() == [2 + 7 / step for step in range(1, 11)]
    assert run.series["mfu"].steps.tolist() == list(range(20, 101, 10)), "null is no value"
    assert run.series["eval/loss"].steps.tolist() == [50, 100]
    assert run.series["router_entropy"].values.shape == (10, 2)
    assert run.series["expert_load"].values.shape == (10, 2, 4)
    assert "note" not in run.series
    assert (run.last_step, run.counter("tokens"), run.counter("time_s")) == (100, 40960, 25)
    assert {"time_s", "tokens", "expert_load"}.isdisjoint(run.scalars())


def test_lines_of_one_step_are_put_together_and_the_last_counts(write_run: Any) -> None:
    lines = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.5},
        {"step": 2, "eval/loss": 2.75},
        {"step": 2, "loss": 2.25},
    ]
    run = read_run(write_run("a", lines), "a")
    assert run.series["loss"].values.tolist() == [3.0, 2.25]
    assert (run.series["eval/loss"].steps.tolist(), run.series["eval/loss"].values.tolist()) == ([2], [2.75])


@pytest.mark.parametrize("cut", ['\n{"step": 40, "lo', "\n{", '\n{"step": 40, "loss": 1}garbage\n'])
def test_a_line_that_was_cut_off_is_left_out_and_said(write_run: Any, metrics: Any, cut: str) -> None:
    run = read_run(write_run("a", metrics(3), end=cut), "a")
    assert run.last_step == 30
    assert run.notes == ("line 4 of metrics.jsonl is cut off, as by a run that was killed: it is left out",)


def test_a_whole_line_without_its_end_counts(write_run: Any, metrics: Any) -> None:
    run = read_run(write_run("a", metrics(3), end=""), "a")
    assert (run.last_step, run.notes) == (30, ())


def test_a_run_without_description_can_be_read(write_run: Any, metrics: Any) -> None:
    run = read_run(write_run("a", metrics(3), about=None), "a")
    assert run.about == {}
    assert "there is no run.json" in run.notes[0]
    assert ["method", "-"] in overview([run])
    assert configuration([run]) == []


@pytest.mark.parametrize("text", ["", "\n\n", '{"step": 1, "lo'])
def test_a_run_without_a_finished_step(write_run: Any, text: str) -> None:
    with pytest.raises(CheckpointError, match="metrics.jsonl has no finished step yet: wait for the run"):
        read_run(write_run("a", [], end=text), "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1, "loss": 2}\nnonsense\n{"step": 3, "loss": 1}\n', "metrics.jsonl:2 is no JSON"),
        ('{"step": 1}\n{"loss": 2}\n', "metrics.jsonl:2 has no whole number 'step'"),
        ("[1]\n", "metrics.jsonl:1 has no whole number 'step'"),
        ('{"step": 1.5}\n', "metrics.jsonl:1 has no whole number"),
        ('{"step": 1}\n', "steps without any number"),
        (
            '{"step": 1, "x": [1, 2]}\n{"step": 2, "x": [1]}\n',
            r"'x' has the shape \(1,\) in step 2 and \(2,\) in step 1",
        ),
    ],
)
def test_damage_is_told_with_file_and_line(write_run: Any, text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_run(write_run("a", [], end=text), "a")


def test_what_is_no_run(write_run: Any, metrics: Any, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="has no metrics.jsonl: give the folder of a training run"):
        read_run(tmp_path, "a")
    folder = write_run("a", metrics(1), about=None)
    for text, message in (("{", "run.json is no JSON"), ("[]", "run.json must hold an object, not list")):
        (folder / "run.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_run(folder, "a")


def test_runs_get_names_that_tell_them_apart(write_run: Any, metrics: Any) -> None:
    folders = [write_run(name, metrics(2)) for name in ("x/moe", "y/moe", "y/dense")]
    assert [run.name for run in read_runs(folders[:1])] == ["moe"]
    assert [run.name for run in read_runs(folders[1:])] == ["moe", "dense"]
    assert [run.name for run in read_runs(folders)] == ["x/moe", "y/moe", "y/dense"]
    with pytest.raises(NotFoundError, match="named twice"):
        read_runs([folders[0], folders[0]])


def test_the_mean_is_of_neighbours_on_both_sides() -> None:
    some = series([8.0, 2.0, math.nan, 4.0, 6.0, math.inf, 5.0])
    assert some.smoothed(4).tolist() == [8, 5, 5, 4, 5, 5.5, 5]
    assert np.isnan(some.smoothed(1)[2])
    assert some.smoothed(1)[[0, 1, 3]].tolist() == [8, 2, 4]
    falling = series([100.0 - step for step in range(50)])
    assert falling.smoothed(10).tolist() == pytest.approx(falling.values.tolist()), "it does not lag"
    assert np.isnan(series([math.nan] * 3).smoothed(2)).all()


def test_the_mean_of_the_end() -> None:
    assert series([9.0, 1.0, math.nan, 2.0]).mean_of_end(2) == 1.5
    assert series([9.0, 1.0]).mean_of_end(5) == 5
    assert math.isnan(series([math.nan]).mean_of_end(2))


def test_extremes_leave_out_what_is_not_finite() -> None:
    some = series([math.nan, 3.0, 1.0, math.inf, 2.0, math.nan], [1, 2, 3, 4, 5, 6])
    assert some.extreme(lowest=True) == (1.0, 3)
    assert some.extreme(lowest=False) == (3.0, 2)
    assert some.last == 2.0
    assert math.isnan(series([math.nan]).extreme(lowest=True)[0])
    assert math.isnan(series([math.nan]).last)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.2 s"), (59, "59.0 s"), (61, "1 min 01 s"), (3723.5, "1 h 02 min"), (math.nan, "-")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.0, "3"), (12345.0, "12,345"), (12345.67, "12,345.7"), (2.123456, "2.123"), (3e-4, "0.0003"), (math.nan, "-")],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert shown(value) == text


def test_csv_holds_everything_that_was_logged(write_run: Any, metrics: Any) -> None:
    logged = [*metrics(6), *metrics(4, moe=False)]
    runs = read_runs([write_run("a", logged[:6]), write_run("b", logged[6:])])
    rows = list(csv.DictReader(io.StringIO(scalars_csv(runs))))
    assert list(rows[0])[:4] == ["run", "step", "time_s", "tokens"]
    assert [row["run"] for row in rows] == [*"aaaaaabbbb"]
    for row, line in zip(rows, logged, strict=True):
        assert row["step"] == str(line["step"])
        for key in ("loss", "tokens", "lr", "eval/loss", "mfu", "rewards/total"):
            assert row[key] == ("" if line.get(key) is None else repr(float(line[key])))
        assert row["router_entropy/1"] == (repr(line["router_entropy"][1]) if "router_entropy" in line else "")
    loads = list(csv.DictReader(io.StringIO(experts_csv(runs) or "")))
    assert len(loads) == 6 * 2 * 4
    assert loads[-1] == {
        "run": "a", "measurement": "expert_load", "step": "60", "layer": "1", "expert": "3", "value": "0.0"
    }  # fmt: skip
    assert experts_csv(runs[1:]) is None


def test_tables_of_several_runs(write_run: Any, metrics: Any, about: Any) -> None:
    other = {
        **about,
        "config": {"model": {"hidden_size": 256}, "optimizer": {"lr": 1.0, "beta2": None}},
        "num_active": None,
    }
    runs = read_runs([write_run("a", metrics(6)), write_run("b", metrics(4), about=other)])
    assert overview(runs)[0] == ["", "a", "b"]
    assert ["parameters", "12.3 M, 4 M active per token", "12.3 M"] in overview(runs)
    assert ["torch version", "2.13.0", "2.13.0"] in overview(runs)
    assert ["duration", "15.0 s", "10.0 s"] in overview(runs)
    assert measurements(runs[:1])[1] == ["loss", "3.167", "3.167", "60", "9", "10"]
    assert measurements(runs)[2] == ["loss", "b", "3.75", "3.75", "40", "9", "10"]
    assert configuration(runs) == [
        ["setting", "a", "b"],
        ["optimizer.lr", "0.0003", "1.0"],
        ["model.hidden_size", "256", "256"],
        ["optimizer.beta2", "none", "none"],
    ], "what differs comes first"
