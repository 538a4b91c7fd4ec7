"""`ernie doctor`: what is installed, what the machine offers, what to fix.

Exit code 1 only if nothing can run as it is: a required package is missing, the store cannot be written, or a variable asks
for kernels that there are not. Advice (no
compiled kernels, no default model, a nearly full disk) leaves it at 0.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ernie45 import __version__
from ernie45.cli.output import human_bytes, print_facts, print_json
from ernie45.errors import ConfigError
from ernie45.kernels import choice
from ernie45.kernels.native import status
from ernie45.store.location import DEFAULT_MODEL, home, installed

_REQUIRED = ("torch", "numpy", "tokenizers", "sentencepiece", "jinja2", "huggingface_hub")
_OPTIONAL = ("transformers",)
_ROOM_BYTES = 2 << 30


def run(options: argparse.Namespace) -> int:
    """Show the state of the installation and of the machine."""
    packages = {name: _version(name) for name in (*_REQUIRED, *_OPTIONAL)}
    torch_facts = _torch()
    memory, available = _memory()
    store = home()
    existing = next(folder for folder in (store, *store.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    native, in_use = status(), _kernels_in_use()
    broken = _broken(packages, torch_facts, store, existing)
    if in_use["error"]:
        broken.append(in_use["error"])
    data = {
        "ernie45": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "cpu": {"features": list(native.features), "logical_cores": os.cpu_count(), **native.cpu},
        "torch": torch_facts,
        "kernels": {"native": native.available, "reason": native.reason, "in_use": in_use},
        "memory_bytes": memory,
        "memory_available_bytes": available,
        "store": str(store),
        "disk_free_bytes": free,
        "models": list(installed()),
        "ok": not broken,
        "to_fix": broken + _advice(free, store),
    }
    if options.json:
        print_json(data)
    else:
        print_facts(_facts(data))
    return 1 if broken else 0


def _facts(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    packages = [
        f"{name} {version or ('missing' if name in _REQUIRED else 'not installed (optional)')}"
        for name, version in data["packages"].items()
    ]
    torch_facts, kernels = data["torch"], data["kernels"]
    facts = [
        ("ernie45", f"{data['ernie45']} on Python {data['python']}, {sys.platform}"),
        ("packages", ", ".join(packages)),
        ("CPU", f"{data['cpu']['logical_cores']} logical cores, torch uses {torch_facts['threads']} threads"),
        ("CPU features", " ".join(data["cpu"]["features"]) or "unknown without the native module"),
        ("kernels", f"native module {'found' if kernels['native'] else 'not found'}: {kernels['reason']}"),
        ("in use", kernels["in_use"]["line"]),
        *_instruction_sets(kernels["in_use"]),
        ("CUDA", "available" if torch_facts["cuda"] else "not available"),
        ("memory", f"{human_bytes(data['memory_available_bytes'])} available of {human_bytes(data['memory_bytes'])}"),
        ("disk", f"{human_bytes(data['disk_free_bytes'])} free in {data['store']}"),
        ("models here", ", ".join(data["models"]) or "none"),
    ]
    fixes = data["to_fix"] or ["nothing"]
    return facts + [("to fix" if i == 0 else "", line) for i, line in enumerate(fixes)]


def _instruction_sets(in_use: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not in_use["compiled"]:
        return []
    lacking = [isa for isa in in_use["compiled"] if isa not in in_use["supported"]]
    runs = f"this CPU lacks {', '.join(lacking)}" if lacking else "this CPU runs them all"
    return [("instruction sets", f"compiled for {', '.join(in_use['compiled'])}; {runs}")]


def _kernels_in_use() -> dict[str, Any]:
    """`choice.KernelsInUse` with the line that tells it, or the error that keeps kernels from running."""
    try:
        return {**asdict(choice.in_use()), "line": choice.describe(), "error": None}
    except ConfigError as error:
        return {"compiled": (), "supported": (), "line": f"none: {error}", "error": str(error)}


def _broken(
    packages: Mapping[str, str | None], torch_facts: Mapping[str, Any], store: Path, existing: Path
) -> list[str]:
    """What keeps everything from running, each with its remedy."""
    out = [f"{name} is missing: pip install {name}" for name in _REQUIRED if packages[name] is None]
    if packages["torch"] and torch_facts["error"]:
        out.append(f"torch cannot be imported ({torch_facts['error']}): reinstall it")
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        out.append(f"{existing} cannot be written: set ERNIE45_HOME to a folder of your own (now {store})")
    return out


def _advice(free: int, store: Path) -> list[str]:
    """What would be better otherwise."""
    out = []
    native = status()
    if not native.available:
        out.append(f"no native kernels: {native.remedy}")
    if DEFAULT_MODEL not in installed():
        out.append(f"the default model is not here: ernie pull {DEFAULT_MODEL}")
    if free < _ROOM_BYTES:
        out.append(f"only {human_bytes(free)} free in {store}: make room, or set ERNIE45_HOME to a larger disk")
    if (policy := os.environ.get("OMP_WAIT_POLICY", "passive")).lower() != "passive":
        out.append(f"OMP_WAIT_POLICY is {policy}: waiting threads burn cores that others need; unset it")
    return out


def _torch() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of it cannot be loaded
        return {"threads": 0, "cuda": False, "error": str(error)}
    return {"threads": torch.get_num_threads(), "cuda": torch.cuda.is_available(), "error": None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> tuple[int, int]:
    """Physical and available memory in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return values["MemTotal"], values["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
