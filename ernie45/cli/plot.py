"""`ernie plot`."""

from __future__ import annotations

import argparse

from ernie45.cli.output import note, print_json
from ernie45.errors import UsageError
from ernie45.training.plot_style import check
from ernie45.training.report import write_report
from ernie45.training.run_log import read_runs


def run(options: argparse.Namespace) -> int:
    """Read the runs, draw them, say where the files are."""
    if len(options.runs) > 1 and options.output is None:
        raise UsageError("several runs have no folder in common: say where the report goes with -o DIR")
    check()
    runs = read_runs(options.runs)
    for read in runs:
        for line in read.notes:
            note(f"{read.name}: {line}")
    files = write_report(runs, options.output or runs[0].folder / "plots")
    if options.json:
        print_json({"report": str(files[0]), "files": [str(file) for file in files]})
    else:
        print(f"report: {files[0]} ({len(files) - 1} more files beside it)")
    return 0
