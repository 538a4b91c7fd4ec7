"""`ernie convert`."""

from __future__ import annotations

import argparse

from ernie45.cli.output import ProgressBar, note, print_json
from ernie45.store.convert import convert
from ernie45.store.location import resolve


def run(options: argparse.Namespace) -> int:
    """Convert and say what could not be taken along."""
    done = convert(
        resolve(options.src),
        options.dst,
        options.to,
        dtype=options.dtype,
        max_shard_bytes=options.max_shard_size,
        overwrite=options.force,
        progress=ProgressBar("writing"),
    )
    for line in done.notes:
        note(f"left out: {line}")
    if options.json:
        print_json(done)
    else:
        print(f"{done.from_format} -> {done.to_format}: {done.target}")
    return 0
