"""Rounding weights to a packed format with the scales that lose least, instead of the ones that fit the largest weight.

For every group of columns that shares a scale, candidates are tried: the plain one (largest magnitude over 7 or 127),
shrunk ones (clip a few large weights, resolve the many small ones), for 4 bits both signs (the format holds -8 to 7: a
negative scale puts -8 on a positive extreme), and then the least-squares scale of the best rounding, which is rounded
again. Where a scale comes with a minimum, the plain candidate spans smallest to largest weight, the others shrink that
span, and least squares fits both. The plain candidate is always among them, so that no group gets worse. Scales and
minima are float16 from the start.

Shape letters: N rows, K columns, S scale sets, C columns per scale. Scales are (..., S), or (..., S, 2) with minima.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie45.kernels.packed import PackedFormat, restore

_F16_MAX = 65504.0
# What the group's extreme is mapped to, in steps of the scale. Beyond the format's end it is clipped.
_EXTREMES_4 = (*(s * (6.0 + 0.5 * i) for i in range(9) for s in (1.0, -1.0)), -11.0, 11.0)
_EXTREMES_8 = tuple(127.0 * (1 + 0.04 * i) for i in range(1, 6))
_SPANS = tuple(1 - 0.025 * i for i in range(1, 13))  # of the range from smallest to largest, where there is a minimum
_REFINEMENTS = 2
_CHUNK_VALUES = 1 << 19  # 2 MiB of float32 per temporary: it stays in cache and bounds the memory


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A matrix after rounding."""

    values_NK: Tensor
    """int8."""
    scales: Tensor
    """float16, of shape `format.scale_shape`."""
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
    chunks = list(_round_chunks(weights_NK, format, importance_K))
    num_columns = weights_NK.shape[1]
    values_NK = torch.cat([values.to(torch.int8).flatten(1) for values, _ in chunks])[:, :num_columns].contiguous()
    return measured(weights_NK, values_NK, torch.cat([scales for _, scales in chunks]).half(), format)


def find_scales(weights_NK: Tensor, format: PackedFormat, importance_K: Tensor) -> Tensor:
    """The scales that `quantize` finds, float32 of shape `format.scale_shape`."""
    return torch.cat([scales for _, scales in _round_chunks(weights_NK, format, importance_K)])


