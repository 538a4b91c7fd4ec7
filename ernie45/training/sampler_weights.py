"""How weights reach the network that samples: by sharing memory with the one that trains, or by copying what cannot be shared.

The engine puts kernels into its network and takes the gradients away, so it cannot run the network that trains. A twin can: its
parameters are the same memory, and an optimizer that works in place has updated both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set

import torch
from torch import Tensor, nn

from ernie45.errors import CheckpointError
from ernie45.models.build import build_model
from ernie45.models.text import CausalLM
from ernie45.training.lora.adapter import adapter_of
from ernie45.training.lora.low_rank import LowRank


def sampler_twin(model: CausalLM) -> CausalLM:
    """A network of its own over the memory of another: plain leaves, float32, on the CPU, as the engine wants it.

    What is not float32 on the CPU, or has an adapter, is a copy, which `copy_weights` renews.
    """
    twin = build_model(model.config, dtype=torch.float32, device="meta")
    tensors = sampled_weights(model)
    check_names(tensors, twin.state_dict().keys())
    # detach() keeps the memory and drops the history; to() gives the same tensor where nothing changes.
    shared = {name: tensors[name].detach().to("cpu", torch.float32) for name in tensors}
    twin.load_state_dict(shared, assign=True)
    return twin.requires_grad_(False).eval()


@torch.no_grad()
def copy_weights(model: nn.Module, into: nn.Module) -> int:
    """Bring the weights of a model into its twin, in place.

    Returns: bytes that were copied; tensors in shared memory need none. Raises: CheckpointError if the networks differ.
    """
    tensors = sampled_weights(model)
    check_names(tensors, into.state_dict().keys())
    copied = 0
    for name, own in into.state_dict().items():
        tensor = tensors[name]
        if tensor.data_ptr() != own.data_ptr():
            own.copy_(tensor)
            copied += own.numel() * own.element_size()
    return copied


def sampled_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """The tensors of a model by the names of a plain network; adapters are merged into theirs, one at a time when asked for."""
    return MergedWeights(model) if adapter_of(model) else model.state_dict()


class MergedWeights(Mapping[str, Tensor]):
    """The state of a model without its adapters' own tensors; a matrix that has one is computed when it is asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._adapter = adapter_of(model)
        parts = {name for name, module in model.named_modules() if isinstance(module, LowRank)}
        self._state = {
            name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in parts
        }

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        weight, lora = self._state[name], self._adapter.get(name)
        if lora is None:
            return weight
        if weight.ndim == 2:
            return lora.merged(weight)
        return torch.stack([lora.merged(one_NK, expert=expert) for expert, one_NK in enumerate(weight)])

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def check_names(tensors: Mapping[str, Tensor], wanted: Set[str]) -> None:
    """Raises: CheckpointError if the weights of the trained network are not those that the other one wants."""
    different = sorted(tensors.keys() ^ wanted)
    if different:
        raise CheckpointError(
            f"the trained network and the one that samples differ: {different[0]!r} is in one of the two alone. The second one is made "
            "with sampler_twin or PackedTwin; packed weights cannot be sampled from while an adapter on them learns: load them in "
            "floating point"
        )
