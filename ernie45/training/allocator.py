"""Memory that comes back: settings of the process's allocator without which training on a CPU holds a third more than it uses.

glibc raises its threshold for memory of its own mapping up to 32 MiB as soon as such memory is freed. Activations and gradients then
share one heap, which fragments: 0.6 of 1.8 GB in a step of the benchmark's network. With a fixed threshold every large tensor goes
back to the system when it is freed, at the price of page faults: `benchmarks/train.py --returns-memory` measures both sides.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_MMAP_THRESHOLD = -3  # malloc.h of glibc
_THRESHOLD_BYTES = 4 << 20


def use_huge_pages() -> None:
    """Let large tensors lie in huge pages where the system has them: fewer page faults. torch reads it with its first tensor."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def return_freed_memory() -> bool:
    """Let large tensors go back to the system when they are freed; for the whole process, so programs call it, not libraries.

    Returns: whether the C library took the setting; others than glibc have none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return bool(mallopt is not None and mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES))
