"""`ernie convert`."""

from __future__ import annotations

import argparse
import os

from ernie45.checkpoint.write import DEFAULT_SHARD_BYTES
from ernie45.cli.output import ProgressBar, note, print_json
from ernie45.errors import CheckpointError, UsageError
from ernie45.store.convert import convert
from ernie45.store.location import resolve


def run(options: argparse.Namespace) -> int:
    """Convert and say what could not be taken along."""
    if options.to == "gguf" and options.max_shard_size is not None:
        raise UsageError("--max-shard-size means nothing for gguf, which is one file: leave it out")
    if os.path.lexists(options.dst) and not options.force:
        raise CheckpointError(f"{options.dst} exists already: choose another name, or replace it with --force")
    with ProgressBar() as bar:
        done = convert(
            resolve(options.src),
            options.dst,
            options.to,
            dtype=options.dtype,
            max_shard_bytes=options.max_shard_size or DEFAULT_SHARD_BYTES,
            overwrite=options.force,
            progress=bar.stage("writing"),
        )
    for line in done.notes:
        note(f"left out: {line}")
    if options.json:
        print_json(done)
    else:
        print(f"{done.from_format} -> {done.to_format}: {done.target}")
    return 0
