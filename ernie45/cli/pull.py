"""`ernie pull`."""

from __future__ import annotations

import argparse

from ernie45.cli.output import ProgressBar, note, print_json
from ernie45.store.pull import pull


def run(options: argparse.Namespace) -> int:
    """Fetch, check, convert; print where the model is."""
    note(f"pulling {options.what}")
    with ProgressBar() as bar:
        pulled = pull(options.what, force=options.force, progress=bar.stage)
    if options.json:
        print_json({"name": pulled.name, "path": str(pulled.path), "fresh": pulled.fresh})
        return 0
    print(f"{pulled.name} is {'ready' if pulled.fresh else 'here already'}: {pulled.path}")
    if pulled.fresh:
        note(f"`ernie chat {pulled.name}` talks to it")
    return 0
