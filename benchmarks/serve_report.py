"""The report of `serve.py` as Markdown: a table per workload, and what a reader needs to judge it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.common import (
    Spread,
    markdown_table,
    noise_line,
    number,
    origin_lines,
    size_text,
    spread,
    spread_text,
)
from benchmarks.serve_figures import (
    Disturbance,
    Limits,
    LoadFigures,
    Percentiles,
    disturbance,
    errors_of,
    goodput,
    load_figures,
    percentiles,
)
from benchmarks.serve_load import Answer
from benchmarks.serve_workloads import Measured

OURS = "ernie45"
_CLIENT_SHARE = 0.1  # of a core: above, the client takes from the server what it measures


def to_markdown(report: Mapping[str, Any], measured: Sequence[Measured]) -> str:
    """The whole report; `report` is what `serve.py` collects beside the loads, see its `run`."""
    tables: Mapping[str, Callable[[Mapping[str, Any], Sequence[Measured]], str]] = {
        "load": _load_table,
        "prefix": _prefix_table,
        "interference": _interference_table,
        "overload": _overload_table,
        "overhead": _overhead_table,
    }
    parts = [f"## Serving: {report['network']}", _server_table(report)]
    for workload, table in tables.items():
        chosen = [m for m in measured if m.workload == workload]
        if chosen:
            parts.append(f"### {workload}\n\n{table(report, chosen)}")
    broken = {name: why for name, why in report["missing"].items() if name in report["servers"]}
    if broken:
        parts.append("\n".join(f"- **{name} lacks figures**: {why}" for name, why in broken.items()))
    parts.append("\n".join(f"- {line}" for line in _facts(report, measured)))
    return "\n\n".join(parts)


def cases_of(measured: Sequence[Measured]) -> list[Mapping[str, float | str]]:
    """The cases of some loads, each once."""
    cases: list[Mapping[str, float | str]] = []
    for m in measured:
        if m.case not in cases:
            cases.append(m.case)
    return cases


def repeats_of(measured: Sequence[Measured], server: str, case: Mapping[str, float | str]) -> list[Sequence[Answer]]:
    """The answers of every repeat of one case on one server."""
    return [m.answers for m in measured if m.server == server and m.case == case]


def servers_of(measured: Sequence[Measured]) -> list[str]:
    """Names in the order of their turns."""
    return list(dict.fromkeys(m.server for m in measured))


def least_tpot_s(report: Mapping[str, Any], server: str, case: Mapping[str, Any]) -> float | None:
    """What the memory bandwidth allows: weights once, and the cache of every stream at its mean length; None if unknown."""
    about = report["servers"][server]
    if about["weight_bytes"] is None or report["bandwidth"] is None:
        return None
    cache = case["together"] * (case["prompt"] + case["output"] / 2) * about["kv_bytes_per_token"]
    return float((about["weight_bytes"] + cache) / report["bandwidth"]["bytes_per_s"])


def _server_table(report: Mapping[str, Any]) -> str:
    header = ["server", "version", "weights", "read per token", "ready, s", "first token, s", "memory"]
    rows = []
    for name, about in report["servers"].items():
        times = [about["ready_s"], about["first_token_s"]]
        shown = [spread_text(spread(values)) if values else "-" for values in times]
        size = "-" if about["weight_bytes"] is None else f"{number(about['weight_bytes'] / 1e6)} MB"
        memory = size_text(about["resident_bytes"] or None)
        rows.append([name, about["version"], about["weights"], size, *shown, memory])
    for name, why in report["missing"].items():
        if name not in report["servers"]:
            rows.append([name, f"**not measured**: {why}".replace("|", "/"), *"-----"])
    return markdown_table(header, rows, num_words=3)


def _load_table(report: Mapping[str, Any], measured: Sequence[Measured]) -> str:
    header = ["load", "server", "output tok/s", "ours / this", "requests/s", "TTFT, s", "TPOT, ms"]
    header += ["least TPOT", "gap p99, ms", "whole answer, s", "errors"]
    rows = []
    for case in cases_of(measured):
        ours = load_figures(repeats_of(measured, OURS, case)) if OURS in servers_of(measured) else None
        for server in servers_of(measured):
            figures = load_figures(repeats_of(measured, server, case))
            least = least_tpot_s(report, server, case)
            rows.append(
                [
                    f"{case['prompt']} in, {case['output']} out, {case['together']} together",
                    server,
                    _spread(figures.output_per_s),
                    _ratio(ours, figures) if server != OURS else "",
                    _spread(figures.requests_per_s),
                    _percentiles(figures.ttft),
                    _percentiles(figures.tpot, 1e3),
                    "-" if least is None else number(1e3 * least),
                    "-" if figures.gap is None else number(1e3 * figures.gap.p99),
                    _percentiles(figures.elapsed),
                    _errors(figures.errors, figures.requests),
                ]
            )
    return markdown_table(header, rows, num_words=2)


def _prefix_table(report: Mapping[str, Any], measured: Sequence[Measured]) -> str:
    header = [
        "server",
        "shared",
        "own",
        "TTFT miss, s",
        "TTFT hit, s",
        "hit / miss",
        "cached tokens of a hit",
        "errors",
    ]
    rows = []
    for server in servers_of(measured):
        mine = [m for m in measured if m.server == server]
        ttft: dict[str, Percentiles | None] = {}
        for kind in ("miss", "hit"):
            answers = [[a for a in m.answers if a.error is None] for m in mine if m.case["kind"] == kind]
            ttft[kind] = percentiles([[a.ttft_s for a in group] for group in answers])
        miss, hit = ttft["miss"], ttft["hit"]
        everything = [answer for m in mine for answer in m.answers]
        told = [
            a.cached_tokens for m in mine if m.case["kind"] == "hit" for a in m.answers if a.cached_tokens is not None
        ]
        rows.append(
            [
                server,
                str(mine[0].case["shared"]),
                str(mine[0].case["own"]),
                "-" if miss is None else spread_text(miss.medians),
                "-" if hit is None else spread_text(hit.medians),
                "-" if miss is None or hit is None else f"{hit.p50 / miss.p50:.0%}",
                number(sum(told) / len(told)) if told else "not told",
                _errors(errors_of(everything), len(everything)),
            ]
        )
    return markdown_table(header, rows, num_words=1)


def _interference_table(report: Mapping[str, Any], measured: Sequence[Measured]) -> str:
    header = ["server", "streams", "late prompt", "TPOT quiet, ms", "TPOT beside it, ms", "ratio", "longest gap, s"]
    header += ["TTFT of the late one, s", "errors"]
    rows = []
    for server in servers_of(measured):
        mine = [m for m in measured if m.server == server]
        found = [d for m in mine if (d := disturbance(m.answers[:-1], m.answers[-1])) is not None]
        answers = [answer for m in mine for answer in m.answers]
        columns: list[tuple[float, Callable[[Disturbance], float]]] = [
            (1e3, lambda d: d.quiet_tpot_s),
            (1e3, lambda d: d.beside_tpot_s),
            (1.0, lambda d: d.ratio),
            (1.0, lambda d: d.longest_gap_s),
            (1.0, lambda d: d.late_ttft_s),
        ]
        shown = [spread_text(spread([scale * get(d) for d in found])) if found else "-" for scale, get in columns]
        case, errors = mine[0].case, errors_of(answers)
        why = _errors(errors, len(answers)) if found or errors else "streams ended too soon: raise --stream-tokens"
        rows.append([server, str(case["streams"]), str(case["late"]), *shown, why])
    return markdown_table(header, rows, num_words=1)


def _overload_table(report: Mapping[str, Any], measured: Sequence[Measured]) -> str:
    """Rates differ between servers and repeats, so that rows go by factor."""
    limits = Limits(**report["settings"]["limits"])
    window_s = report["settings"]["overload_s"]
    header = ["server", "arrivals", "per s", "sent", "good per s", "of its best", "TTFT, s", "TPOT, ms", "errors"]
    rows = []
    for server in servers_of(measured):
        mine = [m for m in measured if m.server == server]
        factors = list(dict.fromkeys(m.case["factor"] for m in mine))
        good: dict[float | str, Spread] = {}
        for factor in factors:
            chosen = [m for m in mine if m.case["factor"] == factor]
            # In the closed loop there is no window: its own length counts.
            windows = [m.wall_s if factor == "capacity" else window_s for m in chosen]
            good[factor] = spread([goodput(m.answers, limits, w) for m, w in zip(chosen, windows, strict=True)])
        best = max(s.median for s in good.values())
        for factor in factors:
            chosen = [m for m in mine if m.case["factor"] == factor]
            figures = load_figures([m.answers for m in chosen])
            closed = factor == "capacity"
            rows.append(
                [
                    server,
                    "closed loop" if closed else f"{factor:g} x capacity",
                    "-" if closed else spread_text(spread([float(m.case["rate"]) for m in chosen])),
                    str(figures.requests),
                    spread_text(good[factor]),
                    f"{good[factor].median / best:.0%}" if best else "-",
                    _percentiles(figures.ttft),
                    _percentiles(figures.tpot, 1e3),
                    _errors(figures.errors, figures.requests),
                ]
            )
    return markdown_table(header, rows, num_words=2)


def _overhead_table(report: Mapping[str, Any], measured: Sequence[Measured]) -> str:
    """Whole answers at one client, over HTTP and, for this package, from the engine in the process that asks."""
    header = ["server", "in", "out", "over HTTP, s", "in the process, s", "overhead", "errors"]
    rows = []
    inside = report["engine_s"]
    for server in servers_of(measured):
        mine = [m for m in measured if m.server == server]
        figures = load_figures([m.answers for m in mine])
        whole = None if figures.elapsed is None else figures.elapsed.medians
        alone = percentiles(inside) if server == OURS and inside else None
        rows.append(
            [
                server,
                str(mine[0].case["prompt"]),
                str(mine[0].case["output"]),
                _spread(whole),
                "-" if alone is None else spread_text(alone.medians),
                "-" if alone is None or whole is None else f"{whole.median / alone.medians.median - 1:+.1%}",
                _errors(figures.errors, figures.requests),
            ]
        )
    return markdown_table(header, rows, num_words=1)


def _facts(report: Mapping[str, Any], measured: Sequence[Measured]) -> list[str]:
    settings, limits = report["settings"], report["settings"]["limits"]
    facts = [
        f"median (smallest-largest) of {settings['repeats']} repeats; three figures with slashes: 50th / 90th / 99th percentile"
        " over the requests of all repeats",
        f"greedy, end tokens ignored; prompts are {_prompt_kind(settings)}; {settings['threads']} threads, at most"
        f" {settings['max_num_seqs']} sequences of {settings['max_model_len']} tokens; one server at a time; the client"
        f" hangs up after {settings['deadline_s']:g} s",
        f"ready and first token count from the start of the server's process, its files in the page cache; memory is what its"
        f" processes held at most behind a workload; weights: {report['weights']}",
        "TTFT: request to first token; TPOT: (last - first) / (tokens - 1) of a request; gap: between events; good: first token"
        f" within {limits['ttft_s']:g} s and TPOT up to {1e3 * limits['tpot_s']:g} ms",
        *_bound_lines(report),
        *origin_lines(report),
        noise_line(_noise(report, measured)),
        *_client_lines(measured),
        *(
            f"{name} was started by `{about['command']}`"
            for name, about in report["servers"].items()
            if about["command"]
        ),
    ]
    if settings["quick"]:
        facts.append("**not to be published**: --quick measures a tiny network, to test this program")
    return facts


def _bound_lines(report: Mapping[str, Any]) -> list[str]:
    if report["bandwidth"] is None:
        return []
    rate, cache = report["bandwidth"]["bytes_per_s"], report["machine"]["last_level_cache_bytes"]
    lines = [
        "least TPOT: bytes of all weights that a token reads, once for all streams, and of every stream's cache in the middle of"
        f" its answer, over {rate / 1e9:.1f} GB/s (fastest read of {report['bandwidth']['size_bytes'] / 1e9:.1f} GB in this run)"
    ]
    small = [n for n, about in report["servers"].items() if cache and 0 < (about["weight_bytes"] or 0) < cache]
    if small:
        lines.append(f"the weights of {', '.join(small)} fit into the last-level cache: that bound may be beaten there")
    return lines


def _client_lines(measured: Sequence[Measured]) -> list[str]:
    shares = [m.client_cpu_s / m.wall_s for m in measured]
    if not shares:
        return []
    line = f"the client took at most {max(shares):.3f} of a core"
    if max(shares) > _CLIENT_SHARE:
        line = f"**{line}**, more than {_CLIENT_SHARE}: it slows what it measures"
    together = [m for m in measured if m.answers]
    events = load_figures([m.answers for m in together]).tokens_per_event
    if events is not None and events > 1.02:
        per = {
            s: load_figures([m.answers for m in together if m.server == s]).tokens_per_event
            for s in servers_of(measured)
        }
        line += "; tokens per event: " + ", ".join(f"{name} {value:.2f}" for name, value in per.items() if value)
    return [line]


def _noise(report: Mapping[str, Any], measured: Sequence[Measured]) -> float | None:
    noises = [m.other_cores for m in measured] + list(report["other_cores"])
    known = [noise for noise in noises if noise is not None]
    return max(known) if known and len(known) == len(noises) else None


def _prompt_kind(settings: Mapping[str, Any]) -> str:
    return "conversations of one text" if settings["chat"] else "random token ids, text where a server takes no ids"


def _ratio(ours: LoadFigures | None, this: LoadFigures) -> str:
    if ours is None or ours.output_per_s is None or this.output_per_s is None:
        return "-"
    return f"{ours.output_per_s.median / this.output_per_s.median:.2f}"


def _spread(s: Spread | None) -> str:
    return "-" if s is None else spread_text(s)


def _percentiles(p: Percentiles | None, scale: float = 1.0) -> str:
    return "-" if p is None else " / ".join(number(scale * value) for value in (p.p50, p.p90, p.p99))


def _errors(errors: Mapping[str, int], requests: int) -> str:
    return ", ".join(f"{kind}: {count}" for kind, count in errors.items()) + f" of {requests}" if errors else "none"
