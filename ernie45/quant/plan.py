"""What a packed checkpoint of a network holds: the one list that writing, reading and checking go by.

Shape letters: E experts, N rows (outputs), K columns (inputs).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ernie45.config.model import ModelConfig
from ernie45.kernels.packed import GROUP, ROWS, PackedFormat, PackedMatrix, dequantize
from ernie45.models.build import build_model
from ernie45.quant.scheme import Scheme

WEIGHTS, SCALES = "packed", "scales"


@dataclass(frozen=True, kw_only=True)
class PackedParameter:
    """A matrix, or the matrices of all experts of a layer, and how it is packed."""

    name: str
    """Of the network's parameter; the file holds `NAME.packed` and `NAME.scales`."""
    experts: int | None
    """None for a single matrix."""
    rows: int
    """Of one matrix, as the network holds it."""
    columns: int
    format: PackedFormat

    @property
    def interleaved(self) -> bool:
        """Whether gate and up rows alternate in blocks of 16, as the feed-forward kernel wants them."""
        return "up_gate_proj" in self.name

    @property
    def packed_rows(self) -> int:
        """Rows of one packed matrix: gate and up are each padded to 64."""
        return 2 * (-(-self.rows // (2 * GROUP)) * GROUP) if self.interleaved else self.rows

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the network's parameter."""
        matrix = (self.rows, self.columns)
        return matrix if self.experts is None else (self.experts, *matrix)

    @property
    def num_matrices(self) -> int:
        """1, or the number of experts."""
        return 1 if self.experts is None else self.experts

    @property
    def size_bytes(self) -> int:
        """Of weights and scales."""
        return sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in self.tensors())

    def tensors(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of the two tensors in the file; experts lie one after the other."""
        lead = () if self.experts is None else (self.experts,)
        weights = (*lead, self.format.weight_bytes(self.packed_rows, self.columns))
        scales = (*lead, self.format.num_scales(self.packed_rows, self.columns))
        return [
            (f"{self.name}.{WEIGHTS}", torch.uint8, weights),
            (f"{self.name}.{SCALES}", torch.float16, scales),
        ]

    def matrix(self, weights: torch.Tensor, scales: torch.Tensor) -> PackedMatrix:
        """One of its matrices, from its part of the two tensors."""
        return PackedMatrix(
            weights=weights, scales=scales, rows=self.packed_rows, columns=self.columns, format=self.format
        )

    def dequantized(self, matrix: PackedMatrix) -> torch.Tensor:
        """One of its matrices in float32 with the network's order of rows."""
        weights = dequantize(matrix)
        return deinterleave_gate_up(weights, self.rows) if self.interleaved else weights


@dataclass(frozen=True, kw_only=True)
class PackingPlan:
    """All parameters and buffers of a network, in network order."""

    packed: tuple[PackedParameter, ...]
    plain: dict[str, tuple[int, ...]]
    """Shapes of those that keep floating-point values."""


def packing_plan(config: ModelConfig, scheme: Scheme) -> PackingPlan:
    """Sort the parameters of a network into packed and plain ones."""
    packed, plain = [], {}
    for name, tensor in build_model(config, device="meta").state_dict().items():
        format = scheme.format_of(name)
        if format is None:
            plain[name] = tuple(tensor.shape)
        else:
            *lead, rows, columns = tensor.shape
            experts = lead[0] if lead else None
            packed.append(PackedParameter(name=name, experts=experts, rows=rows, columns=columns, format=format))
    return PackingPlan(packed=tuple(packed), plain=plain)


def deinterleave_gate_up(interleaved: torch.Tensor, rows: int) -> torch.Tensor:
    """The inverse of `kernels.packed.interleave_gate_up`: gate rows, then up rows, (rows, ...)."""
    halves = interleaved.unflatten(0, (-1, 2, ROWS)).transpose(0, 1).flatten(1, 2)
    return halves[:, : rows // 2].flatten(0, 1)
