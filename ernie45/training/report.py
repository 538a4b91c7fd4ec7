"""The report of training runs: pictures, CSV files and one HTML page that needs nothing but itself.

The page holds the drawings as inline SVG whose colours are CSS variables, so that they follow the reader's light or dark
setting; it asks no server for anything and runs no script.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ernie45 import __version__
from ernie45.checkpoint.atomic import atomic_write_bytes
from ernie45.training.plot import draw, span_of
from ernie45.training.plot_style import COLOURS, GRID, INK, PAPER, Drawing
from ernie45.training.run_log import RunLog, Series
from ernie45.training.run_tables import (
    Table,
    configuration,
    duration,
    experts_csv,
    measurements,
    overview,
    scalars_csv,
    shown,
)

PAGE = "report.html"
_UNSAFE = re.compile(r"[^\w.-]+")
# The same hues, light enough for dark paper.
_DARK = ("#6fb3d9", "#e58b90", "#b3c48c", "#e0b878", "#b49cc4", "#79c7c7", "#d09c66", "#b4b8bd")
_STYLE = """
:root{color-scheme:light dark;--page:#f6f7f8;--paper:#fff;--ink:#33383d;--soft:#66707a;--grid:#d9dde1;LIGHT}
@media(prefers-color-scheme:dark){:root{--page:#14171a;--paper:#1d2125;--ink:#dfe3e7;--soft:#98a2ac;--grid:#3a4147;DARK}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 16px 48px}
h1{font-size:1.5rem;margin:0}h2{font-size:1.05rem;margin:0 0 8px}
p{margin:4px 0 0;color:var(--soft)}
section,.figure{background:var(--paper);border:1px solid var(--grid);border-radius:8px}
section{padding:16px;margin-top:16px}
.wide{overflow-x:auto}
.wide svg{display:block;width:100%;min-width:680px;height:auto}
.figures{display:flex;flex-wrap:wrap;gap:12px;margin-top:16px}
.figure{flex:1 1 150px;padding:12px 16px}
.figure b{display:block;font-size:1.25rem;font-variant-numeric:tabular-nums}
.figure span{color:var(--soft);font-size:.85rem}
table{border-collapse:collapse;width:100%;font-size:.87rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:4px 12px 4px 0;border-bottom:1px solid var(--grid);vertical-align:top;white-space:nowrap}
td{overflow-wrap:anywhere;white-space:normal}
summary{cursor:pointer;font-weight:600}
.note{border-left:3px solid var(--c1);padding-left:12px;color:var(--ink)}
"""


def write_report(runs: Sequence[RunLog], folder: Path) -> list[Path]:
    """Write everything into `folder`, which is made if need be; files of an earlier report are replaced.

    Returns: the files, the page first. Raises: NotFoundError without matplotlib; CapacityError if the disk is full.
    """
    drawings = draw(runs)
    experts = experts_csv(runs)
    folder.mkdir(parents=True, exist_ok=True)
    files = {PAGE: page(runs, drawings).encode(), "metrics.csv": scalars_csv(runs).encode()}
    if experts is not None:
        files["experts.csv"] = experts.encode()
    for drawing in drawings:
        stem = _UNSAFE.sub("-", drawing.name)
        files |= {f"{stem}.png": drawing.png, f"{stem}.svg": drawing.svg.encode()}
    for name, data in files.items():
        atomic_write_bytes(folder / name, data)
    return [folder / name for name in files]


def page(runs: Sequence[RunLog], drawings: Sequence[Drawing]) -> str:
    """The whole page."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    notes = [note if len(runs) == 1 else f"{run.name}: {note}" for run in runs for note in run.notes]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        *(f'<p class="note">{html.escape(note)}</p>' for note in notes),
        _cards(runs[0]) if len(runs) == 1 else "",
        _section("Overview", _table(overview(runs))),
        *(_figure(drawing) for drawing in drawings),
        _section("Measurements", _table(measurements(runs))),
        _folded("Configuration", configuration(runs)),
        f"<p>ernie45 {__version__}. Every value is in metrics.csv.</p>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_style()}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def inline_svg(drawing: Drawing) -> str:
    """The picture as part of a page: no prolog, ids of its own, colours from the page's variables."""
    svg = drawing.svg[drawing.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = _UNSAFE.sub("-", drawing.name)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\g<1>#{prefix}-", svg)
    for idx, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--c{idx})")
    svg = svg.replace(INK, "var(--ink)").replace(GRID, "var(--grid)").replace(PAPER, "var(--paper)")
    label = html.escape(drawing.heading, quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _style() -> str:
    light, dark = (";".join(f"--c{idx}:{colour}" for idx, colour in enumerate(some)) for some in (COLOURS, _DARK))
    return _STYLE.replace("LIGHT", light).replace("DARK", dark)


def _cards(run: RunLog) -> str:
    """The figures that one looks for first."""
    found = [
        card(run.series[key]) for key, card in _CARDS.items() if key in run.series and run.series[key].values.ndim == 1
    ]
    cells = "".join(
        f'<div class="figure"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'
        for value, label in found
    )
    return f'<div class="figures">{cells}</div>' if cells else ""


def _last_mean(series: Series) -> tuple[str, str]:
    return shown(series.mean_of_end(span_of(series))), "last loss, mean of the end"


def _lowest(series: Series) -> tuple[str, str]:
    value, step = series.extreme(lowest=True)
    return shown(value), f"lowest loss on held-out data, step {step:,}"


def _speed(series: Series) -> tuple[str, str]:
    return f"{np.nanmedian(series.values):,.0f}", "tokens per second, median"


def _share(series: Series) -> tuple[str, str]:
    return f"{np.nanmedian(series.values):.0%}", "of the peak FLOP/s, median"


def _peak(series: Series) -> tuple[str, str]:
    return f"{series.extreme(lowest=False)[0] / 1e9:.2f} GB", "highest memory"


def _time(series: Series) -> tuple[str, str]:
    return duration(series.last), "duration"


_CARDS: Mapping[str, Callable[[Series], tuple[str, str]]] = {
    "loss": _last_mean,
    "eval/loss": _lowest,
    "tokens_per_s": _speed,
    "mfu": _share,
    "memory_bytes": _peak,
    "time_s": _time,
}


def _figure(drawing: Drawing) -> str:
    caption = f"<p>{html.escape(drawing.caption)}</p>" if drawing.caption else ""
    return _section(drawing.heading, f'<div class="wide">{inline_svg(drawing)}</div>{caption}')


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{html.escape(heading)}</h2>{body}</section>"


def _folded(heading: str, table: Table) -> str:
    if not table:
        return ""
    return f"<section><details><summary>{html.escape(heading)}</summary>{_table(table)}</details></section>"


def _table(table: Table) -> str:
    header, *rows = table
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
