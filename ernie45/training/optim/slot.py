"""What the optimizer keeps of one parameter: its role, the float32 weights, the moments and the number of updates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ernie45.errors import ConfigError
from ernie45.training.optim.config import OptimizerConfig
from ernie45.training.optim.groups import Role
from ernie45.training.optim.moments import BFloat16Store, Store, WideStore, new_store

FIRST, SECOND, MOMENTUM = "exp_avg", "exp_avg_sq", "momentum"


@dataclass(kw_only=True)
class Slot:
    """One parameter."""

    name: str
    parameter: nn.Parameter
    role: Role
    master: Tensor | None
    """float32 copy, for a parameter that is narrower."""
    weights: Store
    """What is moved: the master, or the parameter itself."""
    moments: dict[str, Store]
    """`exp_avg` and `exp_avg_sq`, or `momentum`."""
    updates: Tensor
    """float32 scalar: updates so far, as torch's kernels want it."""

    @property
    def is_wide(self) -> bool:
        """Whether everything is kept in float32, so that kernels work on it in place."""
        return all(isinstance(store, WideStore) for store in (self.weights, *self.moments.values()))

    def publish(self) -> None:
        """Copy the master into the parameter."""
        if self.master is not None:
            self.parameter.detach().copy_(self.master)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that the next update depends on beside the parameter, by name."""
        tensors = {f"{self.name}.updates": self.updates}
        if self.master is not None:
            tensors[f"{self.name}.master"] = self.master
        for moment, store in self.moments.items():
            tensors |= {f"{self.name}.{moment}{suffix}": tensor for suffix, tensor in store.tensors().items()}
        return tensors


def new_slot(name: str, parameter: nn.Parameter, role: Role, config: OptimizerConfig) -> Slot:
    """A slot that has seen no update. Raises: ConfigError for a dtype that cannot be moved without a master."""
    weights = parameter.detach()
    is_narrow = parameter.dtype != torch.float32
    master = weights.float().clone() if is_narrow and config.master_weights else None
    if is_narrow and master is None and parameter.dtype != torch.bfloat16:
        raise ConfigError(
            f"{name} is {parameter.dtype}: without master weights only float32 and bfloat16 can be trained"
        )
    if not weights.is_contiguous():
        raise ConfigError(f"{name} is not contiguous in memory: train a network whose parameters are")
    kept = master if master is not None else parameter
    kinds = ((MOMENTUM, True),) if role.matrices else ((FIRST, True), (SECOND, False))
    return Slot(
        name=name,
        parameter=parameter,
        role=role,
        master=master,
        weights=WideStore(kept) if kept.dtype == torch.float32 else BFloat16Store(kept),
        moments={moment: new_store(weights, config.state_dtype, signed=signed) for moment, signed in kinds},
        updates=torch.zeros((), dtype=torch.float32, device=parameter.device),
    )
