"""`ernie pull`."""

from __future__ import annotations

import argparse

from ernie45.cli.output import ProgressBar, note, print_json
from ernie45.store.pull import pull


def run(options: argparse.Namespace) -> int:
    """Fetch, check, convert; print where the model is."""
    note(f"pulling {options.what}")
    pulled = pull(options.what, force=options.force, progress=ProgressBar("converting"))
    if options.json:
        print_json({"name": pulled.name, "path": str(pulled.path), "fresh": pulled.fresh})
    else:
        print(f"{pulled.name} is {'ready' if pulled.fresh else 'here already'}: {pulled.path}")
    return 0
