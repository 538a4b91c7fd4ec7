"""Drawings of `serve.py`: throughput against concurrency, distributions of TTFT and TPOT, streams beside a long prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serve_figures import load_figures
from benchmarks.serve_report import cases_of, repeats_of, servers_of
from benchmarks.serve_workloads import Measured

_FORMATS = ("png", "svg")
_COLOURS = ("#2a6f97", "#c1666b", "#8a9b68", "#d4b483", "#6d597a")


def draw(folder: Path, measured: Sequence[Measured], title: str) -> list[Path]:
    """Write every drawing that the loads allow as PNG and as SVG; returns the files."""
    loads = [m for m in measured if m.workload == "load"]
    disturbed = [m for m in measured if m.workload == "interference" and all(a.error is None for a in m.answers)]
    files = []
    if loads:
        files += _save(folder, "throughput", _throughput(loads, title))
        files += _save(folder, "latency", _latency(loads, title))
    if disturbed:
        files += _save(folder, "interference", _interference(disturbed, title))
    return files


def _save(folder: Path, name: str, canvas: Any) -> list[Path]:
    files = [folder / f"{name}.{kind}" for kind in _FORMATS]
    for file in files:
        canvas.savefig(file, dpi=120)
    return files


def _canvas(rows: int, columns: int, size: tuple[float, float], title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    canvas = Figure(figsize=size, layout="constrained")
    canvas.suptitle(title, fontsize=9)
    return canvas, canvas.subplots(rows, columns, squeeze=False)


def _throughput(loads: Sequence[Measured], title: str) -> Any:
    prompts = list(dict.fromkeys(m.case["prompt"] for m in loads))
    canvas, panels = _canvas(1, len(prompts), (1 + 4 * len(prompts), 4), title)
    for axes, prompt in zip(panels[0], prompts, strict=True):
        cases = [case for case in cases_of(loads) if case["prompt"] == prompt]
        for server, colour in zip(servers_of(loads), _COLOURS, strict=False):
            figures = [(case["together"], load_figures(repeats_of(loads, server, case)).output_per_s) for case in cases]
            points = [(together, s) for together, s in figures if s is not None]
            errors = [[s.median - s.low for _, s in points], [s.high - s.median for _, s in points]]
            xs, ys = [x for x, _ in points], [s.median for _, s in points]
            axes.errorbar(xs, ys, yerr=errors, marker="o", capsize=3, label=server, color=colour)
        axes.set_xscale("log", base=2)
        axes.set_xticks([case["together"] for case in cases], [str(case["together"]) for case in cases])
        axes.set_ylim(bottom=0)
        axes.set_title(f"{prompt} tokens in, {cases[0]['output']} out", fontsize=9)
        axes.set_xlabel("requests together")
    panels[0][0].set_ylabel("output tokens/s, median and spread")
    panels[0][0].legend(fontsize=8)
    return canvas


def _latency(loads: Sequence[Measured], title: str) -> Any:
    cases = cases_of(loads)
    canvas, panels = _canvas(len(cases), 2, (9, 1 + 2.2 * len(cases)), title)
    for row, case in zip(panels, cases, strict=True):
        for server, colour in zip(servers_of(loads), _COLOURS, strict=False):
            answers = [a for repeat in repeats_of(loads, server, case) for a in repeat if a.error is None]
            _steps(row[0], [a.ttft_s for a in answers], server, colour)
            _steps(row[1], [1e3 * t for a in answers if (t := a.tpot_s) is not None], server, colour)
        row[0].set_ylabel(f"{case['prompt']} in, {case['together']} together\nshare of requests", fontsize=8)
        for axes in row:
            axes.set_xlim(left=0)
            axes.set_ylim(0, 1.02)
    panels[-1][0].set_xlabel("time to first token, s")
    panels[-1][1].set_xlabel("time per token behind it, ms")
    panels[0][0].legend(fontsize=8)
    return canvas


def _steps(axes: Any, values: Sequence[float], label: str, colour: str) -> None:
    ordered = sorted(values)
    if ordered:
        shares = [i / len(ordered) for i in range(len(ordered) + 1)]
        axes.step([ordered[0], *ordered], shares, where="post", label=label, color=colour)


def _interference(disturbed: Sequence[Measured], title: str) -> Any:
    """The first repeat of every server: each gap of each stream, at the time of its end."""
    firsts: Mapping[str, Measured] = {m.server: m for m in reversed(disturbed)}
    servers = servers_of(disturbed)
    canvas, panels = _canvas(len(servers), 1, (9, 1 + 2.2 * len(servers)), title)
    for (axes,), server, colour in zip(panels, servers, _COLOURS, strict=False):
        *streams, late = firsts[server].answers
        for stream in streams:
            times = [at - late.start_s for at in stream.token_times_s]
            axes.plot(times[1:], [1e3 * gap for gap in stream.gaps_s], ".", markersize=2, color=colour)
        axes.axvspan(0, late.ttft_s, color="#dddddd", zorder=0, label=f"{firsts[server].case['late']} tokens are read")
        axes.set_yscale("log")
        axes.set_ylabel(f"{server}\ngap, ms", fontsize=8)
    panels[0][0].legend(fontsize=8, loc="upper right")
    panels[-1][0].set_xlabel("seconds since the long prompt was sent")
    return canvas
