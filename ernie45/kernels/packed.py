"""Packed matrices: 8- or 4-bit weights in the order in which the kernels stream them, and the products with them.

Shape letters: T tokens, N rows (outputs), K columns (inputs), G groups of 64 columns, S weight-scale sets. Scales of a matrix are
(N, S), or (N, S, 2) where every scale comes with a minimum.

Every operation here is a specification in plain PyTorch (`*_reference`), a native twin in `csrc/kernels/packed_ops.cpp`, and a
function that chooses. Activations are rounded to 8 or 16 bits per token and group of 64 columns; a group's product is exact
in integers, and groups are added in float32 in ascending order. Layout and formula: `csrc/kernels/packed.hpp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.kernels.choice import native

ROWS = 16
"""Rows of a block."""
GROUP = 64
"""Columns that share an activation scale; weight groups are multiples of it, or a half of it with a minimum."""
HALF = GROUP // 2
# 32512 = 127 * 256: the high byte of the value still fits 8 signed bits.
_LARGEST_ACTIVATION = {8: 127.0, 16: 32512.0}
_SMALLEST = 1e-30  # groups below it count as zero: the inverse of their scale could overflow


@dataclass(frozen=True, kw_only=True)
class PackedFormat:
    """Width of the weights, how many columns share a scale, and how the activations are rounded that meet them."""

    bits: Literal[4, 8]
    group: int
    """A multiple of 64; 0 = one scale for the whole row; 32 with 4 bits: every 32 columns have a scale and a minimum."""
    activation_bits: Literal[8, 16] = 8
    """16 loses nothing that counts; 8 is up to twice as fast where arithmetic bounds, as in long prompts."""

    def __post_init__(self) -> None:
        group_fits = self.has_minima or (self.group >= 0 and self.group % GROUP == 0)
        if self.bits not in (4, 8) or not group_fits or self.activation_bits not in (8, 16):
            raise ShapeError(
                f"packed format has {self.bits} bits in groups of {self.group} and activations of {self.activation_bits} "
                "bits: expected 4 or 8, a multiple of 64 (or 32 with 4 bits), 8 or 16"
            )

    @property
    def has_minima(self) -> bool:
        """Whether weight = (value + 8) * scale + minimum, instead of value * scale."""
        return self.bits == 4 and self.group == HALF

    @property
    def smallest(self) -> int:
        """The smallest quantized value: -8 or -127."""
        return -8 if self.bits == 4 else -127

    @property
    def largest(self) -> int:
        """The largest quantized value: 7 or 127."""
        return 2 ** (self.bits - 1) - 1

    def columns_per_scale(self, columns: int) -> int:
        """Columns that share a scale in a matrix of that many columns."""
        return self.group or _round_up(columns, GROUP)

    def scale_sets(self, columns: int) -> int:
        """Scales per row; of each half of the last group where the group is 32."""
        return -(-_round_up(columns, GROUP) // self.columns_per_scale(columns))

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of the scales of a matrix, (N, S) or (N, S, 2)."""
        shape = (rows, self.scale_sets(columns))
        return (*shape, 2) if self.has_minima else shape

    def weight_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the packed weights, padding included."""
        return _round_up(rows, ROWS) * _round_up(columns, GROUP) * self.bits // 8

    def num_scales(self, rows: int, columns: int) -> int:
        """Number of packed scales and minima, padding included."""
        return _round_up(rows, ROWS) * self.scale_sets(columns) * (2 if self.has_minima else 1)


@dataclass(frozen=True, kw_only=True)
class PackedMatrix:
    """A matrix of N rows and K columns in kernel layout."""

    weights: Tensor
    """uint8, `format.weight_bytes(rows, columns)` of them."""
    scales: Tensor
    """float16, `format.num_scales(rows, columns)` of them."""
    rows: int
    columns: int
    format: PackedFormat = field(default_factory=lambda: PackedFormat(bits=8, group=0))

    def __post_init__(self) -> None:
        expected = (
            (self.format.weight_bytes(self.rows, self.columns),),
            (self.format.num_scales(self.rows, self.columns),),
        )
        if (tuple(self.weights.shape), tuple(self.scales.shape)) != expected:
            raise ShapeError(
                f"packed matrix ({self.rows}, {self.columns}) in {self.format}: weights and scales have shapes "
                f"{tuple(self.weights.shape)} and {tuple(self.scales.shape)}, expected {expected[0]} and {expected[1]}"
            )
        if self.weights.dtype != torch.uint8 or self.scales.dtype != torch.float16:
            raise ShapeError(
                f"packed matrix holds {self.weights.dtype} and {self.scales.dtype}, expected uint8 and float16"
            )

    @property
    def size_bytes(self) -> int:
        """Bytes that a product with one token moves."""
        return self.weights.numel() + 2 * self.scales.numel()

    @cached_property
    def native(self) -> Any:
        """The native object; it points into `weights` and `scales`."""
        extension = native()
        assert extension is not None, "asked for without the native module"
        return extension.PackedMatrix(
            self.weights,
            self.scales.view(torch.uint16),
            self.rows,
            self.columns,
            self.format.bits,
            self.format.columns_per_scale(self.columns),
            self.format.activation_bits,
        )


def pack(values_NK: Tensor, scales: Tensor, format: PackedFormat) -> PackedMatrix:
    """Bring quantized values into kernel layout.

    Args: values_NK: int8, within -8 to 7 or -127 to 127. scales: of shape `format.scale_shape`; rounded to float16.
    Raises: ShapeError for values out of range or scales of the wrong shape.
    """
    rows, columns = values_NK.shape
    if values_NK.numel() and (int(values_NK.min()) < format.smallest or int(values_NK.max()) > format.largest):
        raise ShapeError(
            f"quantized values run from {int(values_NK.min())} to {int(values_NK.max())}, {format} holds {format.smallest} to "
            f"{format.largest}"
        )
    if scales.shape != format.scale_shape(rows, columns):
        raise ShapeError(f"scales have shape {tuple(scales.shape)}, expected {format.scale_shape(rows, columns)}")
    padding = (0, -columns % GROUP, 0, -rows % ROWS)
    padded_NK = F.pad(values_NK, padding) if any(padding) else values_NK.contiguous()
    codes = padded_NK.view(torch.uint8) + 2 ** (
        format.bits - 1
    )  # modulo 256: a negative value's byte wraps to its code
    blocks, groups = codes.shape[0] // ROWS, codes.shape[1] // GROUP
    if format.bits == 8:  # four codes at a time, which are four bytes of a wider number
        fours = codes.view(torch.int32).view(blocks, ROWS, groups, 16)
        ordered = fours.permute(0, 2, 3, 1).contiguous().view(torch.uint8)
    else:
        planes = codes.view(blocks, ROWS, groups, 8, 2, 4).permute(4, 0, 2, 3, 1, 5)
        ordered = planes[0] | (planes[1] << 4)
    sets = F.pad(scales.flatten(1), (0, 0, 0, -rows % ROWS)).view(blocks, ROWS, -1).transpose(1, 2)
    return PackedMatrix(
        weights=ordered.reshape(-1).contiguous(),
        scales=sets.reshape(-1).to(torch.float16).contiguous(),
        rows=rows,
        columns=columns,
        format=format,
    )


def unpack(matrix: PackedMatrix) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`: values int8 (N, K) and scales float16, (N, S) or (N, S, 2)."""
    format = matrix.format
    blocks, groups = _round_up(matrix.rows, ROWS) // ROWS, _round_up(matrix.columns, GROUP) // GROUP
    if format.bits == 8:
        codes = matrix.weights.view(blocks, groups, 16, ROWS, 4).permute(0, 3, 1, 2, 4)
    else:
        bytes_ = matrix.weights.view(blocks, groups, 8, ROWS, 4)
        codes = torch.stack((bytes_ & 15, bytes_ >> 4)).permute(1, 4, 2, 3, 0, 5)
    values = (codes.reshape(blocks * ROWS, groups * GROUP).to(torch.int16) - 2 ** (format.bits - 1)).to(torch.int8)
    scales = matrix.scales.view(blocks, -1, ROWS).transpose(1, 2).reshape(blocks * ROWS, -1)[: matrix.rows].contiguous()
    values = values[: matrix.rows, : matrix.columns].contiguous()
    return values, scales.view(format.scale_shape(matrix.rows, matrix.columns))


