"""`ernie models`."""

from __future__ import annotations

import argparse

from ernie45.cli.output import human_bytes, human_count, note, print_json, print_table
from ernie45.config.presets import presets
from ernie45.errors import Ernie45Error
from ernie45.store.describe import ModelDescription, describe, describe_config
from ernie45.store.location import DEFAULT_MODEL, home, installed, lost_links


def run(options: argparse.Namespace) -> int:
    """List what is in the store, and on request what is published."""
    described = []
    for name, path in installed().items():
        try:
            described.append(describe(name, path))
        except Ernie45Error as error:
            note(f"warning: {name} cannot be used: {error}")
    for name, target in lost_links().items():
        note(f"warning: {name} cannot be used: its folder {target} has gone; remove {home() / 'models' / name}")
    if options.all:
        described += [describe_config(name, config) for name, config in presets().items()]
    if options.json:
        print_json(described)
    elif described:
        print_table(
            ("MODEL", "KIND", "PARAMETERS", "ACTIVE", "CONTEXT", "FORMAT", "SIZE"), [_row(d) for d in described]
        )
    else:
        note(f"no models in {home() / 'models'}: `ernie pull {DEFAULT_MODEL}` fetches the default one")
    return 0


def _row(model: ModelDescription) -> tuple[str, ...]:
    return (
        model.name,
        model.kind,
        human_count(model.parameters),
        human_count(model.active_parameters),
        str(model.context_tokens),
        f"{model.format} {model.dtype}" if model.format else "not here",
        human_bytes(model.size_bytes) if model.size_bytes else "-",
    )
