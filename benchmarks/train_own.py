"""The part of `train.py` that has no peer: how long a step waits for its rows, and how near recomputation comes to its budget."""

from __future__ import annotations

import argparse
import statistics
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import common

_WORKER = "benchmarks.train_own_worker"
SHARES = (0.75, 0.5, 0.25)
"""Budgets of recomputation, of what a pass keeps if nothing is computed again."""
_DATA_GOAL, _BUDGET_GOAL = 0.02, 0.95


def measure(options: argparse.Namespace, *, case: str, seq_len: int, num_rows: int, folder: str) -> dict[str, Any]:
    """Both measurements for one shape of batch. Args: folder: has `model`, as `train_worker.prepare` wrote it."""
    library = Path(sysconfig.get_path("stdlib"))
    shape: dict[str, Any] = {"folder": folder, "seq_len": seq_len, "num_rows": num_rows}
    runs = [
        common.run_fresh(f"{_WORKER}:{function}", threads=options.threads, sleeps=False, **shape, **arguments)
        for function, arguments in (
            (
                "measure_data",
                {
                    "steps": options.steps,
                    "tiny": options.quick,
                    "library": str(library / "json" if options.quick else library),
                },
            ),
            ("measure_recompute", {"shares": list(SHARES)}),
        )
    ]
    return {
        "case": case,
        "data": runs[0].result,
        "recompute": runs[1].result,
        "other_cores": [run.other_cores for run in runs],
    }


def to_markdown(found: Mapping[str, Any]) -> list[list[str]]:
    """The rows of a case: what, figure, in time, goal."""
    data, recompute = found["data"], found["recompute"]
    step_s = statistics.median(data["seconds"])
    waited = statistics.median(data["waited"])
    rows = [
        [
            found["case"],
            "a step waits for its rows",
            _judged(f"{waited:.2%} of the step", waited <= _DATA_GOAL),
            f"{data['alone_s'] * 1e3:.1f} ms to prepare them alone, of {step_s:.2f} s",
            f"{_DATA_GOAL:.0%}",
        ]
    ]
    whole = recompute["kept_without_bytes"]
    for plan in recompute["plans"]:
        used = plan["kept_bytes"] / plan["budget_bytes"]
        rows.append(
            [
                found["case"],
                f"recompute auto with {plan['share']:.0%} of {whole / 1e6:.0f} MB",
                _judged(f"keeps {used:.1%} of its budget", _BUDGET_GOAL <= used <= 1),
                f"a pass takes {plan['seconds'] / recompute['seconds_without']:.2f} of the time",
                f"{_BUDGET_GOAL:.0%} to 100%",
            ]
        )
    return rows


def facts() -> list[str]:
    """What the rows mean."""
    return [
        "rows: docstrings of Python's own library, packed by the pipeline of `ernie train` in the background, pre-training with"
        " its loop; median of the steps; alone: the same rows with nothing beside them",
        "recompute auto: bytes that wait for the backward pass, counted over a real pass under the plan, and the median time"
        " of three passes forward and backward against one that keeps everything",
    ]


def _judged(text: str, met: bool) -> str:
    return text if met else f"{text}, missed"
