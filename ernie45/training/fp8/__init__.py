"""Training with 8-bit floating point products, by the recipe published for ERNIE 4.5."""

from ernie45.training.fp8.config import Fp8Config
from ernie45.training.fp8.convert import use_fp8

__all__ = ["Fp8Config", "use_fp8"]
