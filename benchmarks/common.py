"""What the benchmarks share: fresh processes, memory and bandwidth meters, facts about the machine, medians, tables.

The program itself stays light (no torch), so that it does not disturb what it measures: every measurement is a function
that runs in a Python process of its own (`run_fresh`), which is this file run as `python -m benchmarks.common`.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ernie45 import __version__
from ernie45.errors import CapacityError, Ernie45Error
from ernie45.kernels.native import status

ROOT = Path(__file__).resolve().parents[1]

QUIET_CORES = 0.2
"""Cores that other processes may use before a figure counts as disturbed."""

_CHILD_LIMIT_S = 3600
_READ_BLOCK = 1 << 24
_STDERR_LINES = 5
_SIGKILL = 9
# Instruction sets that matrix products can use, by their Linux names.
_CPU_FEATURES = {
    "x86_64": (
        *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
        *("amx_tile", "amx_int8", "amx_bf16"),
    ),
    "aarch64": ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
}


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Repeated measurements of one thing."""

    values: tuple[float, ...]
    """In the order in which they were taken."""
    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest of at least one value."""
    return Spread(values=tuple(values), median=statistics.median(values), low=min(values), high=max(values))


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """What a function returned that ran in a process of its own, and how alone it was."""

    result: Any
    other_cores: float | None
    """Cores that other processes kept busy meanwhile (stolen time of a virtual machine included); None if unknown."""


def thread_environment(threads: int, *, sleeps: bool = True) -> dict[str, str]:
    """Environment of a measuring process: its threads, how they wait, no network and no progress bars.

    Args: sleeps: set OMP_WAIT_POLICY to `passive` unless it is set, as the package's entry points do, those of training apart.
    """
    waiting = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")} if sleeps else {}
    return {
        **waiting,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_fresh(function: str, *, threads: int, sleeps: bool = True, **arguments: Any) -> Fresh:
    """Run `module:function` in a new Python process.

    Args: function: takes and returns what JSON can hold. threads: for OpenMP and torch. sleeps: see `thread_environment`.
    Raises: CapacityError if the process was killed; Ernie45Error if it failed or takes longer than an hour.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, answer = Path(folder, "job.json"), Path(folder, "answer.json")
        job.write_text(json.dumps({"function": function, "threads": threads, "arguments": arguments}))
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        meter = CoresMeter()
        try:
            process = subprocess.run(
                [sys.executable, "-m", "benchmarks.common", str(job), str(answer)],
                env={**os.environ, "PYTHONPATH": path, **thread_environment(threads, sleeps=sleeps)},
                capture_output=True,
                text=True,
                timeout=_CHILD_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Ernie45Error(f"{function} took more than {_CHILD_LIMIT_S} s: leave this case out") from error
        others = meter.others()
        if process.returncode == -_SIGKILL:
            raise CapacityError(f"{function} was killed: most likely it needs more memory than this machine has")
        if process.returncode:
            tail = "\n".join(process.stderr.splitlines()[-_STDERR_LINES:])
            raise Ernie45Error(f"{function} ended with exit code {process.returncode}:\n{tail}")
        return Fresh(result=json.loads(answer.read_text()), other_cores=others)


class CoresMeter:
    """Cores that others than this process and its children keep busy, from the moment when the meter is made."""

    def __init__(self, living_children_s: Callable[[], float] = lambda: 0.0) -> None:
        """Args: living_children_s: CPU seconds of children that still run; those that have ended are known."""
        self._living_children_s = living_children_s
        self._start, self._busy, self._own = time.monotonic(), _busy_s(), self._own_s()

    def others(self) -> float | None:
        """Stolen time of a virtual machine included; None where the system does not tell."""
        wall, busy = time.monotonic() - self._start, _busy_s()
        if self._busy is None or busy is None:
            return None
        return max(0.0, (busy - self._busy - (self._own_s() - self._own)) / wall)

    def _own_s(self) -> float:
        return _own_cpu_s() + self._living_children_s()


class PeakMemory:
    """Resident memory above what the process held when the meter was made; mapped file pages count.

    Linux lets a process reset its high-water mark. Elsewhere the mark of the whole life is used, so that a peak during
    the imports, or a larger parent process, would hide smaller ones after it; `method` says which it is.
    """

    def __init__(self) -> None:
        gc.collect()
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.method = "VmHWM"
        except OSError:
            self.method = "ru_maxrss"
        self._base = self._mark()

    def above_base(self) -> int:
        """Bytes between the base and the highest point since."""
        return self._mark() - self._base

    def _mark(self) -> int:
        if self.method == "VmHWM":
            match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
            assert match is not None, "a system with clear_refs reports VmHWM"
            return 1024 * int(match[1])
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def warm_page_cache(folder: Path) -> int:
    """Read every file of a folder once; returns their bytes."""
    total = 0
    for path in sorted(folder.iterdir()):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while block := file.read(_READ_BLOCK):
                    total += len(block)
    return total


def measure_bandwidth(*, size_bytes: int, repeats: int) -> dict[str, Any]:
    """Read a large float32 array from memory, once as a sum and once as a matrix-vector product, several times.

    Returns: `bytes_per_s`, the fastest read (a bound must not be beaten); `sum` and `mv`, all reads; what torch says of
    itself.
    """
    import torch

    width = 4096
    matrix = torch.ones((max(1, size_bytes // (4 * width)), width))
    vector = torch.ones(width)
    reads = {
        "sum": [_seconds(matrix.sum) for _ in range(repeats + 1)],
        "mv": [_seconds(lambda: torch.mv(matrix, vector)) for _ in range(repeats + 1)],
    }
    rates = {name: [4 * matrix.numel() / s for s in seconds[1:]] for name, seconds in reads.items()}  # first: warm-up
    return {
        **rates,
        "bytes_per_s": max(max(values) for values in rates.values()),
        "size_bytes": 4 * matrix.numel(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
    }


def bandwidth_size_bytes() -> int:
    """A read that no cache helps: four times the last-level cache, at least 1 GiB, at most a quarter of the memory."""
    wanted = max(1 << 30, 4 * (last_level_cache_bytes() or 0))
    memory = memory_bytes()
    return wanted if memory is None else min(wanted, memory // 4)


def machine_facts() -> dict[str, Any]:
    """Processor, features that matter for matrix products (present and absent), cores, cache, memory, system."""
    known = _CPU_FEATURES.get(platform.machine(), ())
    present = set(re.split(r"\s+", _cpuinfo("flags") or _cpuinfo("Features") or ""))
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "features": [name for name in known if name in present],
        "features_absent": [name for name in known if name not in present] if len(present) > 1 else [],
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
    }


def last_level_cache_bytes() -> int | None:
    """Size of the largest cache that the first core sees; None where the system does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20}
    texts = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units), default=None)


def memory_bytes() -> int | None:
    """Physical memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def software_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python, of this package and of `packages`, by name."""
    versions = {"python": platform.python_version(), "ernie45": __version__}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def native_extension() -> str:
    """How this package's compiled part was built, or why it is not used."""
    return status().reason


def commit() -> str:
    """Short commit of this checkout, marked when tracked files differ from it; says so where there is none."""
    try:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown: no git checkout"


def now() -> str:
    """Date and time, UTC, to the minute."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, num_words: int) -> str:
    """A Markdown table; the first `num_words` columns are words, the others numbers, set to the right."""
    widths = [max(3, *(len(row[i]) for row in (header, *rows))) for i in range(len(header))]
    numeric = [i >= num_words for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        set_cells = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True)]
        return "| " + " | ".join(set_cells) + " |"

    rule = ["-" * (w - 1) + (":" if n else "-") for w, n in zip(widths, numeric, strict=True)]
    return "\n".join([line(header), line(rule), *(line(row) for row in rows)])


def number(value: float) -> str:
    """Three significant digits, and all digits before the point."""
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{decimals}f}"


def spread_text(s: Spread) -> str:
    """Median, and in brackets the smallest and the largest value."""
    return f"{number(s.median)} ({number(s.low)}-{number(s.high)})"


def size_text(size_bytes: int | None) -> str:
    """A size in MiB or GiB."""
    if size_bytes is None:
        return "unknown"
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.0f} MiB"


def origin_lines(report: Mapping[str, Any]) -> list[str]:
    """Machine, versions, commit and command of a report, as every report states them."""
    machine = report["machine"]
    cache, memory = machine["last_level_cache_bytes"], machine["memory_bytes"]
    return [
        f"machine: {machine['cpu']}, {machine['cores']} cores, last-level cache {size_text(cache)}, memory"
        f" {size_text(memory)}, {machine['system']}",
        f"CPU features: {' '.join(machine['features']) or 'unknown'}; without:"
        f" {' '.join(machine['features_absent']) or 'none of note'};"
        f" torch uses {report['bandwidth']['torch_cpu_capability']}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        f"native extension: {report['native_extension']}",
        f"commit {report['commit']}, {report['date']}",
        f"command: `{report['command']}`",
    ]


def noise_line(other_cores_max: float | None) -> str:
    """Whether others disturbed the figures."""
    if other_cores_max is None:
        return "what other processes did meanwhile is unknown on this system"
    if other_cores_max > QUIET_CORES:
        return (
            f"**not to be published**: other processes used up to {other_cores_max:.2f} cores (limit {QUIET_CORES}): repeat"
            " it on a quiet machine"
        )
    return f"other processes used at most {other_cores_max:.2f} cores"


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a report as JSON."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cpuinfo(field: str) -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(rf"^{field}\s*:\s*(.*)$", text, flags=re.MULTILINE)
    return match[1].strip() if match else None


def _busy_s() -> float | None:
    """CPU seconds that the machine has spent on anything but idling, over all cores; None where unknown."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(value) for value in fields[1:9])
    return float(user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_cpu_s() -> float:
    """CPU seconds of this process and of its finished children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _child_main(job: Path, answer: Path) -> None:
    """The other end of `run_fresh`."""
    task = json.loads(job.read_text())
    module, name = task["function"].split(":")
    import torch

    torch.set_num_threads(task["threads"])
    result = getattr(importlib.import_module(module), name)(**task["arguments"])
    answer.write_text(json.dumps(result))


if __name__ == "__main__":
    _child_main(Path(sys.argv[1]), Path(sys.argv[2]))
