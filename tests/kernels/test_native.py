"""The compiled extension and the report on it, compared with what the operating system says about the CPU."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import ernie45.kernels
from ernie45.kernels import native

KERNELS = Path(native.__file__).parent
CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
ARM_NAMES = {"neon": "asimd", "dotprod": "asimddp", "i8mm": "i8mm"}


@pytest.fixture
def extension() -> ModuleType:
    status = native.status()
    if not status.available:
        # Where CI insists on the extension, its absence is a failure.
        (pytest.fail if os.environ.get("ERNIE_REQUIRE_NATIVE") else pytest.skip)(status.reason)
    return importlib.import_module("ernie45.kernels._native")


def cpuinfo(key: str) -> list[str]:
    if not CPUINFO.exists():
        pytest.skip(f"{CPUINFO} is the independent source and exists on Linux only")
    lines = (line.partition(":") for line in CPUINFO.read_text().splitlines())
    return [value.strip() for name, _, value in lines if name.strip() == key]


def report_from_copy(folder: Path, extension_bytes: bytes | None) -> dict[str, str]:
    """Status that a copy of the kernels package reports, with the given bytes as its extension file (None: no file)."""
    copy = folder / "ernie45" / "kernels"
    copy.mkdir(parents=True)
    (copy.parent / "__init__.py").touch()
    for name in ("__init__.py", "native.py"):
        shutil.copy(KERNELS / name, copy)
    if extension_bytes is not None:
        (copy / f"_native{EXTENSION_SUFFIXES[0]}").write_bytes(extension_bytes)
    code = (
        "from ernie45.kernels.native import status; s = status(); print(s.available); print(s.reason); print(s.remedy)"
    )
    # -S -E: no site-packages, so that an installed ernie45 cannot answer in the copy's place.
    run = subprocess.run(
        [sys.executable, "-S", "-E", "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert run.stderr == ""
    return dict(zip(("available", "reason", "remedy"), run.stdout.splitlines(), strict=True))


def test_features_are_those_of_the_kernel(extension: ModuleType) -> None:
    found = extension.cpu_features()
    arm = extension.cpu_info()["architecture"] == "aarch64"
    flags = set(cpuinfo("Features" if arm else "flags")[0].split())
    names = ARM_NAMES if arm else {name: name for name in found if name not in ARM_NAMES}
    assert {name: found[name] for name in names} == {name: flag in flags for name, flag in names.items()}
    assert not any(present for name, present in found.items() if name not in names)


def test_model_name_is_that_of_the_kernel(extension: ModuleType) -> None:
    names = cpuinfo("model name")
    if not names:
        pytest.skip("this architecture's cpuinfo has no model name")
    assert extension.cpu_info()["model"] == names[0]


def test_core_counts_are_those_of_the_kernel(extension: ModuleType) -> None:
    info = extension.cpu_info()
    assert info["logical_cores"] == len(cpuinfo("processor"))
    packages, cores = cpuinfo("physical id"), cpuinfo("core id")
    if not cores:
        pytest.skip("this architecture's cpuinfo has no core ids")
    assert info["physical_cores"] == len(set(zip(packages, cores, strict=True)))


def test_cache_sizes_are_those_of_the_kernel(extension: ModuleType) -> None:
    if not CACHES.exists():
        pytest.skip(f"{CACHES} is the independent source and does not exist here")
    info = extension.cpu_info()
    if info["l1d_bytes"] is None:
        pytest.skip("the CPU does not tell cache sizes here")
    expected = {}
    for index in CACHES.glob("index*"):
        level, kind = ((index / name).read_text().strip() for name in ("level", "type"))
        if kind != "Instruction":
            expected[level] = int((index / "size").read_text().strip().removesuffix("K")) * 1024
    sizes = {"1": info["l1d_bytes"], "2": info["l2_bytes"], "3": info["l3_bytes"]}
    assert {level: sizes[level] for level in expected if level in sizes} == expected
    assert info["cache_line_bytes"] == int((CACHES / "index0" / "coherency_line_size").read_text())


def test_build_info_says_how_it_was_built(extension: ModuleType) -> None:
    build = extension.build_info()
    assert all(isinstance(value, str) and value for value in build.values())
    assert build["build_type"] == "Release"
    assert "-march" not in build["flags"]
    assert build["abi"] in {"abi3", f"cpython-{sys.version_info.major}.{sys.version_info.minor}"}


def test_stub_file_repeats_the_signatures(extension: ModuleType) -> None:
    stub = ast.parse((KERNELS / "_native.pyi").read_text())
    declared: dict[str, str] = {}
    for node in stub.body:
        functions = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        declared |= {
            prefix + function.name: ast.unparse(function.args) + " -> " + ast.unparse(function.returns)
            for function in functions
            if isinstance(function, ast.FunctionDef) and function.returns
        }

    def documented(function: object) -> str:
        (definition,) = ast.parse(f"def {str(function.__doc__).splitlines()[0]}: ...").body
        assert isinstance(definition, ast.FunctionDef)
        assert definition.returns
        return ast.unparse(definition.args) + " -> " + ast.unparse(definition.returns)

    found: dict[str, str] = {}
    for name, value in vars(extension).items():
        if isinstance(value, type):
            methods = {"__init__"} | {method for method in vars(value) if not method.startswith("_")}
            found |= {f"{name}.{method}": documented(getattr(value, method)) for method in methods}
        elif not name.startswith("_"):
            found[name] = documented(value)
    assert declared == found


def test_arrays_without_the_fast_interface_are_taken_as_well_and_never_converted(extension: ModuleType) -> None:
    """What tensors of older torch versions go through: DLPack's Python method."""
    x, y = np.array([[3.0, 4.0]], dtype=np.float32), np.zeros((1, 2), dtype=np.float32)
    extension.rms_norm(x, np.ones(2, dtype=np.float32), 0.0, y)
    np.testing.assert_allclose(y, x / np.sqrt(12.5), rtol=1e-6)
    for wrong in (x.astype(np.float64), x[0], np.ones((3, 2), dtype=np.float32).T, [[3.0, 4.0]], None, 3):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            extension.rms_norm(wrong, np.ones(2, dtype=np.float32), 0.0, y)


