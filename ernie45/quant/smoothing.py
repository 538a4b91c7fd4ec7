"""Even out the columns behind each norm, so that rounding activations in groups costs less.

A few columns of the residual stream are tens of times larger than the rest, and the kernels round 64 columns with one
scale: the large one takes the resolution from all. Dividing a norm's weight by a factor per column and multiplying the
columns of the matrices behind it changes no result; factors are powers of two, so not even the last bit. Source:
SmoothQuant (inference reference 1.6), with its exponent of one half.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ernie45.checkpoint.layout import Box
from ernie45.quant.calibration import Calibration, norm_outputs
from ernie45.quant.weights import Weights

_EXPONENT = 0.5
_MAX_FACTOR = 64.0  # bounds what a column that the text never used can do
_BEHIND = {
    "input_layernorm.weight": ("self_attn.qkv_proj.weight",),
    "post_attention_layernorm.weight": (
        "mlp.up_gate_proj.weight",
        "mlp.gate.weight",
        "mlp.vision_gate.weight",
        "mlp.experts.up_gate_proj",
        "mlp.vision_experts.up_gate_proj",
        "mlp.shared_experts.up_gate_proj.weight",
    ),
}


class SmoothedWeights:
    """Other weights with the factors of their norms folded in; the same network."""

    def __init__(self, weights: Weights, factors: Mapping[str, Tensor]) -> None:
        """Args: factors: by name of the norm's weight, float32 (K,), powers of two."""
        self._weights, self.config, self.where = weights, weights.config, weights.where
        self._norms = dict(factors)
        self._columns: dict[str, Tensor] = {}
        for name, factor in factors.items():
            layer, _, norm = name.rpartition(".")[0].rpartition(".")
            self._columns |= {f"{layer}.{matrix}": factor for matrix in _BEHIND[f"{norm}.weight"]}

    def region_dtype(self, target: str, box: Box) -> torch.dtype:
        """That of the original: a power of two changes exponents alone."""
        return self._weights.region_dtype(target, box)

    def fill(self, out: Tensor, target: str, box: Box) -> None:
        """Copy a region of `target` into `out`: the original's, divided or multiplied."""
        self._weights.fill(out, target, box)
        if target in self._norms:
            out.div_(self._norms[target])
        elif target in self._columns:
            out.mul_(self._columns[target])


def smooth(weights: Weights, calibration: Calibration) -> SmoothedWeights:
    """Choose the factors of every decoder layer on a text."""
    squares = norm_outputs(weights, calibration)
    return SmoothedWeights(weights, {name: _factors(squares_K) for name, squares_K in squares.items()})


def _factors(squares_K: Tensor) -> Tensor:
    size_K = squares_K.sqrt()
    relative_K = (size_K / size_K.mean().clamp(min=1e-30)).clamp(1 / _MAX_FACTOR, _MAX_FACTOR)
    return torch.exp2((_EXPONENT * relative_K.log2()).round())
