"""The policy that preference training is measured against: the weights as they were, in one of three ways.

    AdapterOff        the network itself with its adapters switched off: no memory beside the adapters
    FrozenCopy        a second set of weights, which may be refreshed now and then
    CachedReference   sums that were computed before training began, from a file: no memory and no time in training

Shape letters: L scored tokens, A answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ernie45.checkpoint.safetensors import byte_view, read_header, read_tensor, write_tensors
from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.build import build_model
from ernie45.training.branches import BranchBatch, Branches, branch_logprobs, in_chunks

_KEY_BYTES = 16


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


class CachedReference:
    """Sums from a file, found by the content of a prompt and its answers."""

    def __init__(self, path: Path | str, *, model_hash: str) -> None:
        """Args: model_hash: `weights_hash` of the weights that the sums must come from.

        Raises: NotFoundError, CheckpointError if the file is something else or of other weights.
        """
        self.path = Path(path)
        header = read_header(self.path)
        found = header.metadata.get("model_hash")
        if found != model_hash or not {"keys", "counts", "sums"} <= header.entries.keys():
            raise CheckpointError(
                f"{self.path} holds reference log-probabilities of weights {found}, this run's are {model_hash}: remove the file, "
                "so that they are computed again"
            )
        keys, counts, sums = (read_tensor(header.entries[name]) for name in ("keys", "counts", "sums"))
        parts = sums.split(counts.tolist())
        self._sums = {bytes(key.tolist()): part for key, part in zip(keys, parts, strict=True)}

    def __len__(self) -> int:
        return len(self._sums)

    def sums(self, batch: BranchBatch) -> Tensor:
        """See `Reference`. Raises: CheckpointError for a row that the file does not know."""
        return torch.cat([self._found(item) for item in batch.items])

    def _found(self, item: Branches) -> Tensor:
        found = self._sums.get(item.key())
        if found is None:
            raise CheckpointError(
                f"{self.path} has no log-probabilities of {item.origin or 'a row without origin'}: data or template have changed "
                "since it was made. Remove the file, so that they are computed again"
            )
        return found


def write_reference_cache(
    path: Path | str,
    reference: TokenReference,
    items: Iterable[Branches],
    *,
    model_hash: str,
    max_tokens: int = 8192,
) -> None:
    """Compute what `CachedReference` reads, once for the data. Args: max_tokens: of one pass.

    Equal rows are computed once. Raises: ConfigError without rows.
    """
    unique = {item.key(): item for item in items}
    if not unique:
        raise ConfigError("there are no rows to compute reference log-probabilities of")
    sums = [reference.sums(BranchBatch.of_items(chunk)) for chunk in in_chunks(unique.values(), max_tokens)]
    tensors = {
        "keys": torch.tensor([list(key) for key in unique], dtype=torch.uint8).view(-1, _KEY_BYTES),
        "counts": torch.tensor([len(item.answers) for item in unique.values()]),
        "sums": torch.cat(sums).float(),
    }
    write_tensors(path, tensors, metadata={"model_hash": model_hash})


def weights_hash(model: nn.Module) -> str:
    """BLAKE2b over names, dtypes and bytes of all weights: equal for equal weights, wherever they came from."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(byte_view(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()
