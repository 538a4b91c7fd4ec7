"""The activation between the two matrices of a feed-forward block, `silu(gate) * up`, and its backward pass, in one pass over memory.

Shape letters: T tokens, I feed-forward width, J = 2 I: gate first, then up. The native twin is in `csrc/kernels/swiglu.cpp` and takes
contiguous float32 tensors on the CPU; whatever else training has (narrow or wide dtypes, strided rows, other devices) runs on PyTorch.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.kernels.choice import native


def swiglu(products_TJ: Tensor, out_TI: Tensor | None = None) -> Tensor:
    """`silu(gate) * up`, (T, I), written to `out_TI` if that is given; without a gradient.

    Raises: ShapeError unless rows have an even number of values, half as many as those of `out_TI`.
    """
    _check("swiglu", products_TJ, out_TI)
    if out_TI is None:
        out_TI = products_TJ.new_empty(len(products_TJ), products_TJ.shape[1] // 2)
    extension = _native_for(products_TJ, out_TI)
    if extension is None:
        return swiglu_reference(products_TJ, out_TI)
    extension.swiglu(products_TJ.detach(), out_TI)
    return out_TI


def swiglu_backward(
    products_TJ: Tensor,
    d_hidden_TI: Tensor,
    weights_T: Tensor | None = None,
    dots_T: Tensor | None = None,
    out_TJ: Tensor | None = None,
) -> Tensor:
    """Gradient of the products, (T, J), for `weight * hidden` with `hidden = silu(gate) * up`; the weight is 1 without weights.

    Args: d_hidden_TI: gradient of `weight * hidden`; afterwards it holds `weight * hidden`. dots_T: receives the gradient of the
        weights, `sum_I(hidden * d_hidden)`. out_TJ: where the result is written; new memory without it.
    Raises: ShapeError if shapes do not fit.
    """
    _check("swiglu_backward", products_TJ, d_hidden_TI, weights_T, dots_T)
    if out_TJ is None:
        out_TJ = torch.empty_like(products_TJ, memory_format=torch.contiguous_format)
    extension = _native_for(products_TJ, d_hidden_TI, out_TJ, weights_T, dots_T)
    if extension is None:
        return swiglu_backward_reference(products_TJ, d_hidden_TI, weights_T, dots_T, out_TJ)
    extension.swiglu_backward(products_TJ.detach(), d_hidden_TI, out_TJ, weights_T, dots_T)
    return out_TJ


def swiglu_reference(products_TJ: Tensor, out_TI: Tensor) -> Tensor:
    """What `swiglu` computes; differs from the native twin by the rounding of the exponential."""
    gate, up = products_TJ.chunk(2, dim=-1)
    return torch.ops.aten.silu.out(gate, out=out_TI).mul_(up)


def swiglu_backward_reference(
    products_TJ: Tensor, d_hidden_TI: Tensor, weights_T: Tensor | None, dots_T: Tensor | None, out_TJ: Tensor
) -> Tensor:
    """What `swiglu_backward` computes; differs from the native twin by the exponential and the order of the sums."""
    gate, up = products_TJ.chunk(2, dim=-1)
    silu = F.silu(gate)
    hidden = silu * up
    if dots_T is not None:  # a product sums rows ten times as fast as a reduction
        torch.mv(hidden * d_hidden_TI, hidden.new_ones(hidden.shape[1]), out=dots_T)
    if weights_T is not None:
        hidden.mul_(weights_T[:, None])
        d_hidden_TI.mul_(weights_T[:, None])
    d_gate, d_up = out_TJ.chunk(2, dim=-1)
    torch.mul(d_hidden_TI, silu, out=d_up)
    torch.ops.aten.silu_backward.grad_input(d_hidden_TI.mul_(up), gate, grad_input=d_gate)
    d_hidden_TI.copy_(hidden)
    return out_TJ


def _native_for(*tensors: Tensor | None) -> ModuleType | None:
    """The native module if it is in use and takes such tensors."""
    fits = all(t is None or (t.dtype is torch.float32 and t.is_cpu and t.is_contiguous()) for t in tensors)
    return native() if fits else None


def _check(operation: str, products_TJ: Tensor, hidden_TI: Tensor | None, *per_token: Tensor | None) -> None:
    if products_TJ.ndim != 2 or products_TJ.shape[1] % 2:
        raise ShapeError(f"[{operation}] products: expected (T, 2 I), got {tuple(products_TJ.shape)}")
    num_tokens, width = len(products_TJ), products_TJ.shape[1] // 2
    for tensor, shape in ((hidden_TI, (num_tokens, width)), *((t, (num_tokens,)) for t in per_token)):
        if tensor is not None and tensor.shape != shape:
            raise ShapeError(
                f"[{operation}] expected {shape} beside products of {tuple(products_TJ.shape)}, got {tuple(tensor.shape)}"
            )
