"""Freed tensors go back to the system or wait there, in processes of their own: a setting is for good."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import sys
from ernie45.training.allocator import return_freed_memory
print(return_freed_memory() if sys.argv[1] == "set" else None)
import torch
torch.empty(8 << 20, dtype=torch.uint8).fill_(1)  # from now on glibc puts as much on its heap
pairs = [(torch.ones(6 << 20, dtype=torch.uint8), torch.ones(1 << 16, dtype=torch.uint8)) for _ in range(40)]
small = [pair[1] for pair in pairs]  # one between any two large ones
del pairs
print([int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmRSS")][0])
"""


def _resident(mode: str) -> tuple[str, int]:
    out = subprocess.run([sys.executable, "-c", _PROGRAM, mode], capture_output=True, text=True, check=True).stdout
    done, size = out.split()
    return done, int(size)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_large_tensors_leave_no_holes() -> None:
    set_up, with_setting = _resident("set")
    _, without = _resident("keep")
    assert set_up == "True"
    assert without - with_setting > 150, "of 240 MB that were freed"


_STEPS = """
import resource, sys
from ernie45.training.allocator import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "set" else None)
import torch
def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(40 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults_of_a_step() for _ in range(12)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_kept_memory_is_not_asked_for_again() -> None:
    found = [
        subprocess.run([sys.executable, "-c", _STEPS, mode], capture_output=True, text=True, check=True).stdout.split()
        for mode in ("set", "keep")
    ]
    assert found[0][0] == "True"
    assert int(found[0][1]) < 100 < int(found[1][1]), (
        "page faults of 40 MB: none once a hole fits, or all of them every time"
    )
