"""The metrics file of a run."""

from __future__ import annotations

import json
from pathlib import Path

from ernie45.training.metrics import METRICS_FILE, MetricsFile


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_appends_and_leaves_out_what_is_no_number(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.write({"step": 1, "loss": 2.5, "mfu": None, "gone": float("nan"), "expert_load": [[0.5, 0.5]]})
    metrics.write({"step": 2, "loss": float("inf")})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.5, "mfu": None, "expert_load": [[0.5, 0.5]]}, {"step": 2}]


def test_a_resumed_run_cuts_off_what_lies_behind_its_checkpoint(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    for step in range(1, 6):
        metrics.write({"step": step})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 3, "lo')  # a kill in the middle of a line
    again = MetricsFile(tmp_path, after_step=3)
    again.write({"step": 4, "again": True})
    assert lines(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True}]


def test_a_new_run_begins_with_an_empty_file(tmp_path: Path) -> None:
    MetricsFile(tmp_path).write({"step": 1})
    MetricsFile(tmp_path).write({"step": 1, "second": True})
    assert lines(tmp_path) == [{"step": 1, "second": True}]
