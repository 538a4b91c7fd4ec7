"""Tables of training runs: what a run is, its measurements in figures, and CSV files with everything that was logged."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ernie45.training.run_log import COUNTERS, RunLog, Series

Table = list[list[str]]
"""Rows of cells; the first row is the header."""


def overview(runs: Sequence[RunLog]) -> Table:
    """What each run is and how far it came: a column per run."""
    rows = {
        "method": [str(run.about.get("method", "-")) for run in runs],
        "started": [str(run.about.get("started", "-")) for run in runs],
        "steps": [f"{run.last_step:,}" for run in runs],
        "tokens": [_count(run.counter("tokens")) for run in runs],
        "duration": [duration(run.counter("time_s")) for run in runs],
        "parameters": [_parameters(run.about) for run in runs],
    }
    for name in dict.fromkeys(name for run in runs for name in _versions(run)):
        rows[f"{name} version"] = [str(_versions(run).get(name, "-")) for run in runs]
    return [["", *(run.name for run in runs)], *([name, *cells] for name, cells in rows.items())]


def measurements(runs: Sequence[RunLog]) -> Table:
    """Last, lowest and highest value of every measurement, with the steps; a row per measurement and run."""
    table = [["measurement", *(["run"] if len(runs) > 1 else []), "last", "lowest", "in step", "highest", "in step"]]
    for key in dict.fromkeys(key for run in runs for key in run.scalars()):
        for run in runs:
            series = run.scalars().get(key)
            if series is not None:
                found = [series.extreme(lowest=lowest) for lowest in (True, False)]
                places = [cell for value, step in found for cell in (shown(value), f"{step:,}")]
                table.append([key, *([run.name] if len(runs) > 1 else []), shown(series.last), *places])
    return table


def configuration(runs: Sequence[RunLog]) -> Table:
    """Every setting of every run, as `section.key`; of several runs, the settings in which they differ come first."""
    flat = [_flattened(run.about.get("config") or {}) for run in runs]
    rows = [[key, *(settings.get(key, "-") for settings in flat)] for key in dict.fromkeys(k for f in flat for k in f)]
    rows.sort(key=lambda row: len(set(row[1:])) == 1)  # stable: the order within both parts stays
    return [["setting", *(run.name for run in runs)], *rows] if rows else []


def scalars_csv(runs: Sequence[RunLog]) -> str:
    """Run, step, counters, every scalar, and every value per layer as `key/layer`; empty where nothing was logged."""
    columns = {run.name: _columns(run) for run in runs}
    keys = list(dict.fromkeys(key for found in columns.values() for key in found))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "step", *keys])
    for name, found in columns.items():
        steps = sorted({step for values in found.values() for step in values})
        for step in steps:
            writer.writerow([name, step, *(found.get(key, {}).get(step, "") for key in keys)])
    return out.getvalue()


def experts_csv(runs: Sequence[RunLog]) -> str | None:
    """Every value per layer and expert, a row each; None for dense models."""
    found = [(run, key, series) for run in runs for key, series in run.series.items() if series.values.ndim == 3]
    if not found:
        return None
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "measurement", "step", "layer", "expert", "value"])
    for run, key, series in found:
        for step, layers in zip(series.steps.tolist(), series.values.tolist(), strict=True):
            for layer, values in enumerate(layers):
                writer.writerows([run.name, key, step, layer, expert, value] for expert, value in enumerate(values))
    return out.getvalue()


def duration(seconds: float) -> str:
    """`3723.5` -> `1 h 02 min`."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def shown(value: float) -> str:
    """A number for people: four digits, without an exponent where it needs none."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else str(value)
    if value == round(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def _columns(run: RunLog) -> dict[str, dict[int, float]]:
    out: dict[str, dict[int, float]] = {}
    counters = [key for key in COUNTERS if key in run.series]
    for key in [*counters, *(key for key in run.series if key not in counters)]:
        series = run.series[key]
        if series.values.ndim == 1:
            out[key] = _by_step(series, series.values.tolist())
        elif series.values.ndim == 2:
            for layer in range(series.values.shape[1]):
                out[f"{key}/{layer}"] = _by_step(series, series.values[:, layer].tolist())
    return out


def _by_step(series: Series, values: Sequence[float]) -> dict[int, float]:
    return dict(zip(series.steps.tolist(), values, strict=True))


def _flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    out: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            out |= _flattened(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = "none" if value is None else str(value)
    return out


def _versions(run: RunLog) -> Mapping[str, Any]:
    versions = run.about.get("versions")
    return versions if isinstance(versions, Mapping) else {}


def _parameters(about: Mapping[str, Any]) -> str:
    total, active = about.get("num_parameters"), about.get("num_active")
    if not isinstance(total, int):
        return "-"
    return _count(total) if active in (None, total) else f"{_count(total)}, {_count(active)} active per token"


def _count(value: Any) -> str:
    """`21825437888` -> `21.8 B` (billions)."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"
