"""Adapters of a network: made, put in place, found again, switched off, merged.

    add_lora(model, LoraConfig(rank=16), seed=0)
    optimizer over lora_parameters(model); LoRA+ is the optimizer's `lora_plus_scale`
    with adapter_off(model): ...            # the frozen network, such as the reference of DPO
    merge(model)                            # a plain network again

An `Adapter` is its low-rank parts by the name of the network's parameter that each belongs to, wherever the network is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ernie45.errors import ConfigError
from ernie45.models.text import CausalLM
from ernie45.training.lora.config import LoraConfig
from ernie45.training.lora.experts import AdaptedExperts, LoraExperts
from ernie45.training.lora.linear import LoraLinear
from ernie45.training.lora.low_rank import Block, LowRank
from ernie45.training.lora.packed import FrozenPackedLinear, PackedLoraExperts, PackedLoraLinear, restore_leaves

Adapter = dict[str, LowRank]
"""By parameter: `model.layers.0.self_attn.qkv_proj.weight`, `model.layers.1.mlp.experts.down_proj`."""

_UP_GATE, _DOWN = "up_gate_proj", "down_proj"


def add_lora(model: CausalLM, config: LoraConfig, seed: int) -> Adapter:
    """Put a new adapter into a network and freeze everything else, in place; a packed network's leaves are made to train.

    The network computes what it did before, as every B is zero. Call it before training leaves are put in place.
    Raises: ConfigError if nothing fits `config`, the network has an adapter already, or DoRA meets experts or packed weights.
    """
    if any(True for _ in adapted_leaves(model)):
        raise ConfigError("the network has an adapter already: merge it first")
    restore_leaves(model)
    adapter = _new_adapter(model, config, seed)
    put_adapter(model, adapter)
    return adapter


def put_adapter(model: CausalLM, adapter: Adapter) -> None:
    """Put low-rank parts beside their matrices and freeze everything else, in place; they are shared, not copied.

    Raises: ConfigError if a part belongs to no matrix of this network.
    """
    restore_leaves(model)
    left = dict(adapter)
    leaves = [(name, leaf) for name, module in model.named_modules() if (leaf := _leaf(name, module, left)) is not None]
    if left:
        raise ConfigError(f"the adapter is for another network: this one has no {', '.join(sorted(left)[:4])}")
    model.requires_grad_(False)
    for name, leaf in leaves:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, leaf.train(model.training))
    for lora in adapter.values():
        lora.requires_grad_(True)
        lora.to(model.device)


def adapter_of(model: nn.Module) -> Adapter:
    """The low-rank parts in a network, empty if it has none."""
    return {name: lora for leaf, prefix in adapted_leaves(model) for name, lora in _parts(leaf, prefix)}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What learns: the adapter's parameters by their names in the network."""
    return {
        f"{name}.{part}": parameter
        for name, module in model.named_modules()
        if isinstance(module, LowRank)
        for part, parameter in module.named_parameters()
    }


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Within the block the network computes as if it had no adapter. Raises: ConfigError if it has none."""
    leaves = [leaf for leaf, _ in adapted_leaves(model)]
    if not leaves:
        raise ConfigError("the network has no adapter to switch off: its reference must be a network of its own")
    before = [leaf.enabled for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.enabled = False
        yield
    finally:
        for leaf, enabled in zip(leaves, before, strict=True):
            leaf.enabled = enabled


def merge(model: CausalLM) -> None:
    """Add the adapter to the weights, in place, and put plain leaves back; everything stays frozen.

    Weights keep their dtype: the sum is formed in float32 and rounded once. Packed matrices that have no adapter stay packed.
    Raises: ConfigError if there is no adapter.
    """
    leaves = list(adapted_leaves(model))
    if not leaves:
        raise ConfigError("the network has no adapter to merge")
    for leaf, prefix in leaves:
        parent, _, last = prefix.rpartition(".")
        setattr(model.get_submodule(parent), last, leaf.merged())


def adapted_leaves(model: nn.Module) -> Iterator[tuple[LoraLinear | AdaptedExperts, str]]:
    """The leaves that hold a part of an adapter, with their names."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear) or (
            isinstance(module, AdaptedExperts) and (module.up_gate_lora or module.down_lora)
        ):
            yield module, name


