"""`ernie`, with settings that its command line has no options for, because nobody but a test wants them small.

python tests/server/tuned_server.py '{"limits": {"header_timeout_s": 1}, "stall_s": 2}' serve MODEL ...
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ernie45.cli.serve as verb
import ernie45.server.run as running
from ernie45.cli.main import main
from ernie45.engine.client import EngineClient
from ernie45.server.config import ServerConfig


def tuned(settings: dict[str, Any]) -> None:
    """Change what the command line starts: fields of `Limits` and of `ServerConfig`, and the engine's watchdog."""
    limits, stall_s = settings.pop("limits", {}), settings.pop("stall_s", None)
    original = verb.server_config

    def server_config(options: argparse.Namespace, model: Path, keys: list[str]) -> ServerConfig:
        config = original(options, model, keys)
        return replace(config, limits=replace(config.limits, **limits), **settings)

    verb.server_config = server_config
    if stall_s is not None:
        setattr(running, "EngineClient", functools.partial(EngineClient, stall_s=stall_s))  # noqa: B010  # no other way to reach it


if __name__ == "__main__":
    tuned(json.loads(sys.argv.pop(1)))
    sys.exit(main())
