"""Drawings of training runs: every measurement over the steps, and the router.

One run shows its raw values and their mean; several runs lie on each other, a colour each, in the same panels. matplotlib is
imported when something is drawn, without `pyplot`: nothing global changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ernie45.training.plot_router import draw_router
from ernie45.training.plot_style import Drawing, check, coloured, finish, grid, legend, styled, whole_numbers
from ernie45.training.run_log import RunLog, Series

_MAX_COLUMNS = 3
_FEW = 60
"""Up to here no mean is drawn; up to half of it every value is a point."""
_MANY = 4000
"""From here on raw values are drawn as a picture, also in SVG."""


class _Known(NamedTuple):
    """How a measurement is shown."""

    drawing: str
    title: str
    unit: str = ""
    scale: float = 1.0
    steady: bool = False
    """It does not scatter, so that a mean would say nothing."""


_KNOWN = {
    "loss": _Known("loss", "loss"),
    "eval/loss": _Known("loss", "loss on held-out data"),
    "mtp_loss": _Known("losses", "MTP loss"),
    "balance_loss": _Known("losses", "balance loss"),
    "z_loss": _Known("losses", "router z-loss"),
    "orthogonal_loss": _Known("losses", "orthogonal loss"),
    "lr": _Known("progress", "learning rate", steady=True),
    "grad_norm": _Known("progress", "gradient norm"),
    "tokens_per_s": _Known("progress", "speed", "tokens/s"),
    "mfu": _Known("progress", "model FLOP utilisation", "% of peak", scale=100),
    "data_share": _Known("progress", "waiting for data", "% of the time", scale=100),
    "memory_bytes": _Known("progress", "memory", "GB", scale=1e-9, steady=True),
}
_IN_NATS = ("loss", "mtp_loss", "eval/loss", "eval/mtp_loss")
_HEADINGS = {
    "loss": "Loss",
    "losses": "Parts of the loss",
    "progress": "Optimizer, speed, memory",
    "other": "Other measurements",
}


def draw(runs: Sequence[RunLog]) -> list[Drawing]:
    """Draw everything that any of the runs has measured. Raises: NotFoundError without matplotlib."""
    check()
    with styled():
        return [_lines(name, keys, runs) for name, keys in groups(runs).items()] + draw_router(runs)


def groups(runs: Sequence[RunLog]) -> dict[str, list[str]]:
    """Keys by drawing: the known ones in their order, then a drawing per prefix before "/", and one of what has none."""
    keys = list(dict.fromkeys(key for run in runs for key in run.scalars()))
    out: dict[str, list[str]] = {}
    for key in [*(key for key in _KNOWN if key in keys), *(key for key in keys if key not in _KNOWN)]:
        prefix = key.partition("/")[0] if "/" in key else "other"
        out.setdefault(_KNOWN[key].drawing if key in _KNOWN else prefix, []).append(key)
    return out


def span_of(series: Series) -> int:
    """Values that the drawn mean spans: 2 % of all, and 1, which is no mean, where they are few."""
    return max(2, round(0.02 * len(series.steps))) if len(series.steps) > _FEW else 1


def _lines(name: str, keys: Sequence[str], runs: Sequence[RunLog]) -> Drawing:
    """A panel per measurement, a line per run."""
    canvas, panels = grid(len(keys), columns=min(_MAX_COLUMNS, len(keys)), height=3.4 if name == "loss" else 2.5)
    means = False
    for axes, key in zip(panels, keys, strict=True):
        known = _KNOWN.get(key, _Known(name, key.partition("/")[2] or key))
        for run, colour in coloured(runs):
            series = run.scalars().get(key)
            if series is not None:
                means |= _line(axes, series, known, colour)
        axes.set_title(known.title, loc="left")
        axes.set(xlabel="step", ylabel=known.unit or _unit_of_loss(key, runs))
        whole_numbers(axes.xaxis)
    legend(canvas, runs)
    caption = "Thin: every logged value; thick: their mean over about 2 % of the run." if means else ""
    return finish(canvas, name, _HEADINGS.get(name, name.replace("_", " ").capitalize()), caption)


def _line(axes: Any, series: Series, known: _Known, colour: str) -> bool:
    """Draw one measurement of one run; returns whether a mean was drawn."""
    values = known.scale * series.values
    span = span_of(series)
    if known.steady or span == 1:
        marker = "o" if len(values) <= _FEW // 2 else None
        axes.plot(series.steps, values, color=colour, marker=marker, markersize=3)
        return False
    axes.plot(series.steps, values, color=colour, linewidth=0.6, alpha=0.4, rasterized=len(values) > _MANY)
    axes.plot(series.steps, known.scale * series.smoothed(span), color=colour)
    return True


def _unit_of_loss(key: str, runs: Sequence[RunLog]) -> str:
    """Cross-entropy is counted in nats per token; a preference loss has no unit."""
    predicts = all(run.about.get("method") in ("pretrain", "sft") for run in runs)
    return "nats per token" if predicts and key in _IN_NATS else ""
