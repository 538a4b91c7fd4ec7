"""The figures of a run, one JSON object per logged step, in `metrics.jsonl`; `ernie plot` draws them.

A run that goes on from a checkpoint cuts off what was logged behind it, so the file reads as if the run had never stopped. A last line
that a kill cut in half goes with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ernie45.checkpoint.atomic import atomic_write_text

METRICS_FILE, RUN_FILE = "metrics.jsonl", "run.json"


class MetricsFile:
    """Appends lines to a run's metrics; every line is on its way to the disk when `write` returns."""

    def __init__(self, folder: Path, *, after_step: int = 0) -> None:
        """Args: after_step: the step that the run goes on from; lines of later steps are removed."""
        self._path = folder / METRICS_FILE
        if self._path.exists():
            kept = [
                line for line in self._path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= after_step
            ]
            atomic_write_text(self._path, "".join(f"{line}\n" for line in kept))

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one step's figures. Figures that are no numbers any more are left out: JSON has no NaN."""
        line = json.dumps({key: value for key, value in values.items() if _is_plain(value)}, ensure_ascii=False)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def _step_of(line: str) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return float(step) if isinstance(step, int) else math.inf


def _is_plain(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