def _round_chunks(
    weights_NK: Tensor, format: PackedFormat, importance_K: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Values and scales of one chunk of rows after the other."""
    groups_NSC, importance_SC = _grouped(weights_NK, format, importance_K)
    for chunk in groups_NSC.split(_rows_at_a_time(groups_NSC)):
        yield _round_groups(chunk, importance_SC, format)


def quantize_absmax(weights_NK: Tensor, format: PackedFormat) -> Quantized:
    """Plain rounding: each group's extremes map to the ends of the format. The yardstick for `quantize`."""
    return measured(weights_NK, *round_absmax(weights_NK, format), format)


def round_absmax(weights_NK: Tensor, format: PackedFormat) -> tuple[Tensor, Tensor]:
    """What `quantize_absmax` gives, unmeasured: values, int8 (N, K), and scales, float16 of shape `format.scale_shape`."""
    groups_NSC, _ = _grouped(weights_NK, format, None)
    values_NSC = torch.empty(groups_NSC.shape, dtype=torch.int8)
    scales = []
    step = _rows_at_a_time(groups_NSC)
    for into, groups in zip(values_NSC.split(step), groups_NSC.split(step), strict=True):
        scales.append(_plain_scales(groups, format))
        into.copy_(round_to(groups, scales[-1], format))
    return values_NSC.flatten(1)[:, : weights_NK.shape[1]].contiguous(), torch.cat(scales).half()


def round_to(weights: Tensor, scales: Tensor, format: PackedFormat) -> Tensor:
    """The nearest values of a format, whole numbers in float32; a scale of zero gives the value that stands for the minimum or 0.

    Args: weights: (..., C). scales: (...), or (..., 2) with minima.
    """
    scale, minimum = _parts(scales, format)
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    if minimum is None:
        return (weights * inverse).round_().clamp_(format.smallest, format.largest)
    steps = (weights - minimum).mul_(inverse).round_().clamp_(0, format.largest - format.smallest)
    return steps.add_(format.smallest)


def value_of(values: Tensor, scales: Tensor, format: PackedFormat) -> Tensor:
    """The weights that values stand for, of the shapes of `round_to`."""
    scale, minimum = _parts(scales, format)
    return values * scale if minimum is None else (values - format.smallest) * scale + minimum


def _parts(scales: Tensor, format: PackedFormat) -> tuple[Tensor, Tensor | None]:
    if format.has_minima:
        return scales[..., :1], scales[..., 1:]
    return scales[..., None], None


def measured(weights_NK: Tensor, values_NK: Tensor, scales: Tensor, format: PackedFormat) -> Quantized:
    """Values and scales with the error that they make, summed in float64."""
    squared_error, squared_norm = 0.0, 0.0
    step = max(1, _CHUNK_VALUES // max(weights_NK.shape[1], 1))
    for start in range(0, weights_NK.shape[0], step):
        rows = slice(start, start + step)
        difference = weights_NK[rows] - restore(values_NK[rows], scales[rows], format)
        squared_error += float(difference.double().square().sum())
        squared_norm += float(weights_NK[rows].double().square().sum())
    return Quantized(values_NK=values_NK, scales=scales, squared_error=squared_error, squared_norm=squared_norm)


def _rows_at_a_time(groups_NSC: Tensor) -> int:
    return max(1, _CHUNK_VALUES // max(groups_NSC.shape[1] * groups_NSC.shape[2], 1))


def _grouped(weights_NK: Tensor, format: PackedFormat, importance_K: Tensor | None) -> tuple[Tensor, Tensor]:
    """(N, S, C) and (S, C); the padding weighs nothing."""
    columns = weights_NK.shape[1]
    per_scale = format.columns_per_scale(columns)
    padding = (0, format.scale_sets(columns) * per_scale - columns)
    importance = weights_NK.new_ones(columns) if importance_K is None else importance_K
    # Padding copies, even by nothing.
    padded_NK = F.pad(weights_NK, padding) if padding[1] else weights_NK
    return padded_NK.unflatten(1, (-1, per_scale)), F.pad(importance, padding).view(-1, per_scale)


def _plain_scales(groups_NSC: Tensor, format: PackedFormat) -> Tensor:
    if format.has_minima:
        smallest, largest = groups_NSC.aminmax(dim=-1)
        return as_f16(torch.stack(((largest - smallest) / (format.largest - format.smallest), smallest), dim=-1))
    return as_f16(groups_NSC.abs().amax(-1) / format.largest)


def _round_groups(groups_NSC: Tensor, importance_SC: Tensor, format: PackedFormat) -> tuple[Tensor, Tensor]:
    """Values (N, S, C) and scales, both float32, of the best candidate of every group."""
    best_scales = _plain_scales(groups_NSC, format)
    best_error = _weighted_error(groups_NSC, best_scales, importance_SC, format)

    def consider(scales: Tensor) -> None:
        nonlocal best_scales, best_error
        error = _weighted_error(groups_NSC, scales, importance_SC, format)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better[..., None] if format.has_minima else better, scales, best_scales)

    for scales in _candidates(groups_NSC, format):
        consider(scales)
    for _ in range(_REFINEMENTS):
        fit = _fit_line if format.has_minima else _fit_scale
        consider(fit(groups_NSC, round_to(groups_NSC, best_scales, format), best_scales, importance_SC))
    return round_to(groups_NSC, best_scales, format), best_scales


def _candidates(groups_NSC: Tensor, format: PackedFormat) -> Iterator[Tensor]:
    """Scales to try beside the plain ones."""
    if format.has_minima:
        smallest, largest = groups_NSC.aminmax(dim=-1)
        steps = format.largest - format.smallest
        for span in _SPANS:
            # Shrunk from both ends, and from each alone: a skewed group has its outlier on one side.
            for low, high in ((span, span), (span, 1.0), (1.0, span)):
                yield as_f16(torch.stack(((largest * high - smallest * low) / steps, smallest * low), dim=-1))
        return
    where_NS1 = groups_NSC.abs().argmax(-1, keepdim=True)
    extreme_NS = groups_NSC.gather(-1, where_NS1)[..., 0]
    for steps_to_extreme in _EXTREMES_4 if format.bits == 4 else _EXTREMES_8:
        yield as_f16(extreme_NS / steps_to_extreme)


def _fit_scale(groups_NSC: Tensor, values: Tensor, scales_NS: Tensor, importance_SC: Tensor) -> Tensor:
    """The least-squares scale of given values."""
    weighted = values * importance_SC
    power = (weighted * values).sum(-1)
    return as_f16(torch.where(power > 0, (weighted * groups_NSC).sum(-1) / power, scales_NS))


def _fit_line(groups_NSC: Tensor, values: Tensor, scales_NS2: Tensor, importance_SC: Tensor) -> Tensor:
    """The least-squares scale and minimum of given values: a straight line through the weights over their codes."""
    codes = values + 8
    total_S = importance_SC.sum(-1)
    mean_code, mean_weight = ((importance_SC * x).sum(-1) / total_S.clamp(min=1e-30) for x in (codes, groups_NSC))
    centred = (codes - mean_code[..., None]) * importance_SC
    power = (centred * codes).sum(-1)
    scale = torch.where(power > 0, (centred * groups_NSC).sum(-1) / power, scales_NS2[..., 0])
    # float16 rounds the scale; the minimum is fitted to what is left.
    scale = as_f16(scale)
    return as_f16(torch.stack((scale, mean_weight - scale * mean_code), dim=-1))


def _weighted_error(groups_NSC: Tensor, scales: Tensor, importance_SC: Tensor, format: PackedFormat) -> Tensor:
    """(N, S). Many candidates come through here: everything happens in one temporary, which stays in cache."""
    errors = round_to(groups_NSC, scales, format)
    scale, minimum = _parts(scales, format)
    if minimum is None:
        errors.mul_(scale)
    else:
        errors.sub_(format.smallest).mul_(scale).add_(minimum)
    errors.sub_(groups_NSC).square_()
    return torch.einsum("nsc,sc->ns", errors, importance_SC)


def as_f16(scales: Tensor) -> Tensor:
    """The values that float16 will hold, kept in float32."""
    return scales.clamp(-_F16_MAX, _F16_MAX).half().float()
