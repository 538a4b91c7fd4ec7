"""`ernie show`."""

from __future__ import annotations

import argparse

from ernie45.cli.output import human_bytes, human_count, print_facts, print_json
from ernie45.config.presets import preset, presets
from ernie45.errors import NotFoundError
from ernie45.store.describe import ModelDescription, describe, describe_config
from ernie45.store.location import installed, resolve


def run(options: argparse.Namespace) -> int:
    """Describe a model that is here, or a published one."""
    described = _describe(options.model)
    if options.json:
        print_json(described)
        return 0
    facts = [
        ("model", described.name),
        ("kind", described.kind),
        ("parameters", f"{described.parameters:,} ({human_count(described.parameters)})"),
        (
            "active per token",
            f"{described.active_parameters:,} ({human_count(described.active_parameters)}, head included)",
        ),
        ("MTP block", f"{described.mtp_parameters:,}" if described.mtp_parameters else "none"),
        ("layers", str(described.layers)),
        ("experts", described.experts),
        ("context", f"{described.context_tokens:,} tokens"),
        ("cache per token", f"{described.kv_bytes_per_token:,} bytes at 16 bits"),
        ("memory needed", f"{human_bytes(described.memory_bytes)} (weights and 4096 tokens of cache)"),
        ("licence", described.licence),
    ]
    if described.path is not None:
        facts += [
            ("format", f"{described.format}, {described.dtype}"),
            ("size", human_bytes(described.size_bytes or 0)),
            ("path", described.path),
        ]
    else:
        facts.append(("here", "no; figures are for 16-bit weights"))
    print_facts(facts)
    return 0


def _describe(model: str) -> ModelDescription:
    try:
        path = resolve(model)
    except NotFoundError as missing:
        try:
            config = preset(model)
        except NotFoundError:
            raise missing from None
        return describe_config(next(name for name in presets() if _short(name) == _short(model)), config)
    name = next((name for name, folder in installed().items() if folder == path), path.name)
    return describe(name, path)


def _short(name: str) -> str:
    lowered = name.lower().removeprefix("baidu/").removeprefix("ernie-4.5-")
    return lowered.removesuffix("-pt").removesuffix("-paddle")
