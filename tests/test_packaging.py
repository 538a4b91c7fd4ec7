"""The package as installed: silent import, complete wheel, agreeing versions, and a way out without a compiler."""

import importlib
import importlib.metadata
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

import ernie45

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "numpy", "tokenizers", "sentencepiece", "jinja2", "huggingface_hub")


def python(code: str, interpreter: str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds this checkout by PYTHONPATH only, not as its current folder."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [interpreter, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        check=True,
    )


def installed() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("ernie45")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("ernie45 is on the path but not installed: `make test` installs it")


def declared_version() -> str:
    # tomllib is not in Python 3.10; the line is the only one of its form.
    (version,) = re.findall(r'^version = "([^"]+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    return str(version)


def build_wheel(folder: Path, **environment: str) -> Path:
    """Build from a copy of what the build reads, so that the checkout stays clean."""
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("ernie45", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder / "wheels"), str(source)]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = (folder / "wheels").glob("ernie45-*.whl")
    return wheel


def status_in_fresh_environment(folder: Path, wheel: Path) -> list[str]:
    """Install the wheel alone into a new environment; what `native.status()` says there: available, reason, remedy."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    interpreter = str(folder / "venv" / "bin" / "python")
    subprocess.run([interpreter, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    code = (
        "from ernie45.kernels import native; s = native.status(); "
        "print(native.__file__, s.available, s.reason, s.remedy, sep='\\n')"
    )
    file, *report = python(code, interpreter, PYTHONPATH="").stdout.splitlines()
    assert Path(file).is_relative_to(folder / "venv"), "the installed package answers, not the checkout"
    return report


def test_import_is_silent_and_light() -> None:
    run = python(f"import sys, ernie45; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


def test_import_changes_no_environment() -> None:
    assert (
        python("import os; before = dict(os.environ); import ernie45; print(before == dict(os.environ))").stdout
        == "True\n"
    )


def test_every_public_name_resolves() -> None:
    assert ernie45.__all__
    assert [name for name in ernie45.__all__ if getattr(ernie45, name, None) is None] == []


def test_every_module_imports() -> None:
    def fail(name: str) -> None:
        raise ImportError(f"cannot import {name}")

    found = [module.name for module in pkgutil.walk_packages(ernie45.__path__, "ernie45.", onerror=fail)]
    # __main__ modules run when imported.
    names = [name for name in found if not name.endswith("__main__")]
    assert "ernie45.kernels.native" in names
    for name in names:
        importlib.import_module(name)


def test_every_source_file_is_in_a_package() -> None:
    # walk_packages does not see folders without __init__.py: their modules would escape the test above.
    folders = {file.parent for file in (ROOT / "ernie45").rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_nothing_is_left_unimplemented() -> None:
    # What a class cannot do, its interface must not promise; catching the error of others is fine.
    raised = re.compile(r"raise NotImplementedError|return NotImplemented")
    assert raised.search("    raise NotImplementedError('later')"), "the pattern finds what it looks for"
    files = sorted((ROOT / "ernie45").rglob("*.py"))
    assert len(files) > 100, "a moved package would leave nothing to search"
    assert [file.name for file in files if raised.search(file.read_text(encoding="utf-8"))] == []


def test_versions_agree() -> None:
    assert ernie45.__version__ == declared_version()
    assert installed().version == declared_version()


def test_installed_metadata_has_licence_and_command() -> None:
    distribution = installed()
    assert distribution.metadata["License-Expression"] == "Apache-2.0 AND MIT"  # the chat page brings MIT code
    vendored = [f"ernie45/server/page/vendor/LICENSE-{name}" for name in ("htm", "marked", "preact")]
    assert sorted(distribution.metadata.get_all("License-File") or ()) == ["LICENSE", *vendored]
    assert distribution.read_text("licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    (command,) = (entry for entry in distribution.entry_points if entry.group == "console_scripts")
    assert (command.name, command.value) == ("ernie", "ernie45.cli.main:main")


@pytest.mark.slow
@pytest.mark.network
def test_wheel_is_complete_and_works_elsewhere(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    wheel = build_wheel(tmp_path, ERNIE_REQUIRE_NATIVE="1")
    packed = set(zipfile.ZipFile(wheel).namelist())
    sources = {file.relative_to(ROOT).as_posix() for file in (ROOT / "ernie45").rglob("*.py")}
    page = ROOT / "ernie45" / "server" / "page"
    sources |= {file.relative_to(ROOT).as_posix() for file in page.rglob("*") if file.is_file()}
    info = f"ernie45-{declared_version()}.dist-info"
    expected = sources | {"ernie45/py.typed", "ernie45/kernels/_native.pyi", f"{info}/licenses/LICENSE"}
    assert expected <= packed
    others = {name for name in packed - expected if not name.startswith((info, "ernie45/"))}
    assert others == set(), "only the package belongs into the wheel"
    available, reason, remedy = status_in_fresh_environment(tmp_path, wheel)
    assert (available, remedy) == ("True", "None"), reason


@pytest.mark.slow
@pytest.mark.network
def test_installs_without_a_compiler_and_says_so(tmp_path: Path) -> None:
    # A PATH that holds nothing but the interpreter, and compilers that do not exist.
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").symlink_to(sys.executable)
    nowhere = str(tmp_path / "no-compiler")
    wheel = build_wheel(tmp_path, PATH=str(folder), CC=nowhere, CXX=nowhere, ERNIE_REQUIRE_NATIVE="")
    assert wheel.name.endswith("-py3-none-any.whl")
    available, reason, remedy = status_in_fresh_environment(tmp_path, wheel)
    assert available == "False"
    assert "reference kernels" in reason
    assert "pip install" in remedy
