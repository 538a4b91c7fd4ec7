"""`ernie show`."""

from __future__ import annotations

import argparse

from ernie45.cli.output import human_bytes, human_count, print_facts, print_json
from ernie45.config.presets import preset
from ernie45.errors import NotFoundError
from ernie45.store.describe import ModelDescription, describe, describe_config
from ernie45.store.location import installed, published_id, resolve


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
        (
            "memory needed",
            f"{human_bytes(described.memory_bytes)} (weights and {described.memory_tokens} tokens of cache)",
        ),
        ("licence", described.licence),
    ]
    if described.path is not None:
        facts += [
            ("format", f"{described.format}, {described.dtype}"),
            ("size", human_bytes(described.size_bytes or 0)),
            ("path", described.path),
        ]
    else:
        facts.append(
            ("here", f"no; figures are for 16-bit weights; `ernie pull {published_id(described.name)}` fetches it")
        )
    print_facts(facts)
    return 0


def _describe(model: str) -> ModelDescription:
    try:
        path = resolve(model)
    except NotFoundError:
        hub_id = published_id(model)
        if hub_id is None:
            raise
        return describe_config(hub_id.removeprefix("baidu/").removesuffix("-PT"), preset(model))
    name = next((name for name, folder in installed().items() if folder == path), path.name)
    return describe(name, path)
