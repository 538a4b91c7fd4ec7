"""GPTQ: round a matrix column by column, and let the later columns make up for each column's error.

Shape letters: N rows (outputs), K columns (inputs). Source: inference reference 1.6 (Frantar et al., 2022). With H the
second moment of the inputs, the output error of a column's rounding error e is least when columns j behind column i are
moved by `-e_i / U_ii * U_ij`, U the upper Cholesky factor of the inverse of H. Scales of a group of columns are
searched when the first of them is reached, on the weights as they have become by then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ernie45.errors import CapacityError
from ernie45.kernels.packed import PackedFormat
from ernie45.quant.rounding import Quantized, find_scales, measured, quantize, round_to, value_of

_BLOCK = 64  # columns whose corrections are applied to the rest of the matrix in one product
_DAMPING = 0.01  # of the mean diagonal of H
_MAX_DAMPING = 1.0


def gptq(weights_NK: Tensor, hessian_KK: Tensor, format: PackedFormat) -> Quantized:
    """Round a matrix so that its outputs, not its weights, change least.

    Args: weights_NK: float32, finite. hessian_KK: sum or mean of x x^T over inputs, float32; its size does not matter.
    Returns: values, scales and the error against the weights, which is above that of plain rounding on purpose.
    Raises: CapacityError if H holds no usable statistics.
    """
    num_columns = weights_NK.shape[1]
    factor_KK = inverse_factor(hessian_KK)
    importance_K = hessian_KK.diagonal().clamp(min=0)
    importance_K = importance_K + _DAMPING * importance_K.mean()
    work = weights_NK.clone()
    values = torch.empty(weights_NK.shape, dtype=torch.int8)
    per_scale = format.columns_per_scale(num_columns)
    block = min(_BLOCK, per_scale)
    # One scale for the whole row is needed before any column is final: it comes from the search over the whole row.
    whole_row = per_scale >= num_columns and not format.has_minima
    scales = quantize(weights_NK, format, importance_K).scales.float()
    for start in range(0, num_columns, block):
        end = min(start + block, num_columns)
        group = start // per_scale
        if start % per_scale == 0 and not whole_row:
            columns = slice(start, min(start + per_scale, num_columns))
            scales[:, group] = find_scales(work[:, columns], format, importance_K[columns])
        errors = _round_block(
            work[:, start:end], values[:, start:end], factor_KK[start:end, start:end], scales[:, group], format
        )
        work[:, end:] -= errors @ factor_KK[start:end, end:]
    return measured(weights_NK, values, scales.half(), format)


def inverse_factor(hessian_KK: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of H, damped until it exists. Raises: CapacityError if it never does."""
    hessian = hessian_KK.double()
    mean = float(hessian.diagonal().mean())
    damping = _DAMPING
    while mean > 0 and damping <= _MAX_DAMPING:
        damped = hessian + damping * mean * torch.eye(len(hessian), dtype=torch.float64)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper.float()
        damping *= 10
    raise CapacityError(f"calibration gave no usable input statistics (mean square {mean}): use another, longer text")


def _round_block(work_NB: Tensor, values_NB: Tensor, factor_BB: Tensor, scales: Tensor, format: PackedFormat) -> Tensor:
    """Round the columns of a block in order, in place; returns each column's error over its pivot, (N, B)."""
    columns = work_NB.T.contiguous()  # a column is then one run of memory
    errors = torch.empty_like(columns)
    for i in range(len(columns)):
        rounded_N1 = round_to(columns[i, :, None], scales, format)
        values_NB[:, i] = rounded_N1[:, 0].to(torch.int8)
        errors[i] = (columns[i] - value_of(rounded_N1, scales, format)[:, 0]) / factor_BB[i, i]
        columns[i + 1 :].addr_(factor_BB[i, i + 1 :], errors[i], alpha=-1)
    return errors.T
