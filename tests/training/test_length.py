"""How long runs are: epochs as steps, the same after a stop; small data is told of, and packed all the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernie45.cli.main import main
from ernie45.training.state import checkpoint_paths

RunFile = Callable[..., Path]
NUM_ROWS = 60
"""What `run_file` writes."""


def train(*arguments: str | Path) -> int:
    return main(["train", *map(str, arguments)])


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def epochs_of(run_file: RunFile, epochs: float, **sections: Any) -> Path:
    """A run file that is told in epochs; one row per packed row, so that an epoch is known beforehand."""
    fields = {"steps": None, "epochs": epochs, **sections.pop("train", {})}
    return run_file(train=fields, data={"packing": "none", "max_seq_len": 160}, **sections)


@pytest.mark.parametrize("method", ["sft", "dpo", "kto"])
def test_epochs_are_as_many_steps_as_their_rows_need(run_file: RunFile, tmp_path: Path, method: str) -> None:
    path = epochs_of(run_file, 0.25, method=method, train={"rows_per_pass": 2, "accumulation": 2})
    assert train(path, "--run", tmp_path / "run") == 0
    found = lines(tmp_path / "run")
    assert len(found) == math.ceil(NUM_ROWS / 4 / 4)
    assert json.loads((tmp_path / "run/run.json").read_text())["num_steps"] == len(found)


def test_the_schedule_follows_the_epochs(run_file: RunFile, tmp_path: Path) -> None:
    """The same rates as with the steps named, and the same losses."""
    by_epochs = epochs_of(run_file, 0.5, method="sft", train={"rows_per_pass": 5}, schedule={"kind": "linear"})
    assert train(by_epochs, "--run", tmp_path / "epochs") == 0
    assert train(by_epochs, "train.epochs=", "train.steps=6", "--run", tmp_path / "steps") == 0
    a, b = ([(line["lr"], line["loss"]) for line in lines(tmp_path / name)] for name in ("epochs", "steps"))
    assert a == b
    assert a[-1][0] < 0.3 * max(lr for lr, _ in a)


def test_a_run_that_goes_on_has_as_many_steps(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = epochs_of(run_file, 0.1, method="sft", checkpoint={"every": 3})
    assert train(path, "--run", tmp_path / "run") == 0
    (checkpoint_paths(tmp_path / "run/checkpoints")[-1] / "state.json").unlink()

    def counted_again(*_: Any, **__: Any) -> int:
        raise AssertionError("the number is known")

    monkeypatch.setattr("ernie45.training.length.count_packed", counted_again)
    capsys.readouterr()
    assert train(path, "--run", tmp_path / "run") == 0
    assert "6 steps; goes on after step 3" in capsys.readouterr().err
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_packed_rows_are_counted_not_documents(run_file: RunFile, tmp_path: Path) -> None:
    """As many tokens are read as without packing, in fewer rows."""
    packed = run_file("packed.yaml", method="sft", train={"steps": None, "epochs": 1}, data={"max_seq_len": 160})
    assert train(packed, "--run", tmp_path / "packed") == 0
    assert train(epochs_of(run_file, 1, method="sft", train={"rows_per_pass": 6}), "--run", tmp_path / "plain") == 0
    found = lines(tmp_path / "packed")
    assert 10 < len(found) < NUM_ROWS / 2
    assert found[-1]["tokens"] == pytest.approx(lines(tmp_path / "plain")[-1]["tokens"], rel=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.epochs=2"], "steps is 6 and epochs is 2.0: set exactly one of the two"),
        (["train.steps="], "steps is None and epochs is None: set exactly one of the two"),
        (["train.steps=", "train.epochs=0"], "epochs is 0.0, expected a number above 0"),
        (["train.steps=", "train.epochs=1", "data.max_seq_len=2"], "none of the rows can be used"),
    ],
)
def test_lengths_that_cannot_be(
    run_file: RunFile, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    assert train(run_file(method="sft"), *settings, "--run", tmp_path / "run") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_rollouts_have_no_epochs(run_file: RunFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_file(method="upo", train={"steps": None, "epochs": 1}, rewards=[{"function": "length"}])
    assert train(path, "--run", tmp_path / "run") == 1
    assert "the method is upo, which may draw further prompts" in capsys.readouterr().err


def few(tmp_path: Path, method: str, num: int) -> None:
    """Leave a few of the rows that `run_file` has written."""
    path = tmp_path / f"{method}.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:num]))


@pytest.mark.parametrize("method", ["pretrain", "sft", "dpo", "kto"])
def test_one_row_fills_every_batch(
    run_file: RunFile, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_file(
        method=method,
        train={"steps": 2, "rows_per_pass": 2, "accumulation": 2},
        data={"packing": "none", "max_seq_len": 160},
    )
    few(tmp_path, method, 1)
    assert train(path, "--run", tmp_path / "run") == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]
    said = capsys.readouterr().err
    assert "the data is small: 1 rows make 1 packed ones, and a step takes 4" in said
    assert "lower train.accumulation or train.rows_per_pass, or add rows" in said


def test_many_rounds_over_few_rows_are_told(
    run_file: RunFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_file(method="sft", train={"steps": 11, "rows_per_pass": 2}, data={"packing": "none"})
    few(tmp_path, "sft", 2)
    assert train(path, "--run", tmp_path / "run") == 0
    said = capsys.readouterr().err
    assert "2 rows make 2 packed ones, so 11 steps of 2 go over them 11 times" in said
    assert "train.epochs to 1 to 3" in said
    assert "the data is small" in said.splitlines()[0], "before the run begins"
    assert train(path, "--run", tmp_path / "run") == 0
    assert "the data is small" not in capsys.readouterr().err, "a run that goes on was told before"


@pytest.mark.parametrize(
    ("method", "train_fields"),
    [
        ("sft", {"steps": 10, "rows_per_pass": 2}),  # ten times is not too often
        ("pretrain", {"steps": 11, "rows_per_pass": 2}),  # texts are gone over as long as it pays
        ("sft", {"steps": None, "epochs": 11, "rows_per_pass": 2}),  # somebody wanted it so
    ],
)
def test_what_is_asked_for_or_usual_is_not_wondered_at(
    run_file: RunFile, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, train_fields: dict[str, Any]
) -> None:
    path = run_file(method=method, train=train_fields, data={"packing": "none"})
    few(tmp_path, method, 2)
    assert train(path, "--run", tmp_path / "run") == 0
    assert "the data is small" not in capsys.readouterr().err
