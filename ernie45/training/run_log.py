"""What a training run wrote down, read back: `metrics.jsonl` as arrays over steps, `run.json` as it is.

Shape letters: N logged steps, L MoE layers, E experts of a layer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernie45.errors import CheckpointError, NotFoundError
from ernie45.training.metrics import METRICS_FILE, RUN_FILE

COUNTERS = ("time_s", "tokens")
"""Keys that say how far a run is, beside `step`; every other key is a measurement."""

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One measurement over the steps that have it."""

    steps: NDArray[np.int64]
    """(N,), growing."""
    values: NDArray[np.float64]
    """(N,), per layer (N, L), or per layer and expert (N, L, E)."""

    @property
    def last(self) -> float:
        """The last finite value of a measurement with one value per step; NaN without any."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite[-1]) if len(finite) else float("nan")

    def extreme(self, *, lowest: bool) -> tuple[float, int]:
        """Value and step of the lowest or highest finite value; NaN and 0 without any."""
        if not np.isfinite(self.values).any():
            return float("nan"), 0
        finite = np.where(np.isfinite(self.values), self.values, np.nan)
        at = int(np.nanargmin(finite) if lowest else np.nanargmax(finite))
        return float(self.values[at]), int(self.steps[at])

    def smoothed(self, span: int) -> NDArray[np.float64]:
        """Mean of about `span` values around each, of fewer towards both ends: it does not lag where the values fall.

        Values that are not finite are skipped; NaN where nothing else is near.
        """
        size = len(self.values)
        sums, counts = (np.concatenate(([0.0], np.cumsum(part))) for part in self._known_and_counted())
        places = np.arange(size)
        reach = np.minimum(span // 2, np.minimum(places, size - 1 - places))
        first, end = places - reach, places + reach + 1
        num = counts[end] - counts[first]
        return np.divide(sums[end] - sums[first], num, out=np.full(size, np.nan), where=num > 0)

    def mean_of_end(self, span: int) -> float:
        """Mean of the last `span` values that are finite; NaN without any."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite[-span:].mean()) if len(finite) else float("nan")

    def _known_and_counted(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        finite = np.isfinite(self.values)
        return np.where(finite, self.values, 0.0), finite.astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """One run."""

    name: str
    """What it is called in legends and tables."""
    folder: Path
    about: Record
    """`run.json`; empty where the run has none."""
    series: dict[str, Series]
    """By key, in the order in which they first appear."""
    notes: tuple[str, ...]
    """What a reader of the plots has to know: lines that were left out, files that are missing."""

    def scalars(self) -> dict[str, Series]:
        """The measurements with one value per step."""
        return {key: s for key, s in self.series.items() if s.values.ndim == 1 and key not in COUNTERS}

    def counter(self, key: str) -> float:
        """The last value of one of `COUNTERS`, NaN where it was not written."""
        return self.series[key].last if key in self.series else float("nan")

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return max(int(series.steps[-1]) for series in self.series.values())


def read_runs(folders: Sequence[str | Path]) -> list[RunLog]:
    """Read runs and give each a name of its own: the folder's, with as much of the path as it takes. Raises: as `read_run`."""
    paths = [Path(folder).resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise NotFoundError(f"a run is named twice among {', '.join(map(str, folders))}: name each once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [read_run(path, "/".join(path.parts[-depth:])) for path in paths]


def read_run(folder: Path, name: str) -> RunLog:
    """Read one run; a last line that was cut off by the end of the process is left out and noted.

    Raises: NotFoundError if the folder holds no `metrics.jsonl`; CheckpointError, with file and line, if nothing was
        logged or a line is damaged.
    """
    if not (folder / METRICS_FILE).is_file():
        raise NotFoundError(f"{folder} has no {METRICS_FILE}: give the folder of a training run")
    records, notes = _read_records(folder / METRICS_FILE)
    if not records:
        raise CheckpointError(
            f"{folder / METRICS_FILE} has no finished step yet: wait for the run, or give another one"
        )
    about, missing = _read_about(folder / RUN_FILE)
    series = _series(records, folder / METRICS_FILE)
    return RunLog(name=name, folder=folder, about=about, series=series, notes=(*notes, *missing))


def _read_records(path: Path) -> tuple[dict[int, Record], list[str]]:
    """The records by step; several lines of one step are put together."""
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    records: dict[int, Record] = {}
    notes = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise CheckpointError(
                    f"{path}:{number} is no JSON: {error}; remove the line to plot the rest"
                ) from error
            notes.append(f"line {number} of {path.name} is cut off, as by a run that was killed: it is left out")
            continue
        step = record.get("step") if isinstance(record, dict) else None
        if type(step) is not int:
            raise CheckpointError(f"{path}:{number} has no whole number 'step': it is no line of a training run")
        records.setdefault(step, {}).update(record)
    return dict(sorted(records.items())), notes


def _read_about(path: Path) -> tuple[Record, list[str]]:
    if not path.is_file():
        return {}, [f"there is no {path.name}: method, configuration and versions are not known"]
    try:
        about = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(about, dict):
        raise CheckpointError(f"{path} must hold an object, not {type(about).__name__}")
    return about, []


def _series(records: dict[int, Record], path: Path) -> dict[str, Series]:
    found: dict[str, tuple[list[int], list[NDArray[np.float64]]]] = {}
    for step, record in records.items():
        for key, value in record.items():
            number = None if key == "step" else _numbers(value)
            if number is not None:
                steps, values = found.setdefault(key, ([], []))
                steps.append(step)
                values.append(number)
    out = {}
    for key, (steps, values) in found.items():
        odd = next((at for at, value in enumerate(values) if value.shape != values[0].shape), None)
        if odd is not None:
            raise CheckpointError(
                f"{path}: {key!r} has the shape {values[odd].shape} in step {steps[odd]} and {values[0].shape} in step"
                f" {steps[0]}: these are lines of different runs"
            )
        out[key] = Series(steps=np.array(steps, dtype=np.int64), values=np.stack(values))
    if not out:
        raise CheckpointError(f"{path} has steps without any number: there is nothing to plot")
    return out


def _numbers(value: Any) -> NDArray[np.float64] | None:
    """A number, a list of numbers or a list of such lists; None for everything else, such as null and text."""
    if isinstance(value, bool | str) or value is None or value == []:
        return None
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return array if array.ndim <= 2 else None
