"""Drawings of the router: entropy by layer, load by layer and expert, over the steps and at the end.

Shape letters: N logged steps, L MoE layers, E experts of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ernie45.training.plot_style import Drawing, coloured, finish, grid, legend, whole_numbers
from ernie45.training.run_log import RunLog

ENTROPY, LOAD = "router_entropy", "expert_load"
"""Keys of the metrics: per layer, and per layer and expert."""

_MAX_COLUMNS = 400
_LOAD_UNIT = "times the even share"


def draw_router(runs: Sequence[RunLog]) -> list[Drawing]:
    """Draw what the runs have of entropy and load; nothing for dense models."""
    drawings = [_overview(runs)] if any({ENTROPY, LOAD} & run.series.keys() for run in runs) else []
    return drawings + [_load(run, len(runs) > 1) for run in runs if LOAD in run.series]


def _overview(runs: Sequence[RunLog]) -> Drawing:
    """Entropy over the steps, and the load at the end, one panel per run."""
    entropic = any(ENTROPY in run.series for run in runs)
    loaded = [run for run in runs if LOAD in run.series]
    num_panels = entropic + len(loaded)
    canvas, panels = grid(num_panels, columns=min(2, num_panels), height=3.0)
    if entropic:
        _entropy(canvas, panels[0], runs)
    for axes, run in zip(panels[entropic:], loaded, strict=True):
        load = _relative(run.series[LOAD].values[-1])
        rows, columns = (np.arange(size + 1) - 0.5 for size in load.shape)
        image = _heat(axes, columns, rows, load, _brightest(load))
        whole_numbers(axes.yaxis)
        axes.set(xlabel="expert", ylabel="MoE layer")
        of = f" of {run.name}" if len(runs) > 1 else ""
        axes.set_title(f"load{of}, step {run.series[LOAD].steps[-1]:,}", loc="left")
        canvas.colorbar(image, ax=axes, label=_LOAD_UNIT, extend="max")
    caption = "MoE layers count from 0."
    if loaded:
        caption += " A load of 1 is the even share, 1 / experts of a layer's tokens; 0 is an expert that nobody uses."
    return finish(canvas, "router-overview", "Router", caption)


def _entropy(canvas: Any, axes: Any, runs: Sequence[RunLog]) -> None:
    """One run: a line per layer. Several: the mean of the layers, between the lowest and the highest."""
    if len(runs) == 1:
        series = runs[0].series[ENTROPY]
        colours = _layer_colours(series.values.shape[1])
        for layer, colour in enumerate(colours.each):
            axes.plot(series.steps, series.values[:, layer], color=colour, linewidth=1)
        whole_numbers(canvas.colorbar(colours.scale, ax=axes, label="MoE layer").ax.yaxis)
        axes.set_title("router entropy", loc="left")
    else:
        for run, colour in coloured(runs):
            if ENTROPY in run.series:
                series = run.series[ENTROPY]
                low, high = series.values.min(axis=1), series.values.max(axis=1)
                axes.fill_between(series.steps, low, high, color=colour, alpha=0.2, linewidth=0)
                axes.plot(series.steps, series.values.mean(axis=1), color=colour)
        axes.set_title("router entropy, mean and range of the layers", loc="left")
        legend(canvas, runs)
    axes.set(xlabel="step", ylabel="nats")
    whole_numbers(axes.xaxis)


def _load(run: RunLog, among_others: bool) -> Drawing:
    """A heatmap per layer: experts over steps."""
    series = run.series[LOAD]
    steps, load = thinned(series.steps, _relative(series.values))
    num_layers, num_experts = load.shape[1:]
    canvas, panels = grid(num_layers, columns=min(3, num_layers), height=2.2)
    for layer, axes in enumerate(panels):
        image = _heat(axes, edges(steps), np.arange(num_experts + 1) - 0.5, load[:, layer].T, _brightest(load))
        whole_numbers(axes.xaxis)
        whole_numbers(axes.yaxis)
        axes.set_title(f"MoE layer {layer}", loc="left")
        axes.set(xlabel="step", ylabel="expert")
    canvas.colorbar(image, ax=panels, label=_LOAD_UNIT, extend="max", aspect=40)
    name = f"expert-load-{run.name}" if among_others else "expert-load"
    heading = f"Load of the experts over the steps{f': {run.name}' if among_others else ''}"
    caption = "Even use is 1 everywhere; a row that turns dark is an expert that falls out of use."
    return finish(canvas, name, heading, caption)


def _relative(load: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares (.., E) as multiples of the even share, whatever they sum to; a layer without tokens is NaN."""
    total = load.sum(axis=-1, keepdims=True)
    return np.divide(load * load.shape[-1], total, out=np.full_like(load, np.nan), where=total > 0)


def thinned(steps: NDArray[np.int64], values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most as many columns as a picture has room for: means of neighbours, of the steps and of `values` (N, ..)."""
    size = math.ceil(len(steps) / _MAX_COLUMNS)
    starts = np.arange(0, len(steps), size)
    counts = np.diff([*starts, len(steps)])
    means = np.add.reduceat(values, starts) / counts.reshape(-1, *[1] * (values.ndim - 1))
    return np.add.reduceat(steps, starts) / counts, means


def edges(centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where columns begin and end, one more than `centres`: half-way between their neighbours."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[1:] + centres[:-1]) / 2
    return np.array([2 * centres[0] - middles[0], *middles, 2 * centres[-1] - middles[-1]])


def _brightest(load: NDArray[np.float64]) -> float:
    """Where the colours end: an expert of the first steps with ten times its share shall not darken all others."""
    return min(4.0, max(2.0, float(np.nanmax(load, initial=0.0))))


def _heat(
    axes: Any, xs: NDArray[np.float64], ys: NDArray[np.float64], values: NDArray[np.float64], highest: float
) -> Any:
    axes.grid(visible=False)
    return axes.pcolormesh(xs, ys, values, cmap="viridis", vmin=0, vmax=highest, rasterized=True)


class _LayerColours(NamedTuple):
    each: list[Any]
    scale: Any
    """What a colour bar is made of."""


def _layer_colours(num_layers: int) -> _LayerColours:
    """From blue to green by depth, without the ends that vanish on dark or on white paper."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    some = colormaps["viridis"](np.linspace(0.2, 0.85, num_layers))
    return _LayerColours(list(some), ScalarMappable(Normalize(-0.5, num_layers - 0.5), ListedColormap(some)))
