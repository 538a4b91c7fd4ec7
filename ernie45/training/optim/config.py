"""How the weights are moved. The defaults are those of both published pre-training runs (training reference 1.6)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from ernie45.errors import ConfigError

OptimizerName = Literal["adamw", "muon"]
StateDtype = Literal["float32", "bfloat16", "int8"]
MuonScale = Literal["match_rms_adamw", "original"]


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon's own settings; see `muon.py`."""

    momentum: float = 0.95
    """Share of the old average in the new one, 0 to below 1."""
    nesterov: bool = True
    """Look one step ahead: mix the gradient into the average once more."""
    steps: int = 5
    """Newton-Schulz iterations, 1 or more."""
    scale: MuonScale = "match_rms_adamw"
    """Size of the update of an R x C matrix: `match_rms_adamw` is 0.2 sqrt(max(R, C)), so that learning rate and decay of AdamW
    serve both; `original` is sqrt(max(1, R / C))."""
    split_qkv: bool = True
    """Make queries, keys and values orthogonal each on their own, although one matrix holds them."""
    split_up_gate: bool = True
    """The same for gate and up rows of feed-forward layers and experts."""

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"Muon's momentum is {self.momentum}, expected 0 to below 1")
        if self.steps < 1:
            raise ConfigError(f"Muon's steps are {self.steps}, expected 1 or more")
        _check_choice("Muon's scale", self.scale, get_args(MuonScale))


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer of a run."""

    name: OptimizerName = "adamw"
    """`muon` moves the matrices inside the layers with Muon and everything else with AdamW."""
    lr: float = 3e-4
    """Highest learning rate; `LrSchedule` takes it from here and hands each step its own."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Shares of the old averages of gradient and squared gradient, 0 to below 1."""
    eps: float = 1e-8
    """Added to the root of the averaged square, above 0."""
    weight_decay: float = 0.1
    """Weights shrink by lr times this in every step, except vectors and those whose name holds `bias` or `norm`."""
    clip: float | None = 1.0
    """Highest norm of all gradients together; larger ones are scaled down to it. None: never."""
    gate_lr_ratio: float = 1.0
    """Learning rate of every router, text or vision, as a share of the others'. Published runs use 0.01 or 1."""
    layerwise_lr_decay_bound: float = 1.0
    """Learning rate of the embedding as a share of the head's, above 0 up to 1; layers lie on the line between. 1 is off."""
    lora_plus_scale: float = 1.0
    """Learning rate of LoRA's B matrices as a multiple of the A matrices' (LoRA+)."""
    state_dtype: StateDtype = "float32"
    """What moments are kept in; the narrow ones are rounded at random, see `moments.py`."""
    master_weights: bool = True
    """Keep float32 copies of parameters that are narrower. Without, their updates are rounded at random into bfloat16."""
    muon: MuonConfig = field(default_factory=MuonConfig)

    def __post_init__(self) -> None:
        _check_choice("optimizer", self.name, get_args(OptimizerName))
        _check_choice("state_dtype", self.state_dtype, get_args(StateDtype))
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ConfigError(f"betas are {self.betas}, expected 0 to below 1 each")
        for name in ("lr", "eps", "gate_lr_ratio", "lora_plus_scale", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}, expected above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay is {self.weight_decay}, expected 0 or more")
        if not 0 < self.layerwise_lr_decay_bound <= 1:
            raise ConfigError(
                f"layerwise_lr_decay_bound is {self.layerwise_lr_decay_bound}, expected above 0 up to 1 (1 is off)"
            )
        if self.name != "muon" and self.muon != MuonConfig():
            raise ConfigError(f"settings of Muon are given but the optimizer is {self.name!r}: set name to 'muon'")


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{what} is {value!r}, expected one of {', '.join(choices)}")
