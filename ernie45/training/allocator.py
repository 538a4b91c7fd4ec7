"""Settings of the process's allocator that training on a CPU wants: keep what is freed, for speed, or give it back, for memory.

A step frees and asks again for about a gigabyte. Left alone, glibc gives some of it back to the system in between, and fresh pages
cost a few percent of a step of the benchmark's network. Kept altogether they cost nothing from the third step on, and the peak is
the same. Given back at once, every large tensor costs its page faults (a tenth of a step), but no holes of a shared heap stay
resident: a tenth less memory.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h of glibc
_NEVER = -1
_THRESHOLD_BYTES = 4 << 20


def use_huge_pages() -> None:
    """Let large tensors lie in huge pages where the system has them: fewer page faults. torch reads it with its first tensor."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> bool:
    """Let freed memory wait for the next step; for the whole process, so programs call it, not libraries.

    Returns: whether the C library took the setting; others than glibc have none.
    """
    return _set((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER))


def return_freed_memory() -> bool:
    """Let large tensors go back to the system when they are freed, and keep the rest; otherwise as `keep_freed_memory`."""
    return _set((_M_MMAP_THRESHOLD, _THRESHOLD_BYTES), (_M_TRIM_THRESHOLD, _NEVER))


def _set(*settings: tuple[int, int]) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and all(bool(mallopt(*setting)) for setting in settings)
