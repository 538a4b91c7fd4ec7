"""Gradients are added up in float32, whatever the parameters are.

A float32 parameter has its sum in `.grad`, as always. A narrower one would add up in its own dtype; there a hook takes each
gradient as soon as the backward pass has made it, adds it to a float32 sum and frees it. A function that computes a weight gradient in
float32 can add it to the sum without rounding it first (`add_main_gradient`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_SUM = "main_grad"
"""Attribute of a narrow parameter: its float32 sum, or None when nothing was added yet."""


class MainGradients:
    """Keeps float32 sums for those of the given parameters that are narrower; one owner per parameter at a time."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._narrow = [parameter for parameter in parameters if parameter.dtype != torch.float32]
        for parameter in self._narrow:
            setattr(parameter, _SUM, None)
        self._hooks = [parameter.register_post_accumulate_grad_hook(_take) for parameter in self._narrow]

    def of(self, parameter: nn.Parameter) -> Tensor | None:
        """The sum so far, float32; None if no gradient came."""
        return getattr(parameter, _SUM) if parameter.dtype != torch.float32 else parameter.grad

    def clear(self, parameter: nn.Parameter) -> None:
        """Forget the sum and free its memory."""
        parameter.grad = None
        if parameter.dtype != torch.float32:
            setattr(parameter, _SUM, None)

    def close(self) -> None:
        """Leave the parameters as they were found."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._narrow:
            delattr(parameter, _SUM)
        self._hooks, self._narrow = [], []


def add_main_gradient(parameter: Tensor, gradient: Tensor) -> bool:
    """Add a float32 gradient to a narrow parameter's sum, for functions with a backward pass of their own.

    Returns: False if nobody keeps such a sum; the gradient then goes through autograd, in the parameter's dtype.
    """
    if not hasattr(parameter, _SUM):
        return False
    total: Tensor | None = getattr(parameter, _SUM)
    if total is None:
        setattr(parameter, _SUM, gradient)
    else:
        total += gradient
    return True


def _take(parameter: Tensor) -> None:
    gradient = parameter.grad
    if gradient is None:  # a function that handed its gradient over itself
        return
    parameter.grad = None
    total: Tensor | None = getattr(parameter, _SUM)
    if total is None:
        setattr(parameter, _SUM, gradient.float())
    else:
        total += gradient  # without a float32 copy of the gradient
