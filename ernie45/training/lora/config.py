"""How adapters are set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ernie45.errors import ConfigError

Target = Literal["qkv_proj", "o_proj", "up_gate_proj", "down_proj"]
"""A matrix of a decoder layer, by the name of the network's module."""
TARGETS: tuple[Target, ...] = get_args(Target)
_FROM_RANK = -1.0
_RSLORA_ALPHA = 4.0


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What is adapted, and how far an adapter reaches. The product of its two matrices is scaled by `scale`.

    Source: training reference 3.6; rsLoRA: arXiv 2312.03732; LoRA+: arXiv 2402.12354; DoRA: arXiv 2402.09353.
    """

    rank: int = 8
    """Rows of A, columns of B; from 1 on."""
    alpha: float = -1
    """Scale times rank (times its root with `rslora`); -1: twice the rank, or 4 with `rslora`."""
    rslora: bool = False
    """Divide alpha by the root of the rank, so that high ranks learn as fast as low ones."""
    lora_plus_scale: float = 1.0
    """Times the learning rate of every B; above 0. LoRA+ uses 4 to 16."""
    dora: bool = False
    """Learn the length of every row apart from its direction; for plain linear layers alone."""
    dropout: float = 0.0
    """Share of inputs that the adapter, and it alone, does not see while training; 0 to below 1."""
    targets: tuple[Target, ...] = TARGETS
    """Matrices of the decoder layers: dense ones, shared experts and, with `experts`, routed experts."""
    experts: bool = True
    """Adapt routed experts as well, each with matrices of its own. Routers are never adapted."""
    mtp: bool = False
    """Adapt the multi-token prediction blocks as well."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise ConfigError(f"lora rank is {self.rank}: expected 1 or more")
        if not (self.alpha > 0 or self.alpha == _FROM_RANK):
            raise ConfigError(f"lora alpha is {self.alpha}: expected a number above 0, or -1 to take it from the rank")
        if not self.lora_plus_scale > 0:
            raise ConfigError(f"lora_plus_scale is {self.lora_plus_scale}: expected a number above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora dropout is {self.dropout}: expected 0 to below 1")
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            raise ConfigError(
                f"lora targets are {', '.join(map(str, self.targets)) or 'none'}: expected some of {', '.join(TARGETS)}"
            )

    @property
    def resolved_alpha(self) -> float:
        """Alpha as a number above 0."""
        if self.alpha != _FROM_RANK:
            return self.alpha
        return _RSLORA_ALPHA if self.rslora else 2.0 * self.rank


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """What the product of the two matrices is multiplied by."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank
