"""Measures what every layer keeps for the backward pass under each operation, and how long each takes, on a real batch."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ernie45.layers.moe import MoeBlock
from ernie45.training.leaves.layer import TrainingLayer
from ernie45.training.memory import LiveMemory
from ernie45.training.recompute import Cost, RecomputePlan, choices, choose, operations_of, set_recompute

_PROBES = {
    name: frozenset(name.split("+")) - {""}
    for name in ("", "norm", "attention", "norm+attention", "experts", "mlp", "layer")
}
_REPEATS = 3
_RECOMPUTED_SHARE = 2 / 3
"""Of a feed-forward block's time: two of its three matrices."""


def plan_for_budget(layers: Sequence[TrainingLayer], run: Callable[[], object], budget_bytes: int) -> RecomputePlan:
    """Choose the operations of every layer, and set them.

    Args: run: a pass forward with gradients whose result holds what waits for the backward pass. budget_bytes: of that.
    Raises: CapacityError if even whole layers computed again take more.
    """
    kept = {name: _kept(layers, run, [probe] * len(layers)) for name, probe in _PROBES.items()}
    times = _times_ms(layers, run)
    by_layer: list[list[Cost]] = []
    for i, layer in enumerate(layers):
        sizes = {name: found.get(i, 0) for name, found in kept.items()}
        by_layer.append(choices(sizes, times[i], operations_of(layer)))
    chosen = choose(by_layer, kept[""].get("", 0), budget_bytes)
    plan = [cost.operations for cost in chosen]
    return RecomputePlan(
        operations=tuple(plan),
        kept_bytes=sum(_kept(layers, run, plan).values()),
        kept_without_bytes=sum(kept[""].values()),
        extra_ms=sum(cost.extra_ms for cost in chosen),
    )


def _kept(
    layers: Sequence[TrainingLayer], run: Callable[[], object], plan: Sequence[frozenset[str]]
) -> Mapping[str | int, int]:
    """Bytes alive after a pass: by index of the layer that made them, and under the empty name what stands outside of layers."""
    for layer, operations in zip(layers, plan, strict=True):
        set_recompute(layer, operations)
    with LiveMemory() as memory, _owning(layers, memory):
        result = run()
        live = memory.live_bytes()
    del result
    return live


def _times_ms(layers: Sequence[TrainingLayer], run: Callable[[], object]) -> list[dict[str, float]]:
    """By layer, the shortest time of each of its parts in a few passes that keep everything."""
    for layer in layers:
        set_recompute(layer, frozenset())
    best: list[dict[str, float]] = [{} for _ in layers]
    for _ in range(_REPEATS):
        with _timing(layers) as passed:
            run()
        for i, found in passed.items():
            for name, ms in found.items():
                best[i][name] = min(ms, best[i].get(name, ms))
    parts = ("norm1", "norm2", "attention", "experts", "mlp", "layer")
    return [{name: found.get(name, 0.0) for name in parts} for found in best]


@contextmanager
def _owning(layers: Sequence[TrainingLayer], memory: LiveMemory) -> Iterator[None]:
    """Let the memory know which layer runs."""

    def own(owner: int | str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            memory.owner = owner

        return note

    hooks = [layer.register_forward_pre_hook(own(i)) for i, layer in enumerate(layers)]
    hooks += [layer.register_forward_hook(own("")) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _timing(layers: Sequence[TrainingLayer]) -> Iterator[Mapping[int, Mapping[str, float]]]:
    """Fill in milliseconds by layer and part while the block runs."""
    passed: defaultdict[int, dict[str, float]] = defaultdict(dict)
    hooks = []
    for i, layer in enumerate(layers):
        for name, share, module in _timed_modules(layer):
            began: list[float] = []

            def start(*_: Any, began: list[float] = began) -> None:
                began.append(time.perf_counter())

            def stop(*_: Any, began: list[float] = began, i: int = i, name: str = name, share: float = share) -> None:
                passed[i][name] = 1e3 * share * (time.perf_counter() - began.pop())

            hooks += [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
    try:
        yield passed
    finally:
        for hook in hooks:
            hook.remove()


def _timed_modules(layer: TrainingLayer) -> list[tuple[str, float, nn.Module]]:
    """Parts of a layer by the names that `recompute.choices` knows, and which share of their time computing again takes."""
    found: list[tuple[str, float, nn.Module]] = [
        ("norm1", 1.0, layer.input_layernorm),
        ("norm2", 1.0, layer.post_attention_layernorm),
        ("attention", 1.0, layer.self_attn),
        ("layer", 1.0, layer),
    ]
    if isinstance(layer.mlp, MoeBlock):
        found.append(("experts", _RECOMPUTED_SHARE, layer.mlp.experts))
        if layer.mlp.shared_experts is not None:
            found.append(("mlp", _RECOMPUTED_SHARE, layer.mlp.shared_experts))
    else:
        found.append(("mlp", _RECOMPUTED_SHARE, layer.mlp))
    return found
