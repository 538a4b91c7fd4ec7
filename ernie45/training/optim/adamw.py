"""AdamW by torch's fused kernel: one pass over weights, gradient and moments, in place.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    w = (1 - lr wd) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Source: Loshchilov and Hutter, arXiv 1711.05101. What is kept in float32 is moved where it lies, bit for bit as
`torch.optim.AdamW(fused=True)` does it; narrow moments and weights pass through float32 a few megabytes at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ernie45.training.optim.config import OptimizerConfig
from ernie45.training.optim.moments import BLOCK, random_of
from ernie45.training.optim.slot import FIRST, SECOND, Slot

PIECE = 1 << 20
"""Values that are widened at a time, a multiple of `BLOCK`: 4 MB in float32, of each of weights and moments."""
assert PIECE % BLOCK == 0


@torch.no_grad()
def update(pairs: Sequence[tuple[Slot, Tensor]], config: OptimizerConfig, lr: float) -> None:
    """One step for parameters and their float32 gradients. `lr`: before the parameters' own ratios."""
    together: dict[tuple[float, float], list[tuple[Slot, Tensor]]] = defaultdict(list)
    for slot, gradient in pairs:
        if slot.is_wide:
            together[slot.role.lr_ratio, slot.role.weight_decay].append((slot, gradient))
        else:
            _by_pieces(slot, gradient.reshape(-1), config, lr)
    for group in together.values():
        _in_place(group, config, lr)


def _in_place(group: Sequence[tuple[Slot, Tensor]], config: OptimizerConfig, lr: float) -> None:
    """Slots of equal ratio and decay in one call."""
    sizes = [(slot, gradient.reshape(-1), slot.parameter.numel()) for slot, gradient in group]
    role = group[0][0].role
    adamw(
        [slot.weights.read(0, size) for slot, _, size in sizes],
        [gradient for _, gradient, _ in sizes],
        [slot.moments[FIRST].read(0, size) for slot, _, size in sizes],
        [slot.moments[SECOND].read(0, size) for slot, _, size in sizes],
        [],
        [slot.updates for slot, _, _ in sizes],
        **_settings(config, lr * role.lr_ratio, role.weight_decay),
    )


def _by_pieces(slot: Slot, gradient: Tensor, config: OptimizerConfig, lr: float) -> None:
    """One slot that keeps something in a narrow form."""
    random = random_of(slot.name, int(slot.updates.item()) + 1, gradient.device)
    before = slot.updates.clone()
    stores = (slot.weights, slot.moments[FIRST], slot.moments[SECOND])
    for start in range(0, len(gradient), PIECE):
        stop = min(start + PIECE, len(gradient))
        weights, first, second = (store.read(start, stop) for store in stores)
        slot.updates.copy_(before)  # the kernel counts each piece as an update
        settings = _settings(config, lr * slot.role.lr_ratio, slot.role.weight_decay)
        adamw([weights], [gradient[start:stop]], [first], [second], [], [slot.updates], **settings)
        for store, values in zip(stores, (weights, first, second), strict=True):
            store.write(start, values, random)


def _settings(config: OptimizerConfig, lr: float, weight_decay: float) -> dict[str, Any]:
    return {
        "fused": True,
        "amsgrad": False,
        "maximize": False,
        "beta1": config.betas[0],
        "beta2": config.betas[1],
        "eps": config.eps,
        "lr": lr,
        "weight_decay": weight_decay,
    }
