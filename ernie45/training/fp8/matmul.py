"""The one product of the fp8 path, A @ B^T of two fp8 matrices in float32, emulated or on the device's fp8 units.

Both forms multiply the same fp8 numbers and add in float32; they differ by the order of the sums. On the device, 128 columns at a time
are multiplied without scales and the float32 results are scaled and added up, so that no sum runs longer inside a unit than a tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie45.errors import ConfigError, ShapeError
from ernie45.training.fp8.config import Backend, Fp8Config
from ernie45.training.fp8.scaled import E4M3, TILE, Scaled

_ALIGNMENT = 16
"""Rows of B that the fp8 units of GPUs want a multiple of."""


def matmul(a: Scaled, b: Scaled, backend: Backend) -> Tensor:
    """A (M, C) times the transpose of B (N, C), float32 (M, N). Raises: ShapeError if the columns differ in number."""
    if a.values_RC.shape[1] != b.values_RC.shape[1]:
        raise ShapeError(
            f"[fp8 matmul] expected as many columns on both sides, got {tuple(a.values_RC.shape)} and {tuple(b.values_RC.shape)}"
        )
    with torch.autocast(a.values_RC.device.type, enabled=False):
        return a.dequantized() @ b.dequantized().mT if backend == "emulate" else _on_device(a, b)


def _on_device(a: Scaled, b: Scaled) -> Tensor:
    num_rows, num_columns = len(a.values_RC), len(b.values_RC)
    a_tiles, b_tiles = _by_tiles(a.values_RC, 1), _by_tiles(b.values_RC, _ALIGNMENT)
    a_scales, b_scales = a.row_scales(), b.row_scales()
    total = torch.zeros(num_rows, num_columns, dtype=torch.float32, device=a.values_RC.device)
    one = torch.ones((), dtype=torch.float32, device=total.device)
    for tile in range(len(a_tiles) if num_rows and num_columns else 0):
        part = torch._scaled_mm(
            a_tiles[tile], b_tiles[tile].mT, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=False
        )[:, :num_columns]
        total += part * a_scales[:, tile, None] * b_scales[:, tile]
    return total


def _by_tiles(values_RC: Tensor, alignment: int) -> Tensor:
    """Zeros up to whole tiles and `alignment` rows, contiguous as (c, R, 128)."""
    rows, columns = values_RC.shape
    as_bytes = F.pad(values_RC.contiguous().view(torch.uint8), (0, -columns % TILE, 0, -rows % alignment))
    return as_bytes.unflatten(1, (-1, TILE)).transpose(0, 1).contiguous().view(E4M3)


def resolve_backend(config: Fp8Config, device: torch.device) -> Backend:
    """The backend for a device. Raises: ConfigError if `scaled_mm` was asked for and does not run there."""
    if config.backend == "emulate":
        return "emulate"
    if config.backend == "scaled_mm":
        reason = why_no_scaled_mm(device)
        if reason:
            raise ConfigError(
                f"fp8 backend is 'scaled_mm', which does not run on {device}: {reason}. Use 'emulate' or 'auto'"
            )
        return "scaled_mm"
    has_units = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return "scaled_mm" if has_units and not why_no_scaled_mm(device) else "emulate"


def why_no_scaled_mm(device: torch.device) -> str:
    """What keeps `torch._scaled_mm` from running on a device, found by a small product; empty if nothing does."""
    try:
        ones = torch.ones(_ALIGNMENT, TILE, device=device).to(E4M3)
        one = torch.ones((), device=device)
        out = torch._scaled_mm(ones, ones.mT, scale_a=one, scale_b=one, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return "" if bool((out == TILE).all()) else "its result is wrong"
