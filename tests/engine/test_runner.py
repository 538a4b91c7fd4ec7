"""The memory of keys and values."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from ernie45.engine.runner import new_stores, untouched_zeros
from ernie45.errors import CapacityError

# In a process of its own: this one gives memory back and takes it whenever it likes.
_PROGRAM = """
import os
import torch
from ernie45.engine.runner import untouched_zeros

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

before = resident_mib()
zeros = untouched_zeros((256, 1 << 20), torch.int8)
untouched = resident_mib() - before
zeros[:64].fill_(1)
print(untouched, resident_mib() - before, int(zeros[63:65].sum(dtype=torch.int64)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_memory_is_taken_when_it_is_written() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    untouched, written, ones = map(int, done.stdout.split())
    assert untouched < 16
    assert 60 < written < 100
    assert ones == 1 << 20, "the rest is zero"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_zeros_are_as_torchs(dtype: torch.dtype) -> None:
    for shape in ((3, 5), (1,), (2, 0, 4)):
        zeros = untouched_zeros(shape, dtype)
        assert torch.equal(zeros, torch.zeros(shape, dtype=dtype))
        assert zeros.is_contiguous()
        assert not zeros.numel() or zeros.data_ptr() % 64 == 0


def test_a_cache_that_no_machine_holds(small_model: Any) -> None:
    with pytest.raises(CapacityError, match=r"needs [\d.]+ GiB, more than there is: lower kv_cache_memory"):
        new_stores(small_model(), 2, 1 << 44, 16, "bfloat16")
