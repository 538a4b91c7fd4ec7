"""Which dtype a leaf computes in. Custom functions are invisible to autocast, so the leaves ask for it themselves."""

from __future__ import annotations

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """Dtype of matrix products with `x`: autocast's where it is on, otherwise that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums over values of `dtype`: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)
