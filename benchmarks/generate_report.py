"""The report of `generate.py`: rows from single measurements, as Markdown, as data and as bars.

A ratio is ours over the peer's where more is better, and the peer's over ours where less is: above 1 we are ahead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.common import Spread, markdown_table, noise_line, number, origin_lines, spread, spread_text

PEER = "transformers"
BATCH = 8
BYTES_PER_WEIGHT = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One kind of figure."""

    label: str
    unit: Literal["s", "MB", "tok/s"]
    more_is_better: bool
    decode_batch: int = 0
    """Sequences that share one pass over the weights; 0 where the memory bound of decoding does not apply."""


METRICS: Mapping[str, Metric] = {
    "load_s": Metric(label="load", unit="s", more_is_better=False),
    "peak_1_bytes": Metric(label="peak memory, batch 1", unit="MB", more_is_better=False),
    "peak_8_bytes": Metric(label=f"peak memory, batch {BATCH}", unit="MB", more_is_better=False),
    "first_token_s": Metric(label="first token", unit="s", more_is_better=False),
    "start_s": Metric(label="load and first token", unit="s", more_is_better=False),
    "prefill_1": Metric(label="prefill, batch 1", unit="tok/s", more_is_better=True),
    "prefill_8": Metric(label=f"prefill, batch {BATCH}", unit="tok/s", more_is_better=True),
    "decode_1": Metric(label="decode, batch 1", unit="tok/s", more_is_better=True, decode_batch=1),
    "decode_8": Metric(label=f"decode, batch {BATCH}", unit="tok/s", more_is_better=True, decode_batch=BATCH),
}


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network that is measured, and where its weights come from."""

    name: str
    weights: Literal["real", "seeded random"]
    active_parameters: int
    """Weights that one decoded token reads."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    case: str
    weights: str
    metric: str
    unit: str
    ours: Spread
    peer: Spread
    ratio: float
    bound: float | None
    """Most tokens/s that the memory bandwidth allows; None where that bound does not apply."""
    ours_share: float | None
    peer_share: float | None


def rows_of(
    network: Network,
    dtype: str,
    ours: Sequence[Mapping[str, float]],
    peer: Sequence[Mapping[str, float]],
    bytes_per_s: float,
) -> list[Row]:
    """The lines of one case. Args: ours, peer: the figures of each repeat. bytes_per_s: memory bandwidth."""
    rows = []
    for key, metric in METRICS.items():
        scale = 1e-6 if metric.unit == "MB" else 1.0
        mine, other = (spread([scale * figures[key] for figures in runs]) for runs in (ours, peer))
        bound = None
        if metric.decode_batch:
            bound = metric.decode_batch * bytes_per_s / (network.active_parameters * BYTES_PER_WEIGHT[dtype])
        rows.append(
            Row(
                case=f"{network.name}/{dtype}",
                weights=network.weights,
                metric=metric.label,
                unit=metric.unit,
                ours=mine,
                peer=other,
                ratio=mine.median / other.median if metric.more_is_better else other.median / mine.median,
                bound=bound,
                ours_share=None if bound is None else mine.median / bound,
                peer_share=None if bound is None else other.median / bound,
            )
        )
    return rows


def to_markdown(report: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The whole report as text; `report` is what `generate.py` collects, see its `run`."""
    header = ["case", "weights", "figure", "unit", "ernie45", PEER, "ratio", "bound", "share of bound (peer)"]
    table = markdown_table(header, [_cells(row) for row in rows], num_words=4)
    return "\n".join(["## Generation", "", table, "", *(f"- {line}" for line in _facts(report))])


def to_data(report: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The whole report for JSON."""
    return {**report, "rows": [asdict(row) for row in rows]}


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Decode speed as bars, medians with their spread, under the memory bound as a line; one panel per batch size."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = {label: [row for row in rows if row.metric == label] for label in _decode_labels()}
    width = max(len(panel) for panel in panels.values())
    size = (2 + 2.6 * width, 5)
    figure, all_axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axes, (label, panel) in zip(all_axes[0], panels.items(), strict=True):
        _draw_panel(axes, panel)
        axes.set_title(label, fontsize=10)
    all_axes[0][0].set_ylabel("tokens/s, median and spread")
    figure.legend(*all_axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _decode_labels() -> list[str]:
    return [metric.label for metric in METRICS.values() if metric.decode_batch]


def _draw_panel(axes: Any, panel: Sequence[Row]) -> None:
    places = range(len(panel))
    for offset, name, spreads in (
        (-0.2, "ernie45", [row.ours for row in panel]),
        (0.2, PEER, [row.peer for row in panel]),
    ):
        errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        axes.bar([i + offset for i in places], [s.median for s in spreads], 0.4, yerr=errors, capsize=3, label=name)
    left, right = [i - 0.45 for i in places], [i + 0.45 for i in places]
    bounds = [row.bound for row in panel]
    axes.hlines(bounds, left, right, colors="black", linestyles="dashed", label="memory bound")
    labels = ["\n".join([*row.case.split("/"), f"({row.weights})"]) for row in panel]
    axes.set_xticks(places, labels, fontsize=8)


def _cells(row: Row) -> list[str]:
    bound = share = "-"
    if row.bound is not None and row.ours_share is not None and row.peer_share is not None:
        bound, share = number(row.bound), f"{row.ours_share:.0%} ({row.peer_share:.0%})"
    values = [spread_text(row.ours), spread_text(row.peer), f"{row.ratio:.2f}", bound, share]
    return [row.case, row.weights, row.metric, row.unit, *values]


def _facts(report: Mapping[str, Any]) -> list[str]:
    settings, bandwidth = report["settings"], report["bandwidth"]
    facts = [
        f"median (smallest-largest) of {settings['repeats']} fresh processes per package, in turns; ratio above 1:"
        f" ernie45 is ahead; bound: bytes of all weights that a token reads over {bandwidth['bytes_per_s'] / 1e9:.1f}"
        f" GB/s (fastest read of {bandwidth['size_bytes'] / 1e9:.1f} GB in this run)",
        f"prompt {settings['prompt_tokens']} tokens, {settings['decode_steps']} decode steps, greedy, end tokens"
        f" ignored; {settings['threads']} threads, OMP_WAIT_POLICY={settings['omp_wait_policy']}; peak memory by"
        f" {settings['memory_method']}",
        *origin_lines(report),
        "same greedy tokens as the peer before the first difference: "
        + ", ".join(f"{case} {same['equal']} of {same['of']}" for case, same in report["same_tokens"].items()),
    ]
    return facts + _warnings(report)


def _warnings(report: Mapping[str, Any]) -> list[str]:
    warnings, cache = [noise_line(report["other_cores_max"])], report["machine"]["last_level_cache_bytes"]
    if report["settings"]["quick"]:
        warnings.append("**not to be published**: --quick measures tiny networks, to test this program")
    cached = [case for case, size in report["weight_bytes"].items() if cache is not None and size < cache]
    if cached:
        warnings.append(
            f"the weights of {', '.join(cached)} fit into the last-level cache: the memory bound may be beaten there"
        )
    return warnings
