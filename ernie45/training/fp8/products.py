"""The three products of a linear layer in fp8, and who takes the weight's gradient.

| product | left | right |
|---|---|---|
| output Y = X W^T | X, 1 x 128 along the inputs | W, 128 x 128 |
| input gradient dX = dY W | dY, 1 x 128 along the outputs | W, 128 x 128, turned |
| weight gradient dW = dY^T X | dY, 1 x 128 along the tokens | X as it was in fp8, 1 x 128 along the tokens |

Weights are rounded when they are used, forward and backward, from the parameter itself: nothing is kept that could grow old.
"""

from __future__ import annotations

from torch import Tensor

from ernie45.training.fp8.config import Backend
from ernie45.training.fp8.matmul import matmul
from ernie45.training.fp8.scaled import Scaled, quantize_rows, quantize_tiles
from ernie45.training.optim.gradients import add_main_gradient


def output(x: Scaled, weight_NK: Tensor, backend: Backend) -> Tensor:
    """X (T, K) -> float32 (T, N)."""
    return matmul(x, quantize_tiles(weight_NK), backend)


def input_gradient(grad_TN: Tensor, weight_NK: Tensor, backend: Backend) -> Tensor:
    """dY (T, N) -> float32 (T, K)."""
    return matmul(quantize_rows(grad_TN), quantize_tiles(weight_NK).transposed(), backend)


def weight_gradient(grad_TN: Tensor, x: Scaled, backend: Backend) -> Tensor:
    """dY (T, N) and X (T, K) -> float32 (N, K)."""
    return matmul(quantize_rows(grad_TN.mT), quantize_rows(x.dequantized().mT), backend)


def hand_over(parameter: Tensor, gradient: Tensor) -> Tensor | None:
    """Add a float32 weight gradient to the optimizer's float32 sum; without one, what to return from `backward`."""
    return None if add_main_gradient(parameter, gradient) else gradient.to(parameter.dtype)
