"""The look that all drawings of runs share: colours, a grid of panels, legends, a finished picture."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from ernie45.errors import NotFoundError
from ernie45.training.run_log import RunLog

INK, GRID, PAPER = "#33383d", "#d9dde1", "#ffffff"
COLOURS = ("#2a6f97", "#c1666b", "#8a9b68", "#d4a253", "#6d597a", "#4f9d9d", "#a0703c", "#8b8f94")
"""One per run, then again from the first. A page may replace these and the three above by its own."""

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in somebody's name is a dollar sign
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    # Texts stay texts, and equal data gives equal bytes.
    "svg.fonttype": "none",
    "svg.hashsalt": "ernie45",
}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A finished picture."""

    name: str
    """Of its files, without ending."""
    heading: str
    caption: str
    """How to read it."""
    png: bytes
    svg: str


def check() -> None:
    """Whether anything can be drawn. Raises: NotFoundError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise NotFoundError("a plot needs matplotlib: pip install matplotlib")


def styled() -> AbstractContextManager[None]:
    """A block within which pictures get this look."""
    import matplotlib as mpl

    return mpl.rc_context(_STYLE)


def grid(num_panels: int, *, columns: int, height: float) -> tuple[Any, list[Any]]:
    """A canvas and its panels, of which no more are shown than are needed; `height` is a row's, in inches."""
    from matplotlib.figure import Figure

    rows = math.ceil(num_panels / columns)
    canvas = Figure(figsize=(10, 0.4 + height * rows), layout="constrained", facecolor=PAPER)
    panels = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[num_panels:]:
        axes.set_axis_off()
    return canvas, panels[:num_panels]


def coloured(runs: Sequence[RunLog]) -> list[tuple[RunLog, str]]:
    """The runs with their colours, the same in every drawing."""
    return [(run, COLOURS[idx % len(COLOURS)]) for idx, run in enumerate(runs)]


def legend(canvas: Any, runs: Sequence[RunLog]) -> None:
    """Say which colour is which run, where there are several."""
    if len(runs) > 1:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=colour, label=run.name) for run, colour in coloured(runs)]
        canvas.legend(handles=handles, loc="outside upper left", ncols=min(4, len(runs)))


def whole_numbers(axis: Any) -> None:
    """Mark an axis of steps, layers or experts at whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def finish(canvas: Any, name: str, heading: str, caption: str) -> Drawing:
    """Write the canvas in both formats."""
    save: Callable[..., None] = canvas.savefig
    png, svg = BytesIO(), BytesIO()
    save(png, format="png", dpi=120)
    save(svg, format="svg", dpi=120, metadata={"Date": None})
    return Drawing(name=name, heading=heading, caption=caption, png=png.getvalue(), svg=svg.getvalue().decode())
