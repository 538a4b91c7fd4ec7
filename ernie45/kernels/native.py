"""The compiled extension `ernie45.kernels._native`: whether it can be used, why not, and what to do about it.

The package installs without a compiler and then runs on the PyTorch references. That must never be a surprise:
`ernie doctor` prints what `status()` returns, and the reason is kept when the extension is there but cannot be loaded.
"""

import importlib
import shutil
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import cast

_EXTENSION = "ernie45.kernels._native"
_COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True, kw_only=True)
class NativeStatus:
    """What is known about the compiled extension in this process."""

    available: bool
    reason: str
    """One line: how it was built, or why it cannot be used."""
    remedy: str | None
    """What to do to get it; None when it is available."""
    features: tuple[str, ...]
    """Instruction sets that CPU and operating system offer, by their Linux names; empty when not available."""
    cpu: dict[str, str | int | None]
    """Architecture, model, core counts, cache sizes in bytes, None where unknown; empty when not available."""
    build: dict[str, str]
    """Version, compiler, flags, build type, ABI, Python and nanobind versions; empty when not available."""


@cache
def status() -> NativeStatus:
    """Load the extension on the first call and report on it; later calls return the same object.

    Returns: the status. A missing or broken extension is an answer here, not an error.
    """
    try:
        extension = importlib.import_module(_EXTENSION)
    except ModuleNotFoundError as error:
        # Another name means that the extension is there and lacks something it imports.
        return _missing() if error.name == _EXTENSION else _broken(error)
    except ImportError as error:
        return _broken(error)
    return _loaded(extension)


def _loaded(extension: ModuleType) -> NativeStatus:
    features = cast("dict[str, bool]", extension.cpu_features())
    build = cast("dict[str, str]", extension.build_info())
    return NativeStatus(
        available=True,
        reason=f"version {build['version']}, compiled with {build['compiler']} ({build['abi']})",
        remedy=None,
        features=tuple(name for name, present in features.items() if present),
        cpu=extension.cpu_info(),
        build=build,
    )


def _missing() -> NativeStatus:
    if any(shutil.which(compiler) for compiler in _COMPILERS):
        remedy = (
            "a C++ compiler is present: run `ERNIE_REQUIRE_NATIVE=1 pip install --force-reinstall --no-deps -v .` in "
            "the source folder; it builds the extension, or stops at the error that prevents it"
        )
    else:
        remedy = (
            "install a C++17 compiler (Debian, Ubuntu: `apt install g++`; Fedora: `dnf install gcc-c++`; macOS: "
            "`xcode-select --install`), then run `pip install --force-reinstall --no-deps .` in the source folder"
        )
    return _unavailable(f"this installation has no compiled extension ({_EXTENSION} is missing)", remedy)


def _broken(error: ImportError) -> NativeStatus:
    return _unavailable(
        f"the compiled extension is installed but cannot be loaded: {error}",
        "rebuild it for this Python and system: `pip install --force-reinstall --no-deps .` in the source folder",
    )


def _unavailable(reason: str, remedy: str) -> NativeStatus:
    return NativeStatus(
        available=False,
        reason=f"{reason}; the reference kernels are used",
        remedy=remedy,
        features=(),
        cpu={},
        build={},
    )
