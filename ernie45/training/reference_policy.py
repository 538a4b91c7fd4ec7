"""The policy that preference training is measured against: the weights as they were, in one of three ways.

    AdapterOff        the network itself with its adapters switched off: no memory beside the adapters
    FrozenCopy        a second set of weights, which may be refreshed now and then
    CachedReference   sums that were computed before training began (`reference_cache.py`): no memory and no time in training

Shape letters: L scored tokens, A answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.build import build_model
from ernie45.training.branches import BranchBatch, branch_logprobs

ReferenceKind = Literal["live", "cached"]


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """How the policy before training is kept."""

    kind: ReferenceKind = "live"
    """`live`: it is computed in every step, by the network without its adapters, or by a second copy of the weights. `cached`: once,
    for all rows, before the first step; of dpo."""
    refresh_steps: int = 0
    """Of a live copy: steps after which it takes over the trained weights; 0 = never."""
    file: str | None = None
    """Of cached: where the log-probabilities lie, for several runs over the same weights and rows; None: in the run's folder."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ReferenceKind):
            raise ConfigError(f"reference kind is {self.kind!r}, expected one of {', '.join(get_args(ReferenceKind))}")
        if self.refresh_steps < 0:
            raise ConfigError(f"refresh_steps is {self.refresh_steps}, expected 0 (never) or more")
        if self.kind == "cached" and self.refresh_steps:
            raise ConfigError(
                f"refresh_steps is {self.refresh_steps}, but what is cached is computed once: leave it out, or let kind be live"
            )
        if self.kind == "live" and self.file is not None:
            raise ConfigError(
                f"file is {self.file!r}, but a live reference reads no file: leave it out, or let kind be cached"
            )


class Reference(Protocol):
    """Whatever knows how probable answers were before training."""

    def sums(self, batch: BranchBatch) -> Tensor:
        """Log-probability of each answer, its scored tokens added up: float32 (A,), without gradient."""


class TokenReference(Reference, Protocol):
    """A reference that computes, and so knows every token and takes answers that nobody has seen before."""

    def logprobs(self, batch: BranchBatch) -> Tensor:
        """Log-probability of each scored token, float32 (L,), without gradient."""


class AdapterOff:
    """The network that trains, with its adapters switched off."""

    def __init__(self, network: Any, adapter_off: Callable[[nn.Module], AbstractContextManager[Any]]) -> None:
        """Args: network: a `TrainingNetwork`. adapter_off: switches the adapters of a model off for a while."""
        self._network, self._adapter_off = network, adapter_off

    def logprobs(self, batch: BranchBatch) -> Tensor:
        """See `TokenReference`."""
        with torch.no_grad(), self._adapter_off(self._network.model):
            return branch_logprobs(self._network, batch)

    def sums(self, batch: BranchBatch) -> Tensor:
        """See `Reference`."""
        return batch.sums(self.logprobs(batch))


class FrozenCopy:
    """A second network that does not train."""

    def __init__(self, frozen: Any, *, refresh_steps: int = 0) -> None:
        """Args: frozen: a `TrainingNetwork` of its own weights. refresh_steps: take over the trained weights every so many steps;
        0 = never.
        """
        if refresh_steps < 0:
            raise ConfigError(f"refresh_steps is {refresh_steps}, expected 0 (never) or more")
        self._frozen, self._refresh_steps = frozen, refresh_steps
        frozen.model.requires_grad_(False)

    @classmethod
    def of(cls, network: Any, *, refresh_steps: int = 0) -> FrozenCopy:
        """A copy of a network without adapters, as it is now."""
        from ernie45.training.network import TrainingNetwork

        model = build_model(network.model.config, dtype=network.model.dtype, device=network.model.device)
        model.load_state_dict(network.model.state_dict())
        return cls(TrainingNetwork(model, dtype=network.product_dtype), refresh_steps=refresh_steps)

    def logprobs(self, batch: BranchBatch) -> Tensor:
        """See `TokenReference`."""
        with torch.no_grad():
            return branch_logprobs(self._frozen, batch)

    def sums(self, batch: BranchBatch) -> Tensor:
        """See `Reference`."""
        return batch.sums(self.logprobs(batch))

    def after_step(self, network: Any, step: int) -> bool:
        """Take over the weights if it is time. Args: step: steps that are done. Returns: whether it did."""
        due = bool(self._refresh_steps) and step > 0 and step % self._refresh_steps == 0
        if due:
            self.load_state_tensors(network.model.state_dict())
        return due

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep: the weights, where they are refreshed; else nothing, they are those of the start."""
        return dict(self._frozen.model.state_dict()) if self._refresh_steps else {}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put weights in place. Raises: CheckpointError for names that do not belong to this network."""
        if not tensors and not self._refresh_steps:
            return
        own = self._frozen.model.state_dict()
        if own.keys() != tensors.keys():
            different = sorted(own.keys() ^ tensors.keys())
            raise CheckpointError(
                f"the reference's weights do not fit the network: {different[0]!r} is in one of the two"
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
