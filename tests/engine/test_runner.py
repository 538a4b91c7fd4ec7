"""The memory of keys and values."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ernie45.engine.runner import new_stores, untouched_zeros
from ernie45.errors import CapacityError

_MIB = 1 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_memory_is_taken_when_it_is_written() -> None:
    before = resident_bytes()
    zeros = untouched_zeros((256, _MIB), torch.int8)
    assert resident_bytes() - before < 16 * _MIB
    zeros[:64].fill_(1)
    assert 60 * _MIB < resident_bytes() - before < 100 * _MIB
    assert int(zeros[63:65].sum(dtype=torch.int64)) == _MIB, "the rest is zero"


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
