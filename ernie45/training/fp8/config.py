"""How products in fp8 are computed and what is kept for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ernie45.errors import ConfigError

Backend = Literal["emulate", "scaled_mm"]
BackendChoice = Literal["auto", "emulate", "scaled_mm"]


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """The fp8 path of a run."""

    backend: BackendChoice = "auto"
    """`scaled_mm` multiplies fp8 numbers on the device (`torch._scaled_mm`); `emulate` rounds to fp8 and multiplies in float32,
    which is the same up to the order of sums. `auto`: the device where it has fp8 units (CUDA 8.9 and above), else emulation.
    The CPU runs `scaled_mm` as well, a thousand times slower."""
    keep_up_gate: bool = True
    """Keep what the products with gate and up gave for the backward pass. False computes them once more: one product more, and
    2 x width numbers less in memory per token, of experts per token and expert."""

    def __post_init__(self) -> None:
        if self.backend not in get_args(BackendChoice):
            raise ConfigError(f"fp8 backend is {self.backend!r}, expected one of {', '.join(get_args(BackendChoice))}")