def test_tensors_are_borrowed_with_their_offset_and_free_strides_of_single_rows(extension: ModuleType) -> None:
    rows, y = torch.arange(24.0).view(4, 6), torch.empty(1, 3)
    extension.rms_norm(rows[2:3, 3:], torch.ones(3), 0.0, y)
    torch.testing.assert_close(y[0], rows[2, 3:] / rows[2, 3:].square().mean().sqrt())
    for wrong in (rows[:2, 3:], rows.T, rows[:, 0], rows.double(), rows.to("meta"), rows.to_sparse()):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            extension.rms_norm(wrong, torch.ones(3), 0.0, y)


def test_status_of_the_loaded_extension(extension: ModuleType) -> None:
    status = native.status()
    assert status.available
    assert status.remedy is None
    assert status.features == tuple(name for name, present in extension.cpu_features().items() if present)
    assert (status.cpu, status.build) == (extension.cpu_info(), extension.build_info())
    assert status.build["compiler"] in status.reason
    assert native.status() is status


def test_missing_extension_is_reported_with_a_remedy(tmp_path: Path) -> None:
    report = report_from_copy(tmp_path, extension_bytes=None)
    assert report["available"] == "False"
    assert "_native is missing" in report["reason"]
    assert "reference kernels" in report["reason"]
    assert "pip install" in report["remedy"]


def test_broken_extension_is_reported_with_its_message(tmp_path: Path) -> None:
    report = report_from_copy(tmp_path, extension_bytes=b"not a shared library, though of sufficient length" * 9)
    assert report["available"] == "False"
    assert "cannot be loaded: " in report["reason"]
    assert "_native" in report["reason"].partition("cannot be loaded: ")[2], "the loader's own words are kept"
    assert "missing" not in report["reason"]


@pytest.mark.parametrize(
    ("found", "advice"), [("/usr/bin/g++", "ERNIE_REQUIRE_NATIVE=1 pip install"), (None, "install a C++17 compiler")]
)
def test_remedy_depends_on_the_compiler(monkeypatch: pytest.MonkeyPatch, found: str | None, advice: str) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: found)
    monkeypatch.setitem(sys.modules, "ernie45.kernels._native", None)  # what an absent module looks like
    status = native.status.__wrapped__()
    assert not status.available
    assert status.remedy is not None
    assert advice in status.remedy
    assert (status.features, status.cpu, status.build) == ((), {}, {})


def test_dependency_of_the_extension_that_is_missing_is_not_taken_for_its_absence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'backend'", name="backend")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert "cannot be loaded: No module named 'backend'" in native.status.__wrapped__().reason


def test_importing_kernels_loads_neither_torch_nor_the_extension() -> None:
    names = ("torch", "ernie45.kernels._native")
    code = f"import sys, ernie45.kernels.native; print([name for name in {names} if name in sys.modules])"
    folder = Path(ernie45.kernels.__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")
