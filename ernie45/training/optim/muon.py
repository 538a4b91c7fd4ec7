"""Muon: momentum whose matrices are made orthogonal before they move the weights.

    b = mu b + (1 - mu) g,   u = b, or mu b + (1 - mu) g once more with Nesterov's look ahead
    w = (1 - lr wd) w - lr s(R, C) orthogonal(u)

`orthogonal` replaces the singular values of u by numbers near 1 with the quintic Newton-Schulz iteration, whose coefficients
trade accuracy (0.68 to 1.13 after five steps) for speed. Matrices that are fused here, and the experts of a layer, are taken
apart first: an orthogonal stack is not a stack of orthogonal matrices. Equal ones go through the iteration as a batch.

Source: K. Jordan, "Muon" (2024); Liu et al., "Muon is scalable for LLM training", arXiv 2502.16982 (the scale that matches AdamW).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ernie45.training.optim.config import MuonConfig, MuonScale, OptimizerConfig
from ernie45.training.optim.groups import Matrices
from ernie45.training.optim.moments import random_of
from ernie45.training.optim.slot import MOMENTUM, Slot

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5. They maximise the slope at 0 while values stay near 1 (K. Jordan's article)."""
BATCH_VALUES = 1 << 22
"""Matrices are made orthogonal in batches of about this many values: 16 MB, and four times that while it runs."""


@torch.no_grad()
def update(pairs: Sequence[tuple[Slot, Tensor]], config: OptimizerConfig, lr: float) -> None:
    """One step for parameters and their float32 gradients. `lr`: before the parameters' own ratios."""
    for slot, gradient in pairs:
        _update(slot, gradient.reshape(-1), config, lr * slot.role.lr_ratio)


def _update(slot: Slot, gradient: Tensor, config: OptimizerConfig, lr: float) -> None:
    size, muon = len(gradient), config.muon
    slot.updates.add_(1)
    random = random_of(slot.name, int(slot.updates.item()), gradient.device)
    weights, momentum = slot.weights.read(0, size), slot.moments[MOMENTUM].read(0, size)
    momentum.lerp_(gradient, 1 - muon.momentum)
    weights.mul_(1 - lr * slot.role.weight_decay)
    columns = slot.parameter.shape[-1]
    for matrices in slot.role.matrices:
        start = matrices.start_row * columns
        stop = start + matrices.count * matrices.rows * columns
        here = slice(start, stop)
        _move(weights[here], gradient[here], momentum[here], matrices, muon, lr)
    slot.weights.write(0, weights, random)
    slot.moments[MOMENTUM].write(0, momentum, random)


def _move(
    weights: Tensor, gradient: Tensor, momentum: Tensor, matrices: Matrices, config: MuonConfig, lr: float
) -> None:
    shape = (-1, matrices.rows, matrices.columns)
    batch = max(1, BATCH_VALUES // (matrices.rows * matrices.columns))
    parts = (tensor.view(shape).split(batch) for tensor in (weights, gradient, momentum))
    for some_weights, some_gradient, some_momentum in zip(*parts, strict=True):
        ahead = some_gradient.lerp(some_momentum, config.momentum) if config.nesterov else some_momentum
        step = lr * update_scale(matrices.rows, matrices.columns, config.scale)
        some_weights.add_(orthogonal(ahead, steps=config.steps), alpha=-step)


def orthogonal(x: Tensor, *, steps: int) -> Tensor:
    """The nearest matrices with orthogonal rows (or columns, if there are more rows), about: (batch, R, C) -> same, float32.

    Products run in bfloat16 on a GPU, as published, and in float32 on the CPU, where bfloat16 is slower.
    """
    first, third, fifth = COEFFICIENTS
    is_tall = x.shape[-2] > x.shape[-1]
    y = x.mT if is_tall else x
    y = y / torch.linalg.matrix_norm(y, keepdim=True).clamp_min(1e-7)  # singular values to at most 1
    y = y.bfloat16() if x.device.type == "cuda" else y
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), y, beta=first)
    return (y.mT if is_tall else y).float()


def update_scale(rows: int, columns: int, scale: MuonScale) -> float:
    """Factor of an orthogonal update, see `MuonConfig.scale`."""
    if scale == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))