def dequantize(matrix: PackedMatrix) -> Tensor:
    """The matrix in float32, (N, K)."""
    return restore(*unpack(matrix), matrix.format)


def restore(values_NK: Tensor, scales: Tensor, format: PackedFormat) -> Tensor:
    """The weights that values and scales stand for, float32 (N, K)."""
    columns = values_NK.shape[1]
    per_scale = format.columns_per_scale(columns)

    def of_columns(scales_NS: Tensor) -> Tensor:
        return scales_NS.float().repeat_interleave(per_scale, dim=1)[:, :columns]

    if format.has_minima:
        return (values_NK.float() - format.smallest) * of_columns(scales[..., 0]) + of_columns(scales[..., 1])
    return values_NK.float() * of_columns(scales)


def round_activations(x_TK: Tensor, bits: Literal[8, 16] = 8) -> tuple[Tensor, Tensor]:
    """Round per token and group of 64 columns: values float32 (T, G, 64), whole numbers up to 127 or 32512; scales (T, G)."""
    groups = F.pad(x_TK.float(), (0, -x_TK.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    top = _LARGEST_ACTIVATION[bits]
    largest = groups.abs().amax(-1)
    inverse = torch.where(largest >= _SMALLEST, top / largest, 0.0)
    return (groups * inverse[..., None]).round(), largest / top


def linear(
    x_TK: Tensor, matrix: PackedMatrix, bias_N: Tensor | None = None, residual_TN: Tensor | None = None
) -> Tensor:
    """`x W^T + bias + residual` with a packed matrix.

    Args: x_TK, bias_N, residual_TN: float32, contiguous, on the CPU. Returns: float32 (T, N).
    Raises: ShapeError for other shapes, dtypes, devices or strides.
    """
    if native() is None:
        _check_linear(x_TK, matrix, bias_N, residual_TN)
        return linear_reference(x_TK, matrix, bias_N, residual_TN)
    try:
        y = torch.empty(x_TK.shape[0], matrix.rows)
        matrix.native.linear(x_TK, y, bias_N, residual_TN)
    except (
        TypeError,
        ValueError,
        IndexError,
    ) as error:  # the native module checks by itself; here is said what was wrong
        _check_linear(x_TK, matrix, bias_N, residual_TN)
        raise ShapeError(str(error)) from error
    return y


def linear_reference(
    x_TK: Tensor, matrix: PackedMatrix, bias_N: Tensor | None = None, residual_TN: Tensor | None = None
) -> Tensor:
    """What `linear` computes, in PyTorch; differs from the native twin by the rounding of separate multiply and add."""
    values, x_scales = round_activations(x_TK, matrix.format.activation_bits)
    values = values.double()  # whole numbers up to 2^29 in a group's product: float64 keeps them exact
    weights, w_scales = unpack(matrix)
    weights = F.pad(weights, (0, -matrix.columns % GROUP)).double()
    y = torch.zeros(x_TK.shape[0], matrix.rows)
    if matrix.format.has_minima:
        codes = (weights - matrix.format.smallest).unflatten(1, (-1, HALF))
        halves = values.unflatten(2, (2, HALF)).flatten(1, 2)
        for h in range(halves.shape[1]):
            scale, minimum, x_scale = w_scales[:, h, 0].float(), w_scales[:, h, 1].float(), x_scales[:, h // 2, None]
            y += (halves[:, h] @ codes[:, h].T).float() * (scale * x_scale)
            y += minimum * (x_scale * halves[:, h].sum(1, keepdim=True).float())
    else:
        groups_per_scale = matrix.format.columns_per_scale(matrix.columns) // GROUP
        for g in range(values.shape[1]):
            dot = (values[:, g] @ weights[:, g * GROUP : (g + 1) * GROUP].T).float()
            y += dot * (w_scales[:, g // groups_per_scale].float() * x_scales[:, g, None])
    if bias_N is not None:
        y += bias_N
    return y if residual_TN is None else y + residual_TN


def top(x_TK: Tensor, matrix: PackedMatrix, count: int, bias_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The largest values of each row of `x W^T + bias` and their columns, without the product in memory.

    Args: x_TK, bias_N: as in `linear`. count: k, 1 to N. Returns: values, float32 (T, k), largest first; columns, int64
        (T, k), of equal values the lowest first. Raises: ShapeError as `linear`, and for another count.
    """
    if native() is None:
        _check_top(x_TK, matrix, count, bias_N)
        return top_reference(x_TK, matrix, count, bias_N)
    try:
        values, ids = torch.empty(x_TK.shape[0], count), torch.empty(x_TK.shape[0], count, dtype=torch.int64)
        matrix.native.top(x_TK, values, ids, bias_N)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        _check_top(x_TK, matrix, count, bias_N)
        raise ShapeError(str(error)) from error
    return values, ids


def top_reference(
    x_TK: Tensor, matrix: PackedMatrix, count: int, bias_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `top` computes, from the whole product."""
    values, ids = linear_reference(x_TK, matrix, bias_N).sort(dim=-1, descending=True, stable=True)
    return values[:, :count], ids[:, :count]


def _check_top(x_TK: Tensor, matrix: PackedMatrix, count: int, bias_N: Tensor | None) -> None:
    _check_linear(x_TK, matrix, bias_N, None)
    if not 1 <= count <= matrix.rows:
        raise ShapeError(f"[top] expected a count from 1 to {matrix.rows}, got {count}")


def rows(matrix: PackedMatrix, ids: Tensor) -> Tensor:
    """The rows `ids` (int64, 1-D) of a packed matrix as float32: an embedding lookup. Exact.

    Raises: ShapeError for other dtypes or shapes and for ids that are no rows.
    """
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise ShapeError(f"[rows] expected int64 ids of shape (T,), got {ids.dtype}, {tuple(ids.shape)}")
    if native() is None:
        return rows_reference(matrix, ids)
    y = torch.empty(len(ids), matrix.columns)
    try:
        matrix.native.rows(ids.contiguous(), y)
    except ValueError as error:
        raise ShapeError(str(error)) from error
    return y


def rows_reference(matrix: PackedMatrix, ids: Tensor) -> Tensor:
    """What `rows` computes, block by block of the rows asked for."""
    format, blocks = matrix.format, ids // ROWS
    per_block = matrix.weights.numel() * ROWS // _round_up(matrix.rows, ROWS)
    halves_per_block = format.num_scales(ROWS, matrix.columns)
    found = []
    for block, row in zip(blocks.tolist(), (ids % ROWS).tolist(), strict=True):
        part = PackedMatrix(
            weights=matrix.weights[block * per_block : (block + 1) * per_block],
            scales=matrix.scales[block * halves_per_block : (block + 1) * halves_per_block],
            rows=ROWS,
            columns=matrix.columns,
            format=format,
        )
        found.append(dequantize(part)[row])
    return torch.stack(found) if found else torch.empty(0, matrix.columns)


@dataclass(frozen=True, kw_only=True)
class PackedFfn:
    """A SwiGLU in kernel layout: a dense layer, a shared expert or one routed expert."""

    gate_up: PackedMatrix
    """Blocks of 16 gate rows alternate with the 16 up rows that belong to them; the width is padded to 64."""
    down: PackedMatrix

    @cached_property
    def native(self) -> Any:
        """The native object."""
        extension = native()
        assert extension is not None, "asked for without the native module"
        return extension.Ffn(self.gate_up.native, self.down.native)


@dataclass(frozen=True, kw_only=True)
class PackedPool:
    """The routed experts of a layer, with what serves every token beside them."""

    units: tuple[PackedFfn, ...]
    shared: PackedFfn | None = None

    @cached_property
    def native(self) -> Any:
        """The native object."""
        extension = native()
        assert extension is not None, "asked for without the native module"
        return extension.FfnPool([unit.native for unit in self.units], self.shared and self.shared.native)


def interleave_gate_up(gate_and_up: Tensor) -> Tensor:
    """Rows of gate, then of up (2 I, ...) to the order of `PackedFfn.gate_up`, padded with zero rows to (2 x 64 n, ...)."""
    width = gate_and_up.shape[0] // 2
    padded = F.pad(gate_and_up.unflatten(0, (2, width)).movedim((0, 1), (-2, -1)), (0, -width % GROUP))
    padded = padded.movedim((-2, -1), (0, 1))
    return padded.unflatten(1, (-1, ROWS)).transpose(0, 1).flatten(0, 2)


def ffn(
    x_TH: Tensor,
    units: Sequence[PackedFfn],
    counts: Sequence[int],
    tokens: Tensor | None = None,
    weights: Tensor | None = None,
    residual_TH: Tensor | None = None,
) -> Tensor:
    """`residual` plus the weighted sum of feed-forward units, each applied to its tokens.

    Args: x_TH: float32, contiguous. counts: tokens of each unit, or -1 for all tokens with weight 1. tokens, weights: int32 and
            float32, the tokens and their weights, unit after unit. Each token's sum runs over the units in order.
    Returns: float32 (T, H). Raises: ShapeError for other shapes, dtypes or strides.
    """
    extension = native()
    if extension is None:
        _check("ffn", x_TH, (None, None))
        return ffn_reference(x_TH, units, counts, tokens, weights, residual_TH)
    y = torch.empty_like(x_TH)
    try:
        extension.ffn([unit.native for unit in units], x_TH, y, tokens, weights, list(counts), residual_TH)
    except (TypeError, ValueError) as error:  # nanobind refuses a wrong dtype or stride as a TypeError
        _check("ffn", x_TH, (None, None))
        raise ShapeError(f"[ffn] {str(error).removeprefix('[ffn] ')}") from error
    return y


def ffn_pool(
    x_TH: Tensor,
    pool: PackedPool,
    counts_E: Tensor,
    tokens: Tensor,
    weights: Tensor,
    residual_TH: Tensor | None = None,
) -> Tensor:
    """`ffn` over the shared unit and the experts in order, with a routing as `router.route` makes it; the same bits.

    Args: counts_E: int64, tokens of each expert. The others as for `ffn`. Returns: float32 (T, H).
    Raises: ShapeError for other shapes, dtypes or strides.
    """
    extension = native()
    if extension is None:
        if tuple(counts_E.shape) != (len(pool.units),):
            raise ShapeError(f"[ffn_pool] expected counts of {len(pool.units)} experts, got {tuple(counts_E.shape)}")
        active = [(unit, count) for unit, count in zip(pool.units, counts_E.tolist(), strict=True) if count]
        if pool.shared is not None:
            active.insert(0, (pool.shared, -1))
        return ffn(x_TH, [unit for unit, _ in active], [count for _, count in active], tokens, weights, residual_TH)
    y = torch.empty_like(x_TH)
    try:
        pool.native.run(x_TH, y, counts_E, tokens, weights, residual_TH)
    except (TypeError, ValueError) as error:
        _check("ffn_pool", x_TH, (None, None))
        raise ShapeError(f"[ffn_pool] {str(error).removeprefix('[ffn_pool] ')}") from error
    return y


def ffn_reference(
    x_TH: Tensor,
    units: Sequence[PackedFfn],
    counts: Sequence[int],
    tokens: Tensor | None = None,
    weights: Tensor | None = None,
    residual_TH: Tensor | None = None,
) -> Tensor:
    """What `ffn` computes, unit by unit."""
    y = torch.zeros_like(x_TH) if residual_TH is None else residual_TH.clone()
    start = 0
    for unit, count in zip(units, counts, strict=True):
        chosen, weight = torch.arange(len(x_TH)), torch.ones(len(x_TH))
        if count >= 0:
            assert tokens is not None, "routed units come with tokens"
            assert weights is not None, "routed units come with weights"
            chosen, weight = tokens[start : start + count].long(), weights[start : start + count]
            start += count
        both = linear_reference(x_TH[chosen], unit.gate_up).unflatten(1, (-1, 2, ROWS))
        inner = (F.silu(both[:, :, 0]) * both[:, :, 1]).flatten(1)[:, : unit.down.columns]
        y.index_add_(0, chosen, linear_reference(inner, unit.down) * weight[:, None])
    return y


def _check_linear(x_TK: Tensor, matrix: PackedMatrix, bias_N: Tensor | None, residual_TN: Tensor | None) -> None:
    _check("linear", x_TK, (None, matrix.columns))
    if residual_TN is not None:
        _check("linear", residual_TN, (x_TK.shape[0], matrix.rows))
    if bias_N is not None:
        _check("linear", bias_N[None], (1, matrix.rows))


def _check(operation: str, tensor: Tensor, shape: tuple[int | None, int | None]) -> None:
    fits = tensor.ndim == 2 and all(want in (None, got) for want, got in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device.type != "cpu":
        wanted = tuple("any" if size is None else size for size in shape)
        raise ShapeError(
            f"[{operation}] expected a contiguous float32 tensor of shape {wanted} on the CPU, got {tensor.dtype}, "
            f"{tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
        )


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
