"""`ernie doctor`: it reports on a healthy machine and on a sick one, and never falls ill itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ernie45.cli import doctor
from ernie45.kernels import native
from ernie45.kernels.native import NativeStatus

Ernie = Callable[..., Any]
NATIVE = NativeStatus(available=True, reason="version 1", remedy=None, features=("avx2", "fma"), cpu={}, build={})
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def healthy(home: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with nothing to fix."""
    (home / "models" / "smollm2-135m").symlink_to(tiny)
    monkeypatch.setattr(doctor, "status", lambda: NATIVE)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**12, 0, 10**11))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


def report(ernie: Ernie) -> tuple[int, dict[str, Any]]:
    result = ernie("doctor", "--json")
    assert result.err == ""
    return result.code, json.loads(result.out)


@pytest.mark.usefixtures("healthy")
def test_nothing_to_fix(ernie: Ernie, home: Path) -> None:
    code, data = report(ernie)
    assert (code, data["ok"], data["to_fix"]) == (0, True, [])
    assert data["packages"]["torch"] == torch.__version__
    assert data["torch"] == {"threads": torch.get_num_threads(), "cuda": torch.cuda.is_available(), "error": None}
    assert data["cpu"] == {"features": ["avx2", "fma"], "logical_cores": os.cpu_count()}
    assert 0 < data["memory_available_bytes"] <= data["memory_bytes"]
    assert (data["store"], data["models"], data["disk_free_bytes"]) == (str(home), ["smollm2-135m", "tiny"], 10**11)
    table = ernie("doctor")
    assert table.code == 0
    assert table.out.splitlines()[-1].split() == ["to", "fix", "nothing"]
    assert "avx2 fma" in table.out


@pytest.mark.usefixtures("healthy")
def test_advice_leaves_the_exit_code_at_0(ernie: Ernie, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "models" / "smollm2-135m").unlink()
    missing = NativeStatus(
        available=False, reason="no extension", remedy="install a compiler", features=(), cpu={}, build={}
    )
    monkeypatch.setattr(doctor, "status", lambda: missing)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**12, 0, 10**9))
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    code, data = report(ernie)
    assert (code, data["ok"]) == (0, True)
    kernels, model, disk, policy = data["to_fix"]
    assert kernels == "no native kernels: install a compiler"
    assert model == "the default model is not here: ernie pull smollm2-135m"
    assert disk.startswith(f"only 1.0 GB free in {home}")
    assert policy.startswith("OMP_WAIT_POLICY is active")
    assert len([line for line in ernie("doctor").out.splitlines() if line.startswith(("to fix", "       "))]) == 4


@pytest.mark.usefixtures("healthy")
def test_a_missing_package_is_broken(ernie: Ernie, monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("jinja2", "transformers") else version(name))
    code, data = report(ernie)
    assert (code, data["ok"], data["to_fix"]) == (1, False, ["jinja2 is missing: pip install jinja2"])
    assert "jinja2 missing" in ernie("doctor").out
    assert "transformers not installed (optional)" in ernie("doctor").out


@pytest.mark.usefixtures("healthy")
def test_a_torch_that_cannot_be_imported_is_broken(ernie: Ernie, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    code, data = report(ernie)
    assert (code, data["ok"]) == (1, False)
    assert data["to_fix"][0].startswith("torch cannot be imported (")
    assert ernie("doctor").code == 1


@pytest.mark.usefixtures("healthy")
def test_a_store_that_is_a_file_is_broken(ernie: Ernie, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ERNIE45_HOME", str(tmp_path / "file"))
    code, data = report(ernie)
    assert (code, data["ok"]) == (1, False)
    assert "cannot be written: set ERNIE45_HOME" in data["to_fix"][0]


def test_a_store_that_is_yet_to_be_made_is_fine(ernie: Ernie, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERNIE45_HOME", str(tmp_path / "not" / "yet"))
    code, data = report(ernie)
    assert (code, data["ok"], data["models"]) == (0, True, [])
    assert not (tmp_path / "not").exists()


def doctor_under(**environment: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, report and table of fresh processes under these variables."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ERNIE_")}
    runs = [
        subprocess.run(
            [sys.executable, "-m", "ernie45.cli.main", "doctor", *options],
            env=clean | environment, capture_output=True, text=True, check=False,
        )
        for options in (["--json"], [])
    ]  # fmt: skip
    return runs[0].returncode, json.loads(runs[0].stdout)["kernels"]["in_use"], runs[1].stdout


@pytest.mark.usefixtures("home")
def test_the_kernels_in_use_and_why() -> None:
    if not native.status().available:
        pytest.skip(native.status().reason)
    code, found, table = doctor_under()
    assert (code, found["kernels"], found["environment"]) == (0, "native", {})
    assert found["isa"] == found["supported"][-1]
    assert f"native kernels on {found['isa']} (the best of this CPU is {found['isa']})" in table
    assert f"compiled for {', '.join(found['compiled'])}; this CPU " in table


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("environment", "facts", "line"),
    [
        ({"ERNIE_ISA": "baseline"}, {"isa": "baseline"}, "on baseline (forced by ERNIE_ISA=baseline)"),
        ({"ERNIE_THREADS": "3"}, {"threads": 3}, "3 threads (forced by ERNIE_THREADS=3)"),
        ({"ERNIE_KERNELS": "reference"}, {"kernels": "reference", "isa": None}, "PyTorch: ERNIE_KERNELS=reference"),
    ],
)
def test_every_variable_shows(environment: dict[str, str], facts: dict[str, Any], line: str) -> None:
    if not native.status().available:
        pytest.skip(native.status().reason)
    code, found, table = doctor_under(**environment)
    assert (code, found["environment"]) == (0, environment)
    assert {name: found[name] for name in facts} == facts
    assert line in table


@pytest.mark.usefixtures("home")
def test_a_variable_that_cannot_be_followed_is_broken() -> None:
    code, found, table = doctor_under(ERNIE_KERNELS="fast")
    assert (code, found["error"]) == (1, "kernels is 'fast', expected 'native' or 'reference'")
    assert table.count("kernels is 'fast'") == 2, "as what is in use, and as what to fix"


def test_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = doctor._memory()

    def unreadable(*_: object, **__: object) -> str:
        raise OSError

    monkeypatch.setattr(Path, "read_text", unreadable)
    total, available = doctor._memory()
    assert total == pytest.approx(usual[0], rel=0.1)
    assert 0 < available <= total