def _parts(leaf: LoraLinear | AdaptedExperts, prefix: str) -> Iterator[tuple[str, LowRank]]:
    if isinstance(leaf, LoraLinear):
        yield f"{prefix}.weight", leaf.lora
        return
    for name, lora in ((_UP_GATE, leaf.up_gate_lora), (_DOWN, leaf.down_lora)):
        if lora is not None:
            yield f"{prefix}.{name}", lora


def _new_adapter(model: CausalLM, config: LoraConfig, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    adapter: Adapter = {}
    for name, module in model.named_modules():
        if _in_scope(name, config):
            adapter |= _new_parts(name, module, config)
    if not adapter:
        raise ConfigError(
            f"nothing to adapt: the network has no {', '.join(config.targets)} in its layers: choose other lora targets"
        )
    for lora in adapter.values():
        lora.initialize(generator)
    return adapter


def _in_scope(name: str, config: LoraConfig) -> bool:
    return name.startswith(("model.layers.", "model.mtp_block.") if config.mtp else "model.layers.")


def _new_parts(name: str, module: nn.Module, config: LoraConfig) -> Adapter:
    """New low-rank parts for a leaf, none if it is not adapted."""
    last = name.rpartition(".")[2]
    if last == "experts" and config.experts:
        shapes = _expert_shapes(module)
        return {f"{name}.{t}": _new(shapes[t], config) for t in config.targets if t in shapes}
    if last not in config.targets or not isinstance(module, nn.Linear | FrozenPackedLinear):
        return {}
    if isinstance(module, FrozenPackedLinear):
        if config.dora:
            raise ConfigError(
                f"{name} is packed, and DoRA needs plain weights: set lora dora to false, or train the plain model"
            )
        return {f"{name}.weight": _new((module.matrix.rows, module.matrix.columns), config)}
    lora = _new((module.out_features, module.in_features), config)
    if config.dora:
        lora.learn_magnitude(module.weight)
    return {f"{name}.weight": lora}


def _new(shape: tuple[int, ...], config: LoraConfig) -> LowRank:
    """Args: shape: (N, K), or (E, N, K) of experts."""
    *lead, rows, columns = shape
    if lead and config.dora:
        raise ConfigError("DoRA is for plain linear layers: set lora experts to false, or dora to false")
    return LowRank(
        rows,
        columns,
        [Block(rows=(0, rows), ranks=(0, config.rank), alpha=config.resolved_alpha, rslora=config.rslora)],
        num_experts=lead[0] if lead else None,
        dropout=config.dropout,
    )


def _expert_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the stacked matrices by name; any leaf that holds them as `layers.moe.Experts` does will do."""
    if isinstance(module, PackedLoraExperts):
        first = module.matrices[0]
        return {
            name: (len(module.matrices), matrix.rows, matrix.columns)
            for name, matrix in zip((_UP_GATE, _DOWN), first, strict=True)
        }
    found = {name: getattr(module, name, None) for name in (_UP_GATE, _DOWN)}
    return {name: tuple(tensor.shape) for name, tensor in found.items() if isinstance(tensor, nn.Parameter)}


def _leaf(name: str, module: nn.Module, left: Adapter) -> nn.Module | None:
    """The leaf with the parts that belong to a module, which are taken out of `left`; None if none do."""
    shapes = _expert_shapes(module)
    up_gate, down = left.pop(f"{name}.{_UP_GATE}", None), left.pop(f"{name}.{_DOWN}", None)
    if up_gate is not None or down is not None:
        if not shapes:
            raise ConfigError(f"the adapter is for another network: {name} holds no stacked experts here")
        if isinstance(module, PackedLoraExperts):
            return PackedLoraExperts(module.matrices, up_gate, down)
        return LoraExperts(module, up_gate, down)  # type: ignore[arg-type]  # its shapes were found above
    if f"{name}.weight" in left:
        if isinstance(module, FrozenPackedLinear):
            return PackedLoraLinear(module, left.pop(f"{name}.weight"))
        if isinstance(module, nn.Linear):
            return LoraLinear(module, left.pop(f"{name}.weight"))
    return None
