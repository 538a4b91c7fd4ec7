"""The one check of a tensor that goes into a kernel, with words for what does not fit.

References run it first. The native module checks for itself and faster; where it refuses, this says why.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ernie45.errors import ShapeError


def check_tensor(
    operation: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> None:
    """Insist on a contiguous tensor of this shape and dtype on the CPU.

    Raises: ShapeError with operation, argument, what was expected and what came.
    """
    if tensor.shape == shape and tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous():
        return
    raise ShapeError(
        f"[{operation}] {name}: expected a contiguous {str(dtype).removeprefix('torch.')} tensor of shape {shape} on the "
        f"CPU, got {tensor.dtype}, {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
    )
