"""What `ernie bench` shows: facts about the machine, a table, a plot."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from typing import Any

from ernie45 import __version__
from ernie45.bench.measure import Figure
from ernie45.checkpoint.atomic import atomic_write_bytes
from ernie45.errors import NotFoundError, UsageError
from ernie45.kernels.native import status

_PLOT_FORMATS = (".png", ".svg")


def facts() -> dict[str, Any]:
    """Machine, versions and time of a measurement."""
    cpu = status().cpu
    return {
        "time": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "ernie45": __version__,
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "cpu": f"{cpu.get('model') or platform.processor()}, {cpu.get('logical_cores')} logical cores",
    }


def table(figures: Sequence[Figure], rivals: Sequence[Figure], peer: str | None) -> str:
    """A Markdown table, one row per figure; the peer's column where there is one."""
    by_case = {(f.what, f.context, f.batch): f for f in rivals}
    header = ["case", "tokens/s (median, low-high)", "bound", "of the bound"]
    header += [f"{peer}", "ratio"] if peer else []
    rows = [header, ["---"] * len(header)]
    for figure in figures:
        bound = figure.bound_tokens_per_s
        row = [
            _case(figure),
            f"{figure.tokens_per_s:.1f} ({figure.low:.1f}-{figure.high:.1f})",
            f"{bound:.1f}" if bound else "arithmetic",
            f"{figure.tokens_per_s / bound:.0%}" if bound else "-",
        ]
        if peer:
            rival = by_case.get((figure.what, figure.context, figure.batch))
            row += (
                [f"{rival.tokens_per_s:.1f}", f"{figure.tokens_per_s / rival.tokens_per_s:.2f}"]
                if rival
                else ["-", "-"]
            )
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def check_plot(path: Path) -> None:
    """Whether `save_plot` can write there: asked before minutes of measuring.

    Raises: UsageError for a name that is neither .png nor .svg; NotFoundError without the folder or without matplotlib.
    """
    if path.suffix not in _PLOT_FORMATS:
        raise UsageError(f"a plot is saved as {' or '.join(_PLOT_FORMATS)}, not as {path.name!r}")
    if not path.parent.is_dir():
        raise NotFoundError(f"there is no folder {path.parent} for the plot {path.name}: make it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise NotFoundError("a plot needs matplotlib: pip install matplotlib")


def save_plot(
    path: Path, figures: Sequence[Figure], rivals: Sequence[Figure], peer: str | None, about: Mapping[str, Any]
) -> None:
    """Bars of tokens per second from zero on, decode above prefill, with spread, bound and peer. Raises: as `check_plot`."""
    check_plot(path)
    from matplotlib.figure import Figure as Canvas

    groups = [group for what in ("decode", "prefill") if (group := [f for f in figures if f.what == what])]
    rows = [len(group) for group in groups]
    canvas = Canvas(figsize=(8, 1.9 + 0.7 * sum(rows)), layout="constrained")
    panels = canvas.subplots(len(groups), squeeze=False, height_ratios=rows)[:, 0]
    for axes, group in zip(panels, groups, strict=True):
        _draw_bars(axes, group, rivals, peer)
    panels[-1].set_xlabel("tokens per second (all sequences)")
    canvas.suptitle(f"{about['model']}, {about['weights']}\n{about['cpu']}", fontsize=10)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    names = [name for name in ("ernie45", str(peer), "memory bound") if name in handles]
    canvas.legend([handles[name] for name in names], names, loc="outside lower center", ncols=3, fontsize=9)
    image = BytesIO()
    canvas.savefig(image, format=path.suffix[1:], dpi=120)
    atomic_write_bytes(path, image.getvalue())


def _draw_bars(axes: Any, group: Sequence[Figure], rivals: Sequence[Figure], peer: str | None) -> None:
    by_case = {(f.what, f.context, f.batch): f for f in rivals}
    pairs = [(figure, by_case.get((figure.what, figure.context, figure.batch))) for figure in group]
    for at, (figure, rival) in enumerate(pairs):
        height = 0.7 if rival is None else 0.35
        bars = [(figure, "ernie45", "#2a6f97", at if rival is None else at - height / 2)]
        bars += [(rival, str(peer), "#c9ada7", at + height / 2)] if rival is not None else []
        for shown, label, colour, y in bars:
            speed = shown.tokens_per_s
            spread = [[speed - shown.low], [shown.high - speed]]
            axes.barh(y, speed, height, color=colour, label=label, xerr=spread, ecolor="#444444", capsize=2)
            # Behind the bar, because a short one has no room inside; on white, because the bound's line may run there.
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            place: Any = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{speed:.1f}", (shown.high, y), fontsize=9, bbox=box, **place)
        if figure.bound_tokens_per_s:
            axes.vlines(
                figure.bound_tokens_per_s, at - 0.42, at + 0.42, colors="#9b2226", linestyles="--", label="memory bound"
            )
    axes.set_yticks(range(len(pairs)), [_case(figure) for figure, _ in pairs])
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.set_xlim(0, 1.1 * axes.get_xlim()[1])


def _case(figure: Figure) -> str:
    if figure.what == "prefill":
        return f"prefill, {figure.context} tokens"
    together = f", {figure.batch} together" if figure.batch > 1 else ""
    return f"decode, context {figure.context}{together}"
