"""Apply the token masks of structured output (`processing/grammar.py`) to logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ernie45.errors import ShapeError

_BITS = 32


def new_bitmask(num_rows: int, vocab_size: int) -> Tensor:
    """Masks that allow everything, int32 (num_rows, words); rows without a constraint stay like that."""
    return torch.full((num_rows, (vocab_size + _BITS - 1) // _BITS), -1, dtype=torch.int32)


def apply_bitmask(logits_BV: Tensor, bitmask_BW: Tensor) -> Tensor:
    """Logits with minus infinity where the mask has a 0; ids that the mask has no bit for are not allowed.

    Args: logits_BV: any float dtype. bitmask_BW: int32, bit i % 32 of word i // 32 allows id i.
    Raises: ShapeError if the rows do not agree.
    """
    if bitmask_BW.dtype != torch.int32 or bitmask_BW.ndim != 2 or bitmask_BW.shape[0] != logits_BV.shape[0]:
        raise ShapeError(
            f"the bitmask is {bitmask_BW.dtype} {tuple(bitmask_BW.shape)} for logits {tuple(logits_BV.shape)},"
            " expected int32 with as many rows"
        )
    shifts = torch.arange(_BITS, dtype=torch.int32, device=logits_BV.device)
    allowed = (bitmask_BW.to(logits_BV.device)[:, :, None] >> shifts & 1).bool().flatten(1)
    missing = logits_BV.shape[1] - allowed.shape[1]
    if missing > 0:
        allowed = torch.nn.functional.pad(allowed, (0, missing))
    return logits_BV.masked_fill(~allowed[:, : logits_BV.shape[1]], -math.inf)
