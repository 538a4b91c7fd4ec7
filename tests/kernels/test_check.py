"""The check of arguments: what fits passes, each way not to fit is named with what came."""

from __future__ import annotations

import pytest
import torch

from ernie45.errors import ShapeError
from ernie45.kernels.check import check_tensor


def test_what_fits_passes() -> None:
    check_tensor("norm", "x", torch.empty(3, 4), (3, 4))
    check_tensor("norm", "x", torch.empty(0, 4, dtype=torch.int32), (0, 4), torch.int32)
    check_tensor("norm", "x", torch.empty(4, 3).T[:, :1].T, (1, 3))  # one row of any stride is contiguous


@pytest.mark.parametrize(
    ("tensor", "got"),
    [
        (torch.empty(3, 5), r"torch.float32, (3, 5), strides (5, 1), on cpu"),
        (torch.empty(12), r"torch.float32, (12,), strides (1,), on cpu"),
        (torch.empty(3, 4, dtype=torch.float64), r"torch.float64, (3, 4), strides (4, 1), on cpu"),
        (torch.empty(4, 3).T, r"torch.float32, (3, 4), strides (1, 3), on cpu"),
        (torch.empty(3, 4, device="meta"), r"torch.float32, (3, 4), strides (4, 1), on meta"),
    ],
    ids=["shape", "dimensions", "dtype", "strides", "device"],
)
def test_what_does_not_fit_is_named(tensor: torch.Tensor, got: str) -> None:
    with pytest.raises(ShapeError) as error:
        check_tensor("norm", "x", tensor, (3, 4))
    assert str(error.value) == f"[norm] x: expected a contiguous float32 tensor of shape (3, 4) on the CPU, got {got}"
