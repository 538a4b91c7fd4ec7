"""What of a pass is computed again in the backward pass instead of being kept: chosen by name, or by bytes saved per millisecond.

Recomputation is set from outside on the training leaves; results and gradients have the same bits with and without it.

| operation | is not kept | is computed again |
|---|---|---|
| `norm` | outputs of both norms | both norms |
| `attention` | everything between the residual stream and the output projection | first norm, q/k/v product, attention |
| `experts` | products with gate and up of routed experts | those products |
| `mlp` | the same of dense layers and shared experts | those products |
| `layer` | everything but the layer's input | the whole layer |

Source: training reference 2.3, 2.6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from ernie45.errors import CapacityError, ConfigError
from ernie45.training.leaves.experts import TrainingExperts
from ernie45.training.leaves.layer import TrainingLayer
from ernie45.training.leaves.swiglu import TrainingSwiGLU

OPERATIONS = ("norm", "attention", "experts", "mlp", "layer")
_PARTS = OPERATIONS[:-1]


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """How much is computed again."""

    policy: Literal["none", "full", "selective", "auto"] = "none"
    """`none`: everything is kept. `full`: every layer keeps its input alone. `selective`: the operations below, in every layer.
    `auto`: as little as brings the activations of the first batch under `budget_bytes`, cheapest per byte first."""
    selective: tuple[str, ...] = ()
    """With `selective` alone: some of `norm`, `attention`, `experts`, `mlp`, `layer`."""
    budget_bytes: int | None = None
    """With `auto` alone: bytes of the activations that wait for the backward pass; weights, gradients and the head's are not in it."""

    def __post_init__(self) -> None:
        if self.policy not in ("none", "full", "selective", "auto"):
            raise ConfigError(f"recompute policy is {self.policy!r}, expected none, full, selective or auto")
        if (self.policy == "selective") != bool(self.selective):
            raise ConfigError(
                f"recompute policy {self.policy!r} with operations {self.selective}: name some with policy 'selective' and none "
                "with any other"
            )
        unknown = [name for name in self.selective if name not in OPERATIONS]
        if unknown:
            raise ConfigError(
                f"recompute operation {unknown[0]!r} is unknown, expected some of {', '.join(OPERATIONS)}"
            )
        if (self.policy == "auto") != (self.budget_bytes is not None):
            raise ConfigError(
                f"recompute policy {self.policy!r} with budget_bytes {self.budget_bytes}: give a budget with policy 'auto' and "
                "none with any other"
            )
        if self.budget_bytes is not None and self.budget_bytes < 1:
            raise ConfigError(f"budget_bytes is {self.budget_bytes}, expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class RecomputePlan:
    """What was chosen under a budget."""

    operations: tuple[frozenset[str], ...]
    """Of every layer, those of the prediction blocks last."""
    kept_bytes: int
    """Activations of the measured batch under this plan."""
    kept_without_bytes: int
    """The same if nothing were computed again."""
    extra_ms: float
    """Time of what is computed again, as measured in the forward pass."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A layer under one choice of operations."""

    operations: frozenset[str]
    kept_bytes: int
    extra_ms: float


def set_recompute(layer: TrainingLayer, operations: frozenset[str]) -> None:
    """Tell a layer and its leaves what to compute again; what was said before is forgotten."""
    layer.recomputed = operations & {"layer", "attention", "norm"}
    inside_a_layer = "layer" in operations  # nothing is kept there anyway
    for module in layer.modules():
        if isinstance(module, TrainingExperts):
            module.keeps_products = "experts" not in operations or inside_a_layer
        elif isinstance(module, TrainingSwiGLU):
            module.keeps_products = "mlp" not in operations or inside_a_layer


def operations_of(layer: TrainingLayer) -> tuple[str, ...]:
    """The parts that this layer has."""
    has = {
        "experts": any(isinstance(module, TrainingExperts) for module in layer.modules()),
        "mlp": any(isinstance(module, TrainingSwiGLU) for module in layer.modules()),
    }
    return tuple(name for name in _PARTS if has.get(name, True))


def named_operations(config: RecomputeConfig, layers: Sequence[TrainingLayer]) -> tuple[frozenset[str], ...]:
    """Operations of every layer under a policy other than `auto`. Raises: ConfigError if one is in no layer."""
    named = frozenset({"layer"} if config.policy == "full" else config.selective)
    existing = {"layer"}.union(*(operations_of(layer) for layer in layers))
    for name in sorted(named - existing):
        raise ConfigError(f"recompute operation {name!r} is in no layer of this network: leave it out")
    return tuple(named & {"layer", *operations_of(layer)} for layer in layers)


def choices(kept: Mapping[str, int], times_ms: Mapping[str, float], parts: Sequence[str]) -> list[Cost]:
    """Every sensible choice for a layer.

    Args: kept: bytes that it keeps under single operations, under `norm+attention`, and under none (empty name). times_ms: of
        `norm1`, `norm2`, `attention` without its norm, `experts`, `mlp`, `layer`. parts: the operations that it has.
    """
    found = [Cost(operations=frozenset({"layer"}), kept_bytes=kept["layer"], extra_ms=times_ms["layer"])]
    for count in range(len(parts) + 1):
        for chosen in combinations(parts, count):
            # The first norm is in both `norm` and `attention`; the rest is independent, so that savings add up.
            joint = [name for name in ("norm", "attention") if name in chosen]
            size = kept["+".join(joint)] - sum(kept[""] - kept[name] for name in chosen if name not in joint)
            time = sum(times_ms[name] for name in chosen if name != "norm") + (times_ms["norm1"] if joint else 0.0)
            time += times_ms["norm2"] if "norm" in chosen else 0.0
            found.append(Cost(operations=frozenset(chosen), kept_bytes=size, extra_ms=time))
    return found


def choose(layers: Sequence[Sequence[Cost]], fixed_bytes: int, budget_bytes: int) -> list[Cost]:
    """One choice per layer that keeps the bytes within the budget and costs little time.

    Goes down each layer's line of best choices, always the step that saves most bytes per millisecond, and then takes back what turned
    out not to be needed. Args: fixed_bytes: kept whatever is chosen. Raises: CapacityError if no choice keeps the budget.
    """
    least = fixed_bytes + sum(min(cost.kept_bytes for cost in costs) for costs in layers)
    if least > budget_bytes:
        raise CapacityError(
            f"activations of the first batch take at least {least} bytes with everything computed again, the budget is "
            f"{budget_bytes}: raise budget_bytes or make the batch smaller"
        )
    lines = [_line(costs) for costs in layers]
    at = [0] * len(lines)
    total = fixed_bytes + sum(line[0].kept_bytes for line in lines)
    while total > budget_bytes:
        layer = max(
            (i for i, line in enumerate(lines) if at[i] + 1 < len(line)),
            key=lambda i: _bytes_per_ms(lines[i][at[i]], lines[i][at[i] + 1]),
        )
        total -= lines[layer][at[layer]].kept_bytes - lines[layer][at[layer] + 1].kept_bytes
        at[layer] += 1
    return _taken_back([line[i] for line, i in zip(lines, at, strict=True)], layers, budget_bytes - total)


def _line(costs: Sequence[Cost]) -> list[Cost]:
    """From what takes no extra time, the choices by which bytes fall fastest over time, down to the fewest bytes."""
    line = [min(costs, key=lambda cost: (cost.extra_ms, cost.kept_bytes))]
    while better := [cost for cost in costs if cost.kept_bytes < line[-1].kept_bytes]:
        line.append(max(better, key=lambda cost: (_bytes_per_ms(line[-1], cost), -cost.kept_bytes)))
    return line


def _bytes_per_ms(one: Cost, other: Cost) -> float:
    return (one.kept_bytes - other.kept_bytes) / max(other.extra_ms - one.extra_ms, 1e-6)


def _taken_back(chosen: list[Cost], layers: Sequence[Sequence[Cost]], spare_bytes: int) -> list[Cost]:
    """Replace choices by quicker ones while they fit into the bytes that are left."""
    while True:
        swaps = [
            (chosen[i].extra_ms - cost.extra_ms, i, cost)
            for i, costs in enumerate(layers)
            for cost in costs
            if cost.extra_ms < chosen[i].extra_ms and cost.kept_bytes - chosen[i].kept_bytes <= spare_bytes
        ]
        if not swaps:
            return chosen
        _, layer, cost = max(swaps, key=lambda swap: swap[0])
        spare_bytes -= cost.kept_bytes - chosen[layer].kept_bytes
        chosen[layer] = cost
