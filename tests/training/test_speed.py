"""What the machine can, from the best of some products."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from ernie45.training import speed


def test_the_fastest_product_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0, 0.0, 0.25, 0.25, 0.35, 0.35, 9.0]  # an end, then the beginnings and ends of three products
    clock = itertools.chain(seconds, itertools.repeat(10.0))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert speed.matmul_flops(torch.float32) == pytest.approx(2 * 1024**3 / 0.1)


def test_it_is_what_products_reach_here() -> None:
    assert 1e8 < speed.matmul_flops(torch.float32) < 1e15
