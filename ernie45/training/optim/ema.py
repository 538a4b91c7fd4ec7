"""A running average of the weights, which previews what a decayed learning rate would give.

    e = a e + (1 - a) w       after an update, starting from e = w0

With updates d_1 .. d_n this is e_n = w0 + sum_i (1 - a^(n - i + 1)) d_i: recent updates count less, as if their learning rate had
fallen over about 1 / (1 - a) steps. (An average that starts at 0, as the published asynchronous worker's does, is too small by
a^n w0.) Source: training reference 1.6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ernie45.errors import CheckpointError, ConfigError, ShapeError

PIECE = 1 << 20
"""Values that are exchanged at a time."""


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The average of a run."""

    decay: float
    """a: share of the old average, above 0 and below 1. Its window is about 1 / (1 - a) updates of the average."""
    interval: int = 1
    """Steps between two updates of the average, 1 or more."""
    loss_threshold: float | None = None
    """A step whose loss is this or more does not enter the average; None: all do."""

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise ConfigError(f"the average's decay is {self.decay}, expected above 0 and below 1")
        if self.interval < 1:
            raise ConfigError(f"the average's interval is {self.interval}, expected 1 or more steps")


class Ema:
    """Averages in float32 of the weights that are given, `Optimizer.masters` in a run."""

    @torch.no_grad()
    def __init__(self, weights: Mapping[str, Tensor], config: EmaConfig) -> None:
        """Start from the weights as they are. They are read again at each update, so they must stay the tensors that are moved."""
        self.config, self._weights = config, dict(weights)
        self._averages = {
            name: tensor.detach().to(torch.float32, copy=True).contiguous() for name, tensor in weights.items()
        }

    @torch.no_grad()
    def update(self, *, step: int, loss: float) -> bool:
        """Take the weights after a step into the average.

        Args: step: steps done. loss: of this step. Returns: False if the step is skipped, for its number or its loss.
        """
        config = self.config
        too_high = config.loss_threshold is not None and not loss < config.loss_threshold
        if step % config.interval or too_high:
            return False
        for name, average in self._averages.items():
            average.lerp_(self._weights[name].detach().float(), 1 - config.decay)
        return True

    def state_tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name. They are the object's own: copy, do not change."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over averages, bit for bit. Raises: CheckpointError if names, shapes or dtypes differ."""
        if tensors.keys() != self._averages.keys():
            different = sorted(tensors.keys() ^ self._averages.keys())
            raise CheckpointError(
                f"{len(different)} names of averages differ ({different[0]}, ..): they are of another network"
            )
        for name, average in self._averages.items():
            given = tensors[name]
            if given.shape != average.shape or given.dtype != average.dtype:
                raise CheckpointError(
                    f"average {name} is {given.dtype} {tuple(given.shape)}, expected {average.dtype} {tuple(average.shape)}"
                )
            average.copy_(given)

    @contextmanager
    def swap(self, model: nn.Module) -> Iterator[None]:
        """Let the network compute with the averages inside a `with` block; afterwards it has its own weights again, bit for bit.

        float32 parameters and averages change places, without a copy of the network; of narrower ones a copy is kept.
        Do not train or update inside. Raises: ShapeError if the network lacks an averaged parameter.
        """
        parameters = dict(model.named_parameters())
        missing = sorted(self._averages.keys() - parameters.keys())
        if missing:
            raise ShapeError(
                f"the network has no parameter {missing[0]}, but its average is kept: it is another network"
            )
        kept = {
            name: parameters[name].detach().clone()
            for name in self._averages
            if parameters[name].dtype != torch.float32
        }
        self._enter(parameters, kept)
        try:
            yield
        finally:
            self._leave(parameters, kept)

    @torch.no_grad()
    def _enter(self, parameters: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
        for name, average in self._averages.items():
            if name in kept:
                parameters[name].copy_(average)
            else:
                _exchange(parameters[name], average)

    @torch.no_grad()
    def _leave(self, parameters: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
        for name, average in self._averages.items():
            if name in kept:
                parameters[name].copy_(kept[name])
            else:
                _exchange(parameters[name], average)


def _exchange(a: Tensor, b: Tensor) -> None:
    """Let two contiguous tensors of equal shape and dtype change values, a piece at a time."""
    for x, y in zip(a.detach().view(-1).split(PIECE), b.view(-1).split(PIECE), strict=True):
        kept = x.clone()
        x.copy_(y)
        y.copy_(kept)
