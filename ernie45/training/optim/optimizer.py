"""The optimizer of a run, as the loop sees it.

optimizer = build_optimizer(model.named_parameters(), config, num_layers=..)
loss.backward()              # as often as wanted: gradients add up in float32
norm = optimizer.clip()      # once, when all are there; look whether it is finite
optimizer.step(lr)           # lr: what the schedule says for this step
optimizer.zero_grad()
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ernie45.errors import CheckpointError, ConfigError, TrainingError
from ernie45.training.optim import adamw, muon
from ernie45.training.optim.clip import global_norm, scale_to
from ernie45.training.optim.config import OptimizerConfig
from ernie45.training.optim.gradients import MainGradients
from ernie45.training.optim.groups import check_effect, role
from ernie45.training.optim.slot import Slot, new_slot


class Optimizer:
    """Moves parameters and owns everything that this needs: masters, moments, float32 gradients."""

    def __init__(self, slots: list[Slot], config: OptimizerConfig) -> None:
        self.config, self._slots = config, slots
        self._main = MainGradients([slot.parameter for slot in slots])
        self._norm: float | None = None

    @property
    def masters(self) -> dict[str, Tensor]:
        """The weights in the highest precision there is, by parameter name: master, or the parameter itself."""
        return {slot.name: slot.parameter.detach() if slot.master is None else slot.master for slot in self._slots}

    def gradients(self) -> dict[str, Tensor]:
        """The float32 sums, by parameter name; those that got none are left out."""
        return {slot.name: gradient for slot, gradient in self._pairs()}

    def clip(self) -> float:
        """Scale all gradients down to the norm that the configuration allows.

        Returns: their norm before that, each parameter counted once. If it is NaN or infinite nothing was scaled, and `step`
        refuses. A second call before the step gives the same number and scales nothing.
        """
        if self._norm is None:
            gradients = list(self.gradients().values())
            self._norm = global_norm(gradients)
            if self.config.clip is not None:
                scale_to(gradients, self._norm, self.config.clip)
        return self._norm

    def step(self, lr: float) -> None:
        """Move every parameter that got a gradient; clips first if `clip` was not called.

        Args: lr: learning rate of this step, 0 or more; the ratios of routers, layers and adapters are applied to it.
        Raises: TrainingError, before anything moves, if the norm of the gradients is not finite.
        """
        norm = self.clip()
        if not math.isfinite(norm):
            raise TrainingError(
                f"the norm of the gradients is {norm}: nothing was moved. Call zero_grad() to leave them out"
            )
        pairs = self._pairs()
        adamw.update([pair for pair in pairs if not pair[0].role.matrices], self.config, lr)
        muon.update([pair for pair in pairs if pair[0].role.matrices], self.config, lr)
        with torch.no_grad():
            for slot, _ in pairs:
                slot.publish()
        self._norm = None

    def zero_grad(self) -> None:
        """Forget all gradients and free their memory."""
        for slot in self._slots:
            self._main.clear(slot.parameter)
        self._norm = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Masters, moments and counters, by parameter name and what they are. They are the optimizer's own: copy, do not change."""
        return {name: tensor for slot in self._slots for name, tensor in slot.state_tensors().items()}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a state, bit for bit; parameters with a master get its values.

        Raises: CheckpointError, before anything changes, if names, shapes or dtypes are not those of `state_tensors`.
        """
        own = self.state_tensors()
        _check_names(own, tensors)
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        for slot in self._slots:
            slot.publish()

    def close(self) -> None:
        """Take the hooks off the parameters, which another optimizer may then have."""
        self._main.close()
        self._slots = []

    def _pairs(self) -> list[tuple[Slot, Tensor]]:
        found = ((slot, self._main.of(slot.parameter)) for slot in self._slots)
        return [(slot, gradient) for slot, gradient in found if gradient is not None]


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    *,
    num_layers: int,
    qkv_rows: tuple[int, int, int] | None = None,
) -> Optimizer:
    """The optimizer of those of the given parameters that want a gradient.

    From here on the gradients of parameters that are not float32 go into float32 sums instead of `.grad`.
    Args: named_parameters: a network's, an adapter's, a critic's; names decide about decay and rates (`groups.py`).
        num_layers: decoder layers of the network. qkv_rows: rows of queries, keys and values in `qkv_proj`, for Muon.
    Raises: ConfigError if nothing wants a gradient, a name comes twice, or an option has nothing to act on.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    names = [name for name, _ in trained]
    if not trained:
        raise ConfigError("no parameter wants a gradient: there is nothing to optimize")
    if len(set(names)) < len(names) or len({id(parameter) for _, parameter in trained}) < len(names):
        raise ConfigError("a parameter was given twice: each must come once, under one name")
    check_effect(names, config)
    roles = {
        name: role(name, parameter.shape, config, num_layers=num_layers, qkv_rows=qkv_rows)
        for name, parameter in trained
    }
    if config.name == "muon" and not any(entry.matrices for entry in roles.values()):
        raise ConfigError("no matrix inside the layers is trained, so Muon has nothing to do: use adamw")
    return Optimizer([new_slot(name, parameter, roles[name], config) for name, parameter in trained], config)


def _check_names(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"optimizer state lacks {len(missing)} tensors{_first(missing)} and has {len(unexpected)} unknown ones"
            f"{_first(unexpected)}: it belongs to another network or other optimizer settings"
        )
    for name, tensor in own.items():
        found = given[name]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise CheckpointError(
                f"optimizer state {name} is {found.dtype} {tuple(found.shape)}, expected {tensor.dtype} {tuple(tensor.shape)}"
            )


def _first(names: list[str]) -> str:
    return f" ({names[0]}, ..)" if names else ""
