"""Which kernels run: the native ones, or the references in plain PyTorch. One place, chosen once, visible.

Environment, read here and nowhere else: `ERNIE_KERNELS` (native or reference), `ERNIE_ISA` (baseline, avx2, avx512),
`ERNIE_THREADS` (a number). Without them the native module is used where it is there, on the best instruction set and all
cores.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Literal

from ernie45.errors import ConfigError
from ernie45.kernels.native import status

Kernels = Literal["native", "reference"]

_in_use: ModuleType | None = None
_decided = False


def native() -> ModuleType | None:
    """The native module if kernels are to run on it, else None. Decided at the first call."""
    global _decided  # noqa: PLW0603  # the one process-wide choice; tests and `--kernels` change it through the functions below
    if not _decided:
        _decided = True
        _decide()
    return _in_use


def use_kernels(kernels: Kernels) -> None:
    """Use the native kernels or the references from now on.

    Raises: ConfigError if the native module cannot be used, with the reason and what to do.
    """
    global _in_use, _decided  # noqa: PLW0603
    if kernels not in ("native", "reference"):
        raise ConfigError(f"kernels is {kernels!r}, expected 'native' or 'reference'")
    found = status()
    if kernels == "native" and not found.available:
        raise ConfigError(f"native kernels were asked for: {found.reason}. {found.remedy}")
    _in_use = importlib.import_module("ernie45.kernels._native") if kernels == "native" else None
    _decided = True


@contextmanager
def kernels(choice: Kernels) -> Iterator[None]:
    """Use some kernels within a block, as tests do."""
    before = native()
    use_kernels(choice)
    try:
        yield
    finally:
        use_kernels("reference" if before is None else "native")


def describe() -> str:
    """One line for `ernie doctor`: what runs and why."""
    extension = native()
    if extension is None:
        asked = os.environ.get("ERNIE_KERNELS") == "reference"
        return "reference kernels in PyTorch: " + ("ERNIE_KERNELS=reference" if asked else status().reason)
    forced = os.environ.get("ERNIE_ISA")
    why = f"forced by ERNIE_ISA={forced}" if forced else f"the best of this CPU is {extension.best_isa()}"
    return f"native kernels on {extension.isa()} ({why}), {extension.num_threads()} threads"


def _decide() -> None:
    wanted = os.environ.get("ERNIE_KERNELS")
    if wanted is None:
        wanted = "native" if status().available else "reference"
    use_kernels(wanted)  # type: ignore[arg-type]  # checked there
    if _in_use is None:
        return
    isa, threads = os.environ.get("ERNIE_ISA"), os.environ.get("ERNIE_THREADS")
    try:
        if isa is not None:
            _in_use.set_isa(isa)
        if threads is not None:
            _in_use.set_num_threads(int(threads))
    except ValueError as error:
        raise ConfigError(f"ERNIE_ISA={isa} ERNIE_THREADS={threads}: {error}") from error
