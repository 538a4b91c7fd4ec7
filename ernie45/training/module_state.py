"""A module that learns beside the network, as checkpoints see it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class ModuleState:
    """See `loop.Stateful`."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def state_tensors(self) -> dict[str, Tensor]:
        """The module's parameters and buffers."""
        return dict(self._module.state_dict())

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put them back."""
        self._module.load_state_dict(tensors)
