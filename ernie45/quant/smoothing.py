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

from ernie45.checkpoint.layout import Box, Stored
from ernie45.checkpoint.source import Source
from ernie45.quant.calibration import Calibration, Calibrator

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


class SmoothedSource(Source):
    """Another source's weights with the factors of its norms folded in; the same network."""

    def __init__(self, source: Source, factors: Mapping[str, Tensor]) -> None:
        """Args: factors: by name of the norm's weight, float32 (K,), powers of two."""
        self._source, self.config, self.where = source, source.config, source.where
        self._norms = dict(factors)
        self._columns: dict[str, Tensor] = {}
        for name, factor in factors.items():
            layer, _, norm = name.rpartition(".")[0].rpartition(".")
            self._columns |= {f"{layer}.{matrix}": factor for matrix in _BEHIND[f"{norm}.weight"]}
        super().__init__(source.layout)

    def read(self, stored: Stored, rows: tuple[int, int] | None = None) -> Tensor:
        raise NotImplementedError("a stored tensor is no whole parameter: smoothed weights are read by `fill`")

    def stored_dtype(self, stored: Stored) -> torch.dtype:
        return self._source.stored_dtype(stored)

    def region_dtype(self, target: str, box: Box) -> torch.dtype:
        return self._source.region_dtype(target, box)

    def fill(self, out: Tensor, target: str, box: Box) -> None:
        self._source.fill(out, target, box)
        if target in self._norms:
            out.div_(self._norms[target])
        elif target in self._columns:
            out.mul_(self._columns[target])


def smooth(source: Source, calibration: Calibration) -> SmoothedSource:
    """Choose the factors of every decoder layer on a text."""
    squares = Calibrator(source, calibration).norm_outputs()
    return SmoothedSource(source, {name: _factors(squares_K) for name, squares_K in squares.items()})


def _factors(squares_K: Tensor) -> Tensor:
    size_K = squares_K.sqrt()
    relative_K = (size_K / size_K.mean().clamp(min=1e-30)).clamp(1 / _MAX_FACTOR, _MAX_FACTOR)
    return torch.exp2((_EXPONENT * relative_K.log2()).round())
