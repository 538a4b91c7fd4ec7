"""What the machine can: the denominator of MFU."""

from __future__ import annotations

import time

import torch

_SIZE = 1024
_SECONDS = 0.3


def matmul_flops(dtype: torch.dtype) -> float:
    """Multiplications and additions per second of `torch.matmul` on square matrices, the best of some tries within 0.3 s.

    With as many threads as training has, in its dtype: what a program that does nothing but products would reach.
    """
    a, b = torch.randn(2, _SIZE, _SIZE).to(dtype)
    out = torch.empty_like(a)
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while True:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return 2 * _SIZE**3 / best
