"""Tensors in E4M3 with a float32 scale per tile: how they are made, read back and turned.

E4M3 has 3 bits of mantissa and numbers up to 448. A tile's scale is its absmax / 448, so its largest number becomes 448, and

    |x - x'| <= max(|x| / 16, scale / 1024)      half a step of a normal and of a subnormal number

(Released code of another tool takes 488 for the largest number, which E4M3 does not have.) Tiles at the border are smaller; nothing
is padded. A number that is not finite makes its whole tile NaN, so that it is seen in loss and gradients.

Shape letters: R rows, C columns (the dimension that a product sums over), r and c tiles along them. Source: training reference 2.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie45.errors import ShapeError

TILE = 128
LARGEST = 448.0
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Scaled:
    """An fp8 matrix."""

    values_RC: Tensor
    """float8_e4m3fn."""
    scales_rc: Tensor
    """float32: of tiles of `tile_rows` x 128."""
    tile_rows: Literal[1, 128]

    def row_scales(self) -> Tensor:
        """Scales for each row, float32 (R, c)."""
        rows = len(self.values_RC)
        return self.scales_rc if self.tile_rows == 1 else self.scales_rc.repeat_interleave(TILE, 0)[:rows]

    def dequantized(self) -> Tensor:
        """float32 (R, C)."""
        columns = self.values_RC.shape[1]
        return self.values_RC.float().mul_(self.row_scales().repeat_interleave(TILE, 1)[:, :columns])

    def take(self, rows: Tensor) -> Scaled:
        """Some rows, int64 (n,). Raises: ShapeError for square tiles, which rows cannot leave."""
        if self.tile_rows != 1:
            raise ShapeError("rows of a matrix with 128 x 128 tiles do not have scales of their own")
        # as bytes: indexing is not there for fp8 on every device
        return Scaled(self.values_RC.view(torch.uint8)[rows].view(E4M3), self.scales_rc[rows], 1)

    def transposed(self) -> Scaled:
        """The same numbers, turned. Raises: ShapeError for row tiles, which have to be rounded anew."""
        if self.tile_rows == 1:
            raise ShapeError(
                "a matrix with 1 x 128 tiles has no scales for its columns: dequantize, turn and quantize it"
            )
        return Scaled(self.values_RC.mT, self.scales_rc.mT, 128)


def quantize_rows(x_RC: Tensor) -> Scaled:
    """Tiles of 1 x 128: activations and gradients, along the dimension that is summed over."""
    rows, columns = _size(x_RC)
    padded = F.pad(x_RC.float(), (0, -columns % TILE))
    tiles = padded.view(rows, padded.shape[1] // TILE, TILE)
    scales = _scales(tiles.abs().amax(2))
    values = _round(tiles / scales[:, :, None]).view(padded.shape)
    return Scaled(values[:, :columns].contiguous(), scales, 1)


def quantize_tiles(x_RC: Tensor) -> Scaled:
    """Tiles of 128 x 128: weights."""
    rows, columns = _size(x_RC)
    padded = F.pad(x_RC.float(), (0, -columns % TILE, 0, -rows % TILE))
    tiles = padded.view(padded.shape[0] // TILE, TILE, padded.shape[1] // TILE, TILE)
    scales = _scales(tiles.abs().amax((1, 3)))
    values = _round(tiles / scales[:, None, :, None]).view(padded.shape)
    return Scaled(values[:rows, :columns].contiguous(), scales, 128)


def _size(x_RC: Tensor) -> tuple[int, int]:
    if x_RC.ndim != 2 or not x_RC.is_floating_point():
        raise ShapeError(f"[fp8] expected a floating-point matrix, got {x_RC.dtype} {tuple(x_RC.shape)}")
    return x_RC.shape[0], x_RC.shape[1]


def _scales(absmax: Tensor) -> Tensor:
    """absmax / 448; where that is 0 or no normal number, the smallest normal one, which divides safely."""
    return (absmax / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)


def _round(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST, LARGEST).to(E4M3)  # a quotient may lie an ulp above 448
