"""Weights with an adapter inside, one tensor at a time: what an adapter is exported through, whatever its base is stored as."""

from __future__ import annotations

import torch
from torch import Tensor

from ernie45.checkpoint.layout import Box, Stored
from ernie45.checkpoint.source import Source
from ernie45.errors import CheckpointError
from ernie45.training.lora.adapter import Adapter


class AdaptedSource(Source):
    """A base's weights plus the adapter's products, formed in float32 and rounded once to what they are read into."""

    mtp_dropped = False

    def __init__(self, base: Source, adapter: Adapter) -> None:
        """Raises: CheckpointError if the adapter belongs to other parameters."""
        self.config, self.where = base.config, base.where
        self._base, self._adapter = base, adapter
        super().__init__(base.layout)
        missing = sorted(adapter.keys() - self.shapes.keys())
        if missing:
            raise CheckpointError(f"{base.where}: the adapter changes {missing[0]}, which this network has not")

    def read(self, stored: Stored, rows: tuple[int, int] | None = None) -> Tensor:
        """Never: a stored tensor may hold parts of several parameters, and what has an adapter is asked for by box."""
        raise AssertionError(f"{stored.name} was asked for as it is stored, without its adapter")

    def stored_dtype(self, stored: Stored) -> torch.dtype:
        return self._base.stored_dtype(stored)

    def region_dtype(self, target: str, box: Box) -> torch.dtype:
        return self._base.region_dtype(target, box)

    @torch.no_grad()
    def fill(self, out: Tensor, target: str, box: Box) -> None:
        lora = self._adapter.get(target)
        if lora is None:
            self._base.fill(out, target, box)
            return
        weights = torch.empty(out.shape, dtype=torch.float32)
        self._base.fill(weights, target, box)
        *leading, (first_row, _), _ = self._full(target, box)
        if lora.num_experts is None:
            out.copy_(lora.merged(weights, first_row=first_row))
            return
        first_expert = leading[0][0]
        for i, weight_NK in enumerate(weights):
            out[i] = lora.merged(weight_NK, first_row=first_row, expert=first_expert + i)
