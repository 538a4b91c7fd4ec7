"""What the machine can: an estimate that a plain measurement confirms."""

from __future__ import annotations

import time

import torch

from ernie45.training.speed import matmul_flops


def test_no_product_is_much_faster_than_the_peak() -> None:
    peak = matmul_flops(torch.float32)
    a = torch.randn(512, 512)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    assert 1e8 < peak < 1e15
    assert 2 * 512**3 / min(seconds) < 3 * peak
