"""`ernie up`: a model, the server and the chat page with one command."""

from __future__ import annotations

import argparse

from ernie45.cli import serve
from ernie45.cli.output import note
from ernie45.errors import NotFoundError
from ernie45.store.location import DEFAULT_MODEL, resolve


def run(options: argparse.Namespace) -> int:
    """Fetch the default model if it is asked for and missing, then serve."""
    if options.model is None or options.model.lower() == DEFAULT_MODEL:
        try:
            resolve(DEFAULT_MODEL)
        except NotFoundError:
            note(f"fetching {DEFAULT_MODEL}")
            serve.run_verb("pull", DEFAULT_MODEL)
    return serve.run(options)
