"""`ernie verify`."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from importlib.util import find_spec

from ernie45.checkpoint.verify import verify
from ernie45.cli.output import ProgressBar, print_facts, print_json
from ernie45.store.location import resolve


def run(options: argparse.Namespace) -> int:
    """Report on every tensor; exit code 1 if the checkpoint cannot be trusted."""
    if options.against == "transformers" and find_spec("transformers"):
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # ours is shown, and stays silent where there is no terminal
    with ProgressBar() as bar:
        report = verify(resolve(options.model), against=options.against, progress=bar.stage("reading"))
    if options.json:
        difference = report.max_logit_difference
        finite = difference if difference is not None and math.isfinite(difference) else None  # JSON has no NaN
        print_json(asdict(report) | {"max_logit_difference": finite, "ok": report.ok})
        return 0 if report.ok else 1
    facts = [
        ("checkpoint", f"{report.path} ({report.format})"),
        ("tensors", f"{report.tensors} read, {report.values:,} values, none missing, none unexpected"),
        ("not finite", ", ".join(report.not_finite) or "none"),
        ("all zero", ", ".join(report.all_zero) or "none"),
    ]
    facts += [("left out", f"{name}: {reason}") for name, reason in report.left_out.items()]
    if report.against is not None:
        differs = f"largest logit difference {report.max_logit_difference:.2e}"
        facts.append((f"against {report.against}", f"{differs}, same best token at {report.same_best_token:.0%}"))
    facts.append(("verdict", "ok" if report.ok else "NOT ok"))
    print_facts(facts)
    return 0 if report.ok else 1
