"""Memory that leaves work in and use again: what is gone when an operation returns needs no memory of its own each time.

A step would otherwise ask for a gigabyte of it in pieces of all sizes: fresh pages cost as much as a tenth of the step, and a heap that
holds them between activations and gradients has holes. One slab for each thread serves all leaves in turn. The head asks for most; it
does so when activations are at their height, so that the slab adds nothing to the peak.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_ALIGN_BYTES = 64


class _Slab(threading.local):
    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.used = self.wanted = 0


_slab = _Slab()


@contextmanager
def scratch() -> Iterator[None]:
    """Inside, `take` gives memory; when the block ends it is taken back, so nothing of it may be returned or kept."""
    before = _slab.used
    if not before and _slab.wanted > len(_slab.memory):
        _grow()
    try:
        yield
    finally:
        _slab.used = before


def take(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised, contiguous, of the dtype and device of `like`, until the innermost `scratch` block ends.

    What the slab has no room for is memory of its own, and room for it is made before the next outermost block.
    """
    dtype = dtype or like.dtype
    start = -(-_slab.used // _ALIGN_BYTES) * _ALIGN_BYTES
    end = start + math.prod(shape) * dtype.itemsize
    if not like.is_cpu:
        return like.new_empty(shape, dtype=dtype)
    _slab.used, _slab.wanted = end, max(end, _slab.wanted)
    if end > len(_slab.memory):
        return like.new_empty(shape, dtype=dtype)
    return _slab.memory[start:end].view(dtype).view(shape)


def _grow() -> None:
    _slab.memory = torch.empty(0, dtype=torch.uint8)  # first give back, then ask
    # Later blocks may stand outside of inference mode, and who counts what a layer keeps must not find the slab there.
    with torch.inference_mode(False), _disable_current_modes():
        _slab.memory = torch.empty(_slab.wanted, dtype=torch.uint8)


def release() -> None:
    """Give the calling thread's slab back; the next block asks for a new one."""
    _slab.memory, _slab.wanted = torch.empty(0, dtype=torch.uint8), 0
