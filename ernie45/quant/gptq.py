"""GPTQ and what refines it: round a matrix so that its outputs on a text change least.

With H the second moment of the inputs and E the rounding errors, the squared change of the outputs is tr(E H E^T).
1. Write H = M D M^T, M unit upper triangular, D diagonal. The change is then the sum over columns k of
   D_k (e_k + sum of e_j M_jk over the columns j before it)^2: each column makes up for the errors before it, and an error
   of its own costs D_k. This is GPTQ (inference reference 1.6; Frantar et al., 2022) in the form of Chee et al., 2023
   (QuIP), which needs no inverse of H. Scales are chosen before, for errors weighted with D. Columns with large inputs come
   first, as most columns are left then to make up for them.
2. Sweeps go through the columns again, with all others in place, and give each the value that is best by the gradient
   H E^T; before that, a group of up to 64 columns gets the scale (and minimum) that is best for its values. No step
   increases the change, but for the rounding of scales to float16.

Shape letters: N rows (outputs), K columns (inputs), S scale sets, B columns of a block. Everything is transposed inside, so
that a column is one run of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ernie45.errors import CapacityError
from ernie45.kernels.packed import GROUP, PackedFormat
from ernie45.quant.rounding import Quantized, as_f16, find_scales, measured

_BLOCK = GROUP  # columns whose corrections reach the rest of the matrix in one product
_STRIP = 16  # columns of a block whose corrections reach the rest of the block in one product
_SWEEPS = 3
_DAMPING = 0.01  # of the mean diagonal of H
_MAX_DAMPING = 1.0
_SHIFT_DAMPING = 0.1  # of a least-squares fit; measured on the default model, 0.001 to 0.1: the more the better


def gptq(
    weights_NK: Tensor,
    hessian_KK: Tensor,
    format: PackedFormat,
    *,
    target_NK: Tensor | None = None,
    sweeps: int = _SWEEPS,
) -> Quantized:
    """Round a matrix so that its outputs, not its weights, change least.

    Args: weights_NK: float32, finite. hessian_KK: sum or mean of x x^T over inputs, float32; its size does not matter.
        target_NK: what to come close to instead of the weights, see `shifted_target`. sweeps: how often to refine.
    Returns: values, scales and the error against the weights, which is above that of plain rounding on purpose.
    Raises: CapacityError if H holds no usable statistics.
    """
    goal_KN = (weights_NK if target_NK is None else target_NK).T.contiguous()
    order = hessian_KK.diagonal().argsort(descending=True, stable=True)
    mixing_KK, cost_K = factor(hessian_KK[order][:, order])
    importance_K = torch.empty_like(cost_K).index_copy_(0, order, cost_K)
    grid = _Grid.of(find_scales(goal_KN.T, format, importance_K), format, len(goal_KN))
    codes_KN = torch.empty_like(goal_KN)
    codes_KN[order] = _round_in_order(goal_KN[order], mixing_KK, grid, (order // grid.per_scale).tolist())
    _refine(codes_KN, goal_KN, damped(hessian_KK), grid, sweeps)
    values_NK = (codes_KN + format.smallest).T.to(torch.int8).contiguous()
    return measured(weights_NK, values_NK, grid.scales(), format)


def shifted_target(weights_NK: Tensor, moments_KK: Tensor, shift_KK: Tensor, tokens: int) -> Tensor:
    """The matrix that makes of a network's inputs x what W makes of the inputs x' that it should get, by least squares.

    A fit of K unknowns to few tokens finds a part of K / tokens of what is not there; the way from W to the fit is
    shortened by that.

    Args: moments_KK: sum of x x^T. shift_KK: sum of (x' - x) x^T. tokens: in these sums.
    """
    trust = 1 - len(moments_KK) / max(tokens, 1)
    if trust <= 0:
        return weights_NK
    lower, failed = torch.linalg.cholesky_ex(damped(moments_KK, _SHIFT_DAMPING).double())
    if failed:
        return weights_NK
    step_NK = torch.cholesky_solve((weights_NK @ shift_KK).T.double(), lower).T.float()
    return weights_NK + trust * step_NK


def factor(hessian_KK: Tensor) -> tuple[Tensor, Tensor]:
    """M (K, K) and D (K,) with M D M^T = H, M unit upper triangular; H is damped until they exist.

    Raises: CapacityError if they never do.
    """
    damping = _DAMPING
    while float(hessian_KK.diagonal().mean()) > 0 and damping <= _MAX_DAMPING:
        # Float32 is enough for most; float64 takes four times as long.
        for dtype in (torch.float32, torch.float64):
            flipped = damped(hessian_KK.to(dtype), damping).flip(0, 1)
            lower, failed = torch.linalg.cholesky_ex(flipped)
            if not failed:
                upper = lower.flip(0, 1).float()  # upper upper^T = H
                pivots = upper.diagonal()
                return upper / pivots, pivots.square()
        damping *= 10
    mean = float(hessian_KK.diagonal().mean())
    raise CapacityError(f"calibration gave no usable input statistics (mean square {mean}): use another, longer text")


def damped(hessian_KK: Tensor, damping: float = _DAMPING) -> Tensor:
    """H with a share of its mean diagonal added to its diagonal: few tokens say little about rare directions."""
    diagonal = hessian_KK.diagonal()
    result = hessian_KK.clone()
    result.diagonal().copy_(diagonal + damping * diagonal.mean())
    return result


class _Grid:
    """Scales of a matrix while they are worked on: weight = base + code * scale, codes from 0 to `top`."""

    def __init__(self, scale_SN: Tensor, base_SN: Tensor, format: PackedFormat, columns: int) -> None:
        self.scale_SN, self.base_SN, self.format = scale_SN, base_SN, format
        self.per_scale = format.columns_per_scale(columns)
        self.top = float(format.largest - format.smallest)

    @classmethod
    def of(cls, scales: Tensor, format: PackedFormat, columns: int) -> _Grid:
        """From scales of shape `format.scale_shape`."""
        if format.has_minima:
            scale_SN, base_SN = scales.float().permute(2, 1, 0).contiguous()
        else:
            scale_SN = scales.float().T.contiguous()
            base_SN = scale_SN * format.smallest
        return cls(scale_SN, base_SN, format, columns)

    def scales(self) -> Tensor:
        """The scales as the format holds them, float16."""
        scale_NS = self.scale_SN.T.contiguous().half()
        return torch.stack((scale_NS, self.base_SN.T.half()), dim=-1) if self.format.has_minima else scale_NS

    def weights(self, codes_KN: Tensor) -> Tensor:
        """What codes stand for, (K, N)."""
        scale_KN, base_KN = (
            x.repeat_interleave(self.per_scale, 0)[: len(codes_KN)] for x in (self.scale_SN, self.base_SN)
        )
        return base_KN + codes_KN * scale_KN

    def refit(self, idx: int, codes_BN: Tensor, gradient_BN: Tensor, hessian_BB: Tensor) -> Tensor:
        """Give a set the scale (and minimum) that are best for its codes with all other columns in place.

        Args: codes_BN: of all its columns. gradient_BN: of them, H E^T. Returns: change of the weights, (B, N).
        """
        if not self.format.has_minima:
            values_BN = codes_BN + self.format.smallest
            step_N = (values_BN * gradient_BN).sum(0) / (values_BN * (hessian_BB @ values_BN)).sum(0)
            return self._move(idx, codes_BN, step_N, step_N * self.format.smallest)
        # Least squares in two unknowns: codes and a column of ones.
        product_BN, ones = hessian_BB @ codes_BN, hessian_BB.sum()
        power_N, cross_N = (codes_BN * product_BN).sum(0), product_BN.sum(0)
        right_N, right_ones_N = (codes_BN * gradient_BN).sum(0), gradient_BN.sum(0)
        step_N = (right_N * ones - right_ones_N * cross_N) / (power_N * ones - cross_N.square())
        return self._move(idx, codes_BN, step_N, (right_ones_N - step_N * cross_N) / ones)

    def _move(self, idx: int, codes_BN: Tensor, scale_step_N: Tensor, base_step_N: Tensor) -> Tensor:
        scale_N, base_N = self.scale_SN[idx], self.base_SN[idx]
        fits = scale_step_N.isfinite()  # else all codes are equal, or all zero: nothing to fit
        moved_N = torch.where(fits, as_f16(scale_N + scale_step_N), scale_N)
        if self.format.has_minima:
            moved_base_N = torch.where(fits, as_f16(base_N + base_step_N), base_N)
        else:
            moved_base_N = moved_N * self.format.smallest
        change_BN = (moved_base_N - base_N) + codes_BN * (moved_N - scale_N)
        self.scale_SN[idx], self.base_SN[idx] = moved_N, moved_base_N
        return change_BN


def _inverse(scale: Tensor) -> Tensor:
    """A scale of zero gives code 0."""
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def _round_in_order(goal_KN: Tensor, mixing_KK: Tensor, grid: _Grid, sets: list[int]) -> Tensor:
    """Codes (K, N) of columns in the order of the arguments; `sets` holds the scale set of each."""
    num_columns, num_rows = goal_KN.shape
    inverse_SN = _inverse(grid.scale_SN)
    work_KN, codes_KN = goal_KN.clone(), torch.empty_like(goal_KN)
    for start in range(0, num_columns, _BLOCK):
        end = min(start + _BLOCK, num_columns)
        errors_BN = torch.empty(end - start, num_rows)
        for first in range(start, end, _STRIP):
            last = min(first + _STRIP, end)
            for k in range(first, last):
                scale_N, base_N, error_N = grid.scale_SN[sets[k]], grid.base_SN[sets[k]], errors_BN[k - start]
                code_N = torch.sub(work_KN[k], base_N, out=codes_KN[k])
                code_N.mul_(inverse_SN[sets[k]]).round_().clamp_(0, grid.top)
                torch.sub(goal_KN[k], base_N, out=error_N).addcmul_(code_N, scale_N, value=-1)
                work_KN[k + 1 : last].addmm_(mixing_KK[k, k + 1 : last, None], error_N[None])
            work_KN[last:end].addmm_(mixing_KK[first:last, last:end].T, errors_BN[first - start : last - start])
        work_KN[end:].addmm_(mixing_KK[start:end, end:].T, errors_BN)
    return codes_KN


def _refine(codes_KN: Tensor, goal_KN: Tensor, hessian_KK: Tensor, grid: _Grid, sweeps: int) -> None:
    """Sweep over codes and scales, in place."""
    block = min(_BLOCK, grid.per_scale)
    gradient_KN = hessian_KK @ (goal_KN - grid.weights(codes_KN))
    for _ in range(sweeps):
        for start in range(0, len(goal_KN), block):
            here, idx = slice(start, start + block), start // grid.per_scale
            hessian_BB, codes_BN, gradient_BN = hessian_KK[here, here], codes_KN[here], gradient_KN[here].clone()
            change_BN = torch.zeros_like(codes_BN)
            if block == grid.per_scale:
                change_BN += grid.refit(idx, codes_BN, gradient_BN, hessian_BB)
                gradient_BN -= hessian_BB @ change_BN
            _round_by_gradient(codes_BN, gradient_BN, change_BN, hessian_BB, grid.scale_SN[idx], grid.top)
            gradient_KN.addmm_(hessian_KK[:, here], change_BN, alpha=-1)


def _round_by_gradient(
    codes_BN: Tensor, gradient_BN: Tensor, change_BN: Tensor, hessian_BB: Tensor, scale_N: Tensor, top: float
) -> None:
    """Give every column of a block its best codes with all other columns in place; adds to the change of the weights."""
    inverse_N, steps = _inverse(scale_N), (1 / hessian_BB.diagonal()).tolist()
    for i, step in enumerate(steps):
        best_N = torch.addcmul(codes_BN[i], gradient_BN[i], inverse_N, value=step).round_().clamp_(0, top)
        moved_N = (best_N - codes_BN[i]).mul_(scale_N)
        codes_BN[i] = best_N
        change_BN[i] += moved_N
        gradient_BN[i + 1 :].addmm_(hessian_BB[i + 1 :, i, None], moved_N[None], alpha=-1)
