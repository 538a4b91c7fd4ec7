"""Which kernels run: environment, functions, and the line that tells."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import pytest

from ernie45.errors import ConfigError
from ernie45.kernels import choice, native

TELL = """
from ernie45.errors import ConfigError
from ernie45.kernels import choice
try:
    extension = choice.native()
    print("reference" if extension is None else f"{extension.isa()} {extension.num_threads()}")
    print(choice.describe())
except ConfigError as error:
    print("ConfigError", error)
"""

AGAIN = """
from ernie45.kernels import choice
choice.use_kernels("native")
print(choice.native().isa(), choice.native().num_threads())
"""
STUBBORN = """
from ernie45.errors import ConfigError
from ernie45.kernels import choice
for _ in range(2):
    try:
        print(choice.native())
    except ConfigError:
        print("refused")
"""


def tell(*, code: str = TELL, **environment: str) -> list[str]:
    """What a fresh process chooses under these variables."""
    clean = {
        name: value for name, value in os.environ.items() if name not in ("ERNIE_KERNELS", "ERNIE_ISA", "ERNIE_THREADS")
    }
    run = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()


def test_without_variables_the_best_runs(extension: ModuleType) -> None:
    first, line = tell()
    assert first.split()[0] == extension.best_isa()
    assert f"the best of this CPU is {extension.best_isa()}" in line


def test_variables_force_instruction_set_and_threads(extension: ModuleType) -> None:
    first, line = tell(ERNIE_ISA="baseline", ERNIE_THREADS="3")
    assert first == "baseline 3"
    assert line == "native kernels on baseline (forced by ERNIE_ISA=baseline), 3 threads (forced by ERNIE_THREADS=3)"
    (line,) = tell(code=AGAIN, ERNIE_ISA="baseline", ERNIE_THREADS="3")
    assert line == "baseline 3", "an explicit choice of the native kernels changes neither"


def test_reference_can_be_forced() -> None:
    first, line = tell(ERNIE_KERNELS="reference")
    assert first == "reference"
    assert line == "reference kernels in PyTorch: ERNIE_KERNELS=reference"
    _, line = tell(ERNIE_KERNELS="reference", ERNIE_THREADS="3")
    assert line.endswith("ERNIE_KERNELS=reference; without effect on them: ERNIE_THREADS=3")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ERNIE_ISA": "neon9"}, "expected baseline, avx2, avx512 or amx, got neon9"),
        ({"ERNIE_THREADS": "0"}, "expected 1 to 1024, got 0"),
        ({"ERNIE_THREADS": "many"}, "many"),
    ],
)
def test_wrong_variables_are_errors(extension: ModuleType, environment: dict[str, str], message: str) -> None:
    (line,) = tell(**environment)
    assert line.startswith("ConfigError")
    assert message in line


def test_a_wrong_choice_is_an_error_with_or_without_the_module() -> None:
    (line,) = tell(ERNIE_KERNELS="fast")
    assert line == "ConfigError kernels is 'fast', expected 'native' or 'reference'"


def test_a_wrong_variable_is_refused_each_time(extension: ModuleType) -> None:
    assert tell(code=STUBBORN, ERNIE_ISA="neon9") == ["refused", "refused"]


def test_the_report_names_what_is_compiled_and_what_runs_here(extension: ModuleType, isas: list[str]) -> None:
    found = choice.in_use()
    assert (found.kernels, found.isa, found.threads) == ("native", extension.isa(), extension.num_threads())
    assert found.supported == tuple(isas)
    assert found.compiled[: len(isas)] == found.supported
    extension.set_isa("baseline")
    extension.set_num_threads(7)
    assert choice.describe().startswith("native kernels on baseline (")
    assert choice.describe().endswith("7 threads (set by the program)")
    with choice.kernels("reference", why="a test"):
        assert choice.describe().startswith("reference kernels in PyTorch: a test")
        assert (choice.in_use().isa, choice.in_use().threads) == (None, None)
        assert choice.in_use().supported == found.supported


def test_no_choice_leaves_the_choice(extension: ModuleType) -> None:
    with choice.kernels("reference"), choice.kernels(None):
        assert choice.native() is None


def test_a_choice_ends_with_its_block(extension: ModuleType) -> None:
    assert choice.native() is extension
    with choice.kernels("reference"):
        assert choice.native() is None
        with choice.kernels("native"):
            assert choice.native() is extension
        assert choice.native() is None
    assert choice.native() is extension


def test_native_without_the_module_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = native.NativeStatus(
        available=False, reason="no module here", remedy="build it", features=(), cpu={}, build={}
    )
    monkeypatch.setattr(choice, "status", lambda: missing)
    with pytest.raises(ConfigError, match=r"no module here\. build it"):
        choice.use_kernels("native")
