"""Rotary position embedding, interleaved pairs ("GPT-J" order), for one or three positions per token.

Shape letters: T tokens, N heads, D head size, J = D / 2 frequencies.
Source: architecture reference 2.3 (text) and 3.7 (time, height, width). The angles and the rotation are float32, the
result is cast back: bfloat16 angles would lose whole radians at long context.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ernie45.errors import ShapeError


def rotary_frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Angle per position step of every pair: `theta ** (-2 j / head_dim)`, float32 (J,)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1.0 / theta**exponent


@functools.lru_cache(maxsize=16)
@torch.inference_mode(mode=False)
def _kept_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """The same, made once: every step needs them, and their operations take as long as a small layer's attention.

    Never an inference tensor, because training may use what generating has made.
    """
    return rotary_frequencies(head_dim, theta, device)


def rotary_rotation(positions: Tensor, head_dim: int, theta: float, time_frequencies: int = 0) -> Tensor:
    """The rotation of every pair of every token, as unit complex numbers.

    Args: positions: int64 (T,), or (T, 3) holding time, height and width. head_dim: D. theta: base of the frequencies.
        time_frequencies: how many of the lowest frequencies turn with time when there are three positions; of the
        others, the even ones turn with height and the odd ones with width.
    Returns: complex64 (T, J).
    Raises: ShapeError for any other shape of `positions`.
    """
    frequencies = _kept_frequencies(head_dim, theta, positions.device)
    if positions.ndim == 1:
        angles = positions.to(torch.float32)[:, None] * frequencies
    elif positions.ndim == 2 and positions.shape[1] == 3:
        pair = torch.arange(head_dim // 2, device=positions.device)
        axis = torch.where(pair >= head_dim // 2 - time_frequencies, 0, 1 + pair % 2)
        angles = positions.to(torch.float32)[:, axis] * frequencies
    else:
        raise ShapeError(f"positions have shape {tuple(positions.shape)}, expected (T,) or (T, 3)")
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary(x_TND: Tensor, rotation_TJ: Tensor) -> Tensor:
    """Turn each pair (x[2j], x[2j+1]) of every head by its angle; same shape and dtype as `x_TND`."""
    pairs = torch.view_as_complex(x_TND.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation_TJ[:, None]).flatten(-2).to(x_TND.dtype)
