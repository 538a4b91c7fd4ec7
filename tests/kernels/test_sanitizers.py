"""All kernels under the address, undefined-behaviour and thread sanitizers: a C++ driver, built here and run.

Sources and flags are read from CMakeLists.txt, so that a new file cannot be forgotten.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).parent / "sanitizers" / "driver.cpp"


def kernel_sources() -> dict[Path, list[str]]:
    """Kernel files and the flags that CMakeLists.txt gives them."""
    text = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())
    variables = {name: value.split() for name, value in re.findall(r"set\((\w+_flags) ([^)]*)\)", text)}
    found: dict[Path, list[str]] = {}
    for flags, sources in re.findall(r"ernie_kernels\(\s*(?:FLAGS ([^)]*?))?\s*SOURCES ([^)]*)\)", text):
        words = [word for flag in flags.split() for word in variables.get(flag.strip("${}"), [flag])]
        found |= {ROOT / source: words for source in sources.split()}
    return found


def test_every_kernel_file_is_found() -> None:
    assert set(kernel_sources()) == set((ROOT / "csrc" / "kernels").glob("*.cpp"))


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_kernels_run_clean(tmp_path: Path, sanitizers: str) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no g++ or clang++ to build the kernels with")
    common = [
        "-std=c++17",
        "-O2",
        "-g",
        f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all",
        f"-I{ROOT / 'csrc'}",
        "-DERNIE45_AMX",  # as CMakeLists.txt defines it where the compiler knows the instructions
        "-w",
    ]

    def build(item: tuple[Path, list[str]]) -> Path:
        source, flags = item
        target = tmp_path / f"{source.stem}.o"
        subprocess.run([compiler, *common, *flags, "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, [*kernel_sources().items(), (DRIVER, [])]))
    program = tmp_path / "driver"
    linked = subprocess.run(
        [compiler, *common, *map(str, objects), "-pthread", "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    if linked.returncode and "cannot find" in linked.stderr:
        pytest.skip(
            f"this compiler comes without the sanitizers {sanitizers}: {linked.stderr.strip().splitlines()[-1]}"
        )
    assert linked.returncode == 0, linked.stderr
    run = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "clean\n"), run.stdout + run.stderr
