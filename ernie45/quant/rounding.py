"""Rounding weights to a packed format with the scales that lose least, instead of the ones that fit the largest weight.

For every group of columns that shares a scale, candidates are tried: the plain one (largest magnitude over 7 or 127),
shrunk ones (clip a few large weights, resolve the many small ones), for 4 bits both signs (the format holds -8 to 7: a
negative scale puts -8 on a positive extreme), and then the least-squares scale of the best rounding, which is rounded
again. The plain candidate is always among them, so that no group gets worse. Scales are float16 from the start.

Shape letters: N rows, K columns, S scale sets, C columns per scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie45.kernels.packed import PackedFormat

_F16_MAX = 65504.0
# What the group's extreme is mapped to, in steps of the scale. Beyond the format's end it is clipped.
_EXTREMES_4 = (*(s * (6.0 + 0.5 * i) for i in range(9) for s in (1.0, -1.0)), -11.0, 11.0)
_EXTREMES_8 = tuple(127.0 * (1 + 0.04 * i) for i in range(1, 6))
_REFINEMENTS = 2
_CHUNK_VALUES = 1 << 19  # 2 MiB of float32 per temporary: it stays in cache and bounds the memory


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A matrix after rounding."""

    values_NK: Tensor
    """int8."""
    scales_NS: Tensor
    """float16."""
    squared_error: float
    """Sum of squared differences to the weights."""
    squared_norm: float
    """Sum of squared weights."""

    @property
    def relative_error(self) -> float:
        """Size of the difference over the size of the weights (Frobenius norms)."""
        return (self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm else 0.0


def quantize(weights_NK: Tensor, format: PackedFormat, importance_K: Tensor | None = None) -> Quantized:
    """Round a matrix of finite weights.

    Args: weights_NK: float32. importance_K: weight of each column in the error that the scales minimise, float32, not
        negative, such as the mean square of its input; None: all equal.
    """
    groups_NSC, importance_SC = _grouped(weights_NK, format, importance_K)
    step = max(1, _CHUNK_VALUES // max(groups_NSC[0].numel() if len(groups_NSC) else 1, 1))
    chunks = [_round_groups(chunk, importance_SC, format) for chunk in groups_NSC.split(step)]
    num_rows, num_columns = weights_NK.shape
    values = torch.cat([values for values, _ in chunks]) if chunks else groups_NSC.to(torch.int8)
    scales = (
        torch.cat([scales for _, scales in chunks]) if chunks else groups_NSC.new_empty(0, groups_NSC.shape[1]).half()
    )
    return measured(weights_NK, values.flatten(1)[:num_rows, :num_columns].contiguous(), scales, format)


def quantize_absmax(weights_NK: Tensor, format: PackedFormat) -> Quantized:
    """Plain rounding: each scale maps the largest magnitude to 7 or 127. The yardstick for `quantize`."""
    groups_NSC, _ = _grouped(weights_NK, format, None)
    scales_NS = _as_f16(groups_NSC.abs().amax(-1) / format.largest)
    values = round_to(groups_NSC, scales_NS[..., None], format).to(torch.int8)
    return measured(weights_NK, values.flatten(1)[:, : weights_NK.shape[1]].contiguous(), scales_NS.half(), format)


def find_scales(groups_NC: Tensor, format: PackedFormat, importance_C: Tensor) -> Tensor:
    """Scales of one group of columns, float32 (N,) that float16 holds exactly."""
    _, scales_NS = _round_groups(groups_NC[:, None], importance_C[None], format)
    return scales_NS[:, 0].float()


def round_to(weights: Tensor, scales: Tensor, format: PackedFormat) -> Tensor:
    """The nearest values of a format, whole numbers in float32; a scale of zero gives zeros."""
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    return (weights * inverse).round_().clamp_(-8 if format.bits == 4 else -127, format.largest)


def measured(weights_NK: Tensor, values_NK: Tensor, scales_NS: Tensor, format: PackedFormat) -> Quantized:
    """Values and scales with the error that they make, summed in float64."""
    squared_error, squared_norm = 0.0, 0.0
    per_scale = format.columns_per_scale(weights_NK.shape[1])
    step = max(1, _CHUNK_VALUES // max(weights_NK.shape[1], 1))
    for start in range(0, weights_NK.shape[0], step):
        rows = slice(start, start + step)
        wide = scales_NS[rows].float().repeat_interleave(per_scale, dim=1)[:, : weights_NK.shape[1]]
        difference = torch.addcmul(weights_NK[rows], values_NK[rows].float(), wide, value=-1)
        squared_error += float(difference.double().square().sum())
        squared_norm += float(weights_NK[rows].double().square().sum())
    return Quantized(values_NK=values_NK, scales_NS=scales_NS, squared_error=squared_error, squared_norm=squared_norm)


def _grouped(weights_NK: Tensor, format: PackedFormat, importance_K: Tensor | None) -> tuple[Tensor, Tensor]:
    """(N, S, C) and (S, C); the padding weighs nothing."""
    per_scale = format.columns_per_scale(weights_NK.shape[1])
    padding = (0, -weights_NK.shape[1] % per_scale)
    importance = weights_NK.new_ones(weights_NK.shape[1]) if importance_K is None else importance_K
    return F.pad(weights_NK, padding).unflatten(1, (-1, per_scale)), F.pad(importance, padding).view(-1, per_scale)


def _round_groups(groups_NSC: Tensor, importance_SC: Tensor, format: PackedFormat) -> tuple[Tensor, Tensor]:
    """Values int8 (N, S, C) and scales float16 (N, S) of the best candidate of every group."""
    magnitude_NS, where_NS = groups_NSC.abs().max(-1)
    extreme_NS = groups_NSC.gather(-1, where_NS[..., None])[..., 0]
    best_scale = _as_f16(magnitude_NS / format.largest)
    best_values = round_to(groups_NSC, best_scale[..., None], format)
    best_error = _weighted_error(groups_NSC, best_values, best_scale, importance_SC)

    def consider(scale_NS: Tensor) -> None:
        nonlocal best_scale, best_values, best_error
        values = round_to(groups_NSC, scale_NS[..., None], format)
        error = _weighted_error(groups_NSC, values, scale_NS, importance_SC)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale_NS, best_scale)
        best_values = torch.where(better[..., None], values, best_values)

    for steps in _EXTREMES_4 if format.bits == 4 else _EXTREMES_8:
        consider(_as_f16(extreme_NS / steps))
    for _ in range(_REFINEMENTS):
        weighted = best_values * importance_SC
        power = (weighted * best_values).sum(-1)
        consider(_as_f16(torch.where(power > 0, (weighted * groups_NSC).sum(-1) / power, best_scale)))
    return best_values.to(torch.int8), best_scale.half()


def _weighted_error(groups_NSC: Tensor, values: Tensor, scale_NS: Tensor, importance_SC: Tensor) -> Tensor:
    difference = torch.addcmul(groups_NSC, values, scale_NS[..., None], value=-1)
    return difference.square_().mul_(importance_SC).sum(-1)


def _as_f16(scales: Tensor) -> Tensor:
    """The values that float16 will hold, kept in float32."""
    return scales.clamp(-_F16_MAX, _F16_MAX).half().float()
