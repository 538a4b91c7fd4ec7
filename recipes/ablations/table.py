"""Figures of several arms and seeds as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from recipes.ablations.measure import Figures

_OF_ROUTERS: Mapping[str, Callable[[Figures], float | None]] = {
    "load violation": lambda figures: figures.load_violation,
    "cosine of router rows": lambda figures: figures.router_cosine,
    "MTP loss": lambda figures: figures.mtp_loss,
    "MTP agreement": lambda figures: figures.mtp_agreement,
}


def table(arms: Mapping[str, Sequence[Figures]]) -> str:
    """A row per arm: mean and standard deviation over the seeds.

    Behind each held-out loss stands its difference to the first arm, taken seed by seed: mean and standard error. Arms have the
    same seeds in the same order.
    """
    first = next(iter(arms.values()))
    names = list(first[0].losses)
    columns = [text for name in names for text in (f"loss, {name}", "difference")]
    lines = [["", *columns, *_OF_ROUTERS, "seconds"]]
    for arm, found in arms.items():
        cells = []
        for name in names:
            values, base = [f.losses[name] for f in found], [f.losses[name] for f in first]
            cells += [_spread(values), _difference(values, base) if found is not first else "-"]
        cells += [_spread([pick(f) for f in found]) for pick in _OF_ROUTERS.values()]
        lines.append([arm, *cells, f"{statistics.fmean(f.seconds for f in found):.0f}"])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.3f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.3f}"


def _difference(values: Sequence[float], base: Sequence[float]) -> str:
    found = [value - other for value, other in zip(values, base, strict=True)]
    mean = f"{statistics.fmean(found):+.4f}"
    return mean if len(found) == 1 else f"{mean} ± {statistics.stdev(found) / math.sqrt(len(found)):.4f}"
