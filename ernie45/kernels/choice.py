"""Which kernels run: the native ones, or the references in plain PyTorch. One place, chosen once, visible.

Environment, read here and nowhere else: `ERNIE_KERNELS` (native or reference), `ERNIE_ISA` (baseline, avx2, avx512, amx),
`ERNIE_THREADS` (a number). Without them the native module is used where it is there, on the best instruction set and all
cores.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from ernie45.errors import ConfigError
from ernie45.kernels.native import status

Kernels = Literal["native", "reference"]

_EXTENSION = "ernie45.kernels._native"
_VARIABLES = ("ERNIE_KERNELS", "ERNIE_ISA", "ERNIE_THREADS")


@dataclass(frozen=True, kw_only=True)
class KernelsInUse:
    """What runs and why, for `ernie doctor`."""

    kernels: Kernels
    why: str
    isa: str | None
    """Instruction set of the native kernels; None for the references, like everything else that is about them."""
    isa_why: str | None
    compiled: tuple[str, ...]
    """Instruction sets that the native module holds, worst first; empty without the module."""
    supported: tuple[str, ...]
    """Those of them that this CPU runs."""
    threads: int | None
    threads_why: str | None
    environment: dict[str, str]
    """The variables above that are set."""


_in_use: ModuleType | None = None
_why: str | None = None  # None: nothing is decided yet
_prepared = False  # the native module stands as the environment wants it


def native() -> ModuleType | None:
    """The native module if kernels are to run on it, else None. Decided at the first call.

    Raises: ConfigError for a variable that cannot be followed.
    """
    if _why is None:
        wanted = os.environ.get("ERNIE_KERNELS")
        if wanted is not None:
            use_kernels(wanted, why=f"ERNIE_KERNELS={wanted}")  # type: ignore[arg-type]  # checked there
        else:
            use_kernels("native" if status().available else "reference", why=status().reason)
    return _in_use


def use_kernels(kernels: Kernels, *, why: str = "asked for") -> None:
    """Use the native kernels or the references from now on; instruction set and threads are those of the environment.

    Args: why: what `describe` will give as the reason. Raises: ConfigError if the native module cannot be used, with the
        reason and what to do.
    """
    global _in_use, _why  # noqa: PLW0603  # the one process-wide choice; tests and `--kernels` change it through these functions
    if kernels not in ("native", "reference"):
        raise ConfigError(f"kernels is {kernels!r}, expected 'native' or 'reference'")
    found = status()
    if kernels == "native" and not found.available:
        raise ConfigError(f"native kernels were asked for: {found.reason}. {found.remedy}")
    _in_use = _prepare() if kernels == "native" else None
    _why = why


@contextmanager
def kernels(choice: Kernels | None, *, why: str = "asked for") -> Iterator[None]:
    """Use some kernels within a block, as tests and `--kernels` do; None leaves the choice as it is."""
    global _in_use, _why
    before = _in_use, _why
    if choice is not None:
        use_kernels(choice, why=why)
    try:
        yield
    finally:
        if choice is not None:
            _in_use, _why = before


def in_use() -> KernelsInUse:
    """What runs and why. Raises: ConfigError as `native` does."""
    extension = native()
    assert _why is not None, "native() decides"
    compiled: tuple[str, ...] = ()
    supported: tuple[str, ...] = ()
    if status().available:
        module = importlib.import_module(_EXTENSION)
        compiled = tuple(module.compiled_isas())
        supported = compiled[: compiled.index(module.best_isa()) + 1]
    return KernelsInUse(
        kernels="reference" if extension is None else "native",
        why=_why,
        isa=None if extension is None else extension.isa(),
        isa_why=None if extension is None else _isa_why(extension.isa(), supported[-1]),
        compiled=compiled,
        supported=supported,
        threads=None if extension is None else extension.num_threads(),
        threads_why=None if extension is None else _threads_why(extension.num_threads()),
        environment={name: os.environ[name] for name in _VARIABLES if name in os.environ},
    )


def describe() -> str:
    """What runs and why, in one line."""
    found = in_use()
    if found.kernels == "reference":
        unused = [f"{name}={value}" for name, value in found.environment.items() if name != "ERNIE_KERNELS"]
        ending = f"; without effect on them: {', '.join(unused)}" if unused else ""
        return f"reference kernels in PyTorch: {found.why}{ending}"
    return f"native kernels on {found.isa} ({found.isa_why}), {found.threads} threads ({found.threads_why})"


def _isa_why(isa: str, best: str) -> str:
    if isa == os.environ.get("ERNIE_ISA"):
        return f"forced by ERNIE_ISA={isa}"
    return f"the best of this CPU is {best}" if isa == best else "set by the program"


def _threads_why(threads: int) -> str:
    if str(threads) == os.environ.get("ERNIE_THREADS"):
        return f"forced by ERNIE_THREADS={threads}"
    return "one per core" if threads == os.cpu_count() else "set by the program"


def _prepare() -> ModuleType:
    """The native module, set once as the environment wants it."""
    global _prepared  # noqa: PLW0603
    extension = importlib.import_module(_EXTENSION)
    isa, threads = os.environ.get("ERNIE_ISA"), os.environ.get("ERNIE_THREADS")
    try:
        if isa is not None and not _prepared:
            extension.set_isa(isa)
        if threads is not None and not _prepared:
            extension.set_num_threads(int(threads))
    except ValueError as error:
        stated = " ".join(f"{name}={os.environ[name]}" for name in ("ERNIE_ISA", "ERNIE_THREADS") if name in os.environ)
        raise ConfigError(f"{stated}: {error}; correct or unset it") from error
    _prepared = True
    return extension
