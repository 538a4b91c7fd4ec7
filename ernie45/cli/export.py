"""`ernie export`."""

from __future__ import annotations

import argparse

from ernie45.cli.output import ProgressBar, note, print_json
from ernie45.store.export import export


def run(options: argparse.Namespace) -> int:
    """Export, and say how the copy compares and what could not be taken along."""
    with ProgressBar() as bar:
        done = export(
            options.what,
            options.dst,
            options.to,
            merge=options.merge,
            adapter=options.adapter,
            average=options.average,
            dtype=options.dtype,
            overwrite=options.force,
            progress=bar.stage,
        )
    for line in done.notes:
        note(f"left out: {line}")
    if options.json:
        print_json(done)
        return 0
    what = f"{done.source}{f' + {done.adapter}' if done.adapter else ''}{', averaged' if done.average else ''}"
    print(f"{what} -> {done.to_format} ({done.dtype}): {done.target}")
    print(
        f"loaded back: largest logit difference {done.max_logit_difference:.3g} (allowed {done.tolerance:.3g}), "
        f"same best token at {done.same_best_token:.1%}"
    )
    return 0
