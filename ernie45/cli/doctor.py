"""`ernie doctor`."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path

from ernie45 import __version__
from ernie45.cli.output import human_bytes, print_facts, print_json
from ernie45.kernels.native import status
from ernie45.store.location import DEFAULT_MODEL, home, installed

_PACKAGES = ("torch", "numpy", "tokenizers", "sentencepiece", "jinja2", "huggingface_hub", "transformers")
_ROOM_BYTES = 2 << 30


def run(options: argparse.Namespace) -> int:
    """Show the state of the installation and of the machine; exit code 1 if something must be fixed."""
    import torch

    native = status()
    memory, available = _memory()
    store = home()
    disk = shutil.disk_usage(next(folder for folder in (store, *store.parents) if folder.exists()))
    fixes = []
    if not native.available:
        fixes.append(f"native kernels: {native.reason}. {native.remedy or ''}".strip())
    if DEFAULT_MODEL not in installed():
        fixes.append(f"the default model is not here: ernie pull {DEFAULT_MODEL}")
    if disk.free < _ROOM_BYTES:
        fixes.append(f"only {human_bytes(disk.free)} free in {store}: set ERNIE45_HOME to a larger disk")
    if os.environ.get("OMP_WAIT_POLICY", "passive").lower() != "passive":
        fixes.append("OMP_WAIT_POLICY is not passive: waiting threads burn the cores that others need")
    data = {
        "ernie45": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": {
            "features": list(native.features),
            "logical_cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "cuda": torch.cuda.is_available(),
        "kernels": {"native": native.available, "reason": native.reason},
        "memory_bytes": memory,
        "memory_available_bytes": available,
        "store": str(store),
        "disk_free_bytes": disk.free,
        "models": list(installed()),
        "to_fix": fixes,
    }
    if options.json:
        print_json(data)
        return 0
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in data["packages"].items())  # type: ignore[attr-defined]
    print_facts(
        [
            ("ernie45", f"{__version__} on Python {platform.python_version()}, {sys.platform}"),
            ("packages", packages),
            ("CPU", f"{os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads"),
            ("CPU features", " ".join(native.features) or "unknown without the native module"),
            ("kernels", f"native module {'found' if native.available else 'not found'}: {native.reason}"),
            ("CUDA", "available" if torch.cuda.is_available() else "not available"),
            ("memory", f"{human_bytes(available)} available of {human_bytes(memory)}"),
            ("disk", f"{human_bytes(disk.free)} free in {store}"),
            ("models here", ", ".join(installed()) or "none"),
            ("to fix", "; ".join(fixes) or "nothing"),
        ]
    )
    return 0


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
