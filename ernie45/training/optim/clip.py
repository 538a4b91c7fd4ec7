"""The norm of all gradients together, and scaling them down to a limit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def global_norm(gradients: Sequence[Tensor]) -> float:
    """Square root of the sum of all squares, computed in float32; NaN or infinite if any gradient is."""
    if not gradients:
        return 0.0
    norms = torch._foreach_norm(list(gradients))
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])).item()


@torch.no_grad()
def scale_to(gradients: Sequence[Tensor], norm: float, limit: float) -> None:
    """Multiply all gradients, whose norm is `norm`, by limit / (norm + 1e-6) where that is below 1; not if `norm` is not finite."""
    ratio = limit / (norm + 1e-6)  # the constant is that of torch.nn.utils.clip_grad_norm_
    if math.isfinite(norm) and ratio < 1:
        torch._foreach_mul_(list(gradients), ratio)
