"""What quantization asks of weights: regions of parameters, however they are stored."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ernie45.checkpoint.layout import Box
from ernie45.config.model import ModelConfig


class Weights(Protocol):
    """Parameters of a network by region. Every `checkpoint.source.Source` is one; so is what changes values on the way."""

    config: ModelConfig
    where: str
    """For messages."""

    def region_dtype(self, target: str, box: Box) -> torch.dtype:
        """The dtype that holds a region without loss."""
        ...

    def fill(self, out: Tensor, target: str, box: Box) -> None:
        """Copy a region of `target` into `out`, whose shape is the region's."""
        ...
