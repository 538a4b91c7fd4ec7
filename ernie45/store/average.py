"""The average of a run's weights, put in the place of the last ones: as a source to write from, or inside an adapter.

A checkpoint keeps it as `ema.safetensors`: float32, by the names that the parameters had in training (`training/optim/ema.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ernie45.checkpoint.layout import Box, Stored
from ernie45.checkpoint.safetensors import read_tensors
from ernie45.checkpoint.source import Source
from ernie45.errors import CheckpointError
from ernie45.training.lora.adapter import Adapter

_CRITIC = "critic."
"""What reinforcement learning averages beside the network, and nobody exports."""


def read_average(file: Path) -> dict[str, Tensor]:
    """The averages of a network's or an adapter's parameters by their names in training."""
    return {name: tensor for name, tensor in read_tensors(file).items() if not name.startswith(_CRITIC)}


class AveragedSource(Source):
    """Weights with averages in place of those parameters that have one; buffers, such as the correction bias, are the base's."""

    mtp_dropped = False

    def __init__(self, base: Source, averages: Mapping[str, Tensor]) -> None:
        """Raises: CheckpointError if the averages belong to other parameters."""
        self.config, self.where = base.config, base.where
        self._base, self._averages = base, averages
        super().__init__(base.layout)
        for name, average in averages.items():
            if self.shapes.get(name) != tuple(average.shape):
                raise CheckpointError(
                    f"{base.where}: the average {name} has shape {list(average.shape)}, the network {self.shapes.get(name)}: it is "
                    "of another run"
                )

    def read(self, stored: Stored, rows: tuple[int, int] | None = None) -> Tensor:
        """Never: a stored tensor may hold parts of several parameters, and what has an average is asked for by box."""
        raise AssertionError(f"{stored.name} was asked for as it is stored, without its average")

    def stored_dtype(self, stored: Stored) -> torch.dtype:
        return self._base.stored_dtype(stored)

    def region_dtype(self, target: str, box: Box) -> torch.dtype:
        return self._base.region_dtype(target, box)

    def fill(self, out: Tensor, target: str, box: Box) -> None:
        average = self._averages.get(target)
        if average is None:
            self._base.fill(out, target, box)
        else:
            out.copy_(average[tuple(slice(start, end) for start, end in self._full(target, box))])


@torch.no_grad()
def put_average(adapter: Adapter, averages: Mapping[str, Tensor]) -> None:
    """Give an adapter's parts their averages, in place. Raises: CheckpointError if the averages belong to another adapter."""
    parts = {
        f"{_trained_under(parameter)}.{name}": part
        for parameter, lora in adapter.items()
        for name, part in lora.named_parameters()
    }
    other = sorted(parts.keys() ^ averages.keys())
    if other:
        raise CheckpointError(
            f"the average and the adapter differ in {len(other)} names ({other[0]}, ..): they are of two runs"
        )
    for name, part in parts.items():
        part.copy_(averages[name])


def _trained_under(parameter: str) -> str:
    """The module that learns beside a parameter: `X.weight` -> `X.lora`, `X.down_proj` of stacked experts -> `X.down_lora`."""
    owner, _, last = parameter.rpartition(".")
    return f"{owner}.lora" if last == "weight" else f"{owner}.{last.removesuffix('_proj')}_lora"
