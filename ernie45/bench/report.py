"""What `ernie bench` shows: facts about the machine, a table, a plot."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ernie45 import __version__
from ernie45.bench.measure import Figure
from ernie45.errors import NotFoundError
from ernie45.kernels.native import status


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


def save_plot(
    path: Path, figures: Sequence[Figure], rivals: Sequence[Figure], peer: str | None, about: Mapping[str, Any]
) -> None:
    """Bars of tokens per second with the bound as a line each. Raises: NotFoundError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise NotFoundError(f"a plot needs matplotlib ({error}): pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_case = {(f.what, f.context, f.batch): f.tokens_per_s for f in rivals}
    figure, axes = pyplot.subplots(figsize=(1.6 * len(figures) + 2, 4.5))
    for at, measured in enumerate(figures):
        axes.bar(at - 0.2, measured.tokens_per_s, 0.4, color="#2a6f97", label="ernie45" if at == 0 else None)
        rival = by_case.get((measured.what, measured.context, measured.batch))
        if rival:
            axes.bar(at + 0.2, rival, 0.4, color="#c9ada7", label=peer if at == 0 else None)
        if measured.bound_tokens_per_s:
            label = "memory bound" if at == 0 else ""
            axes.hlines(
                measured.bound_tokens_per_s, at - 0.45, at + 0.45, colors="#9b2226", linestyles="--", label=label
            )
    axes.set_yscale("log")
    axes.set_xticks(range(len(figures)), [_case(f).replace(", ", "\n") for f in figures])
    axes.set_ylabel("tokens per second (all sequences)")
    axes.set_title(f"{about['model']}, {about['weights']}\n{about['cpu']}", fontsize=10)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _case(figure: Figure) -> str:
    if figure.what == "prefill":
        return f"prefill, {figure.context} tokens"
    together = f", {figure.batch} together" if figure.batch > 1 else ""
    return f"decode, context {figure.context}{together}"
