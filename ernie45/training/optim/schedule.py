"""The learning rate of each step: warm-up, then constant, or falling along one of several curves to a floor.

With W warm-up steps, T steps in all and m = min_lr / lr, the share of the highest rate at step t is

    t / W                          t < W
    1                              until the decay starts
    r(q) (1 - m) + m               then, with q running from 0 to 1 at step T

The decay starts at W, or with `wsd` (warm-up, stable, decay) at `decay_start`. Curves: linear 1 - q, cosine (1 + cos(pi q)) / 2,
1-sqrt 1 - sqrt(q), half_life (0.05^q - 0.05) / (1 - 0.05). Source: training reference 1.6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ernie45.errors import ConfigError

Kind = Literal["wsd", "cosine", "linear", "constant"]
Decay = Literal["half_life", "1-sqrt", "linear"]

_LEAST_HALF_LIFE = 0.05
"""What the half-life curve falls to before it is stretched to reach 0: 4.3 halvings."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The course of the learning rate."""

    kind: Kind = "wsd"
    """`wsd` (both published pre-training runs), `cosine` (tuning), `linear` or `constant`; all with warm-up."""
    steps: int | None = None
    """Steps of the whole schedule, T; later steps stay at the floor. None: those of the run."""
    warmup_steps: int = 0
    """W, at most `steps`. Step 0 of a warm-up has rate 0."""
    decay_start: int | None = None
    """Step at which `wsd` starts to fall, from W to T; None is 0.9 T, or W if that is later."""
    decay: Decay = "half_life"
    """Curve of `wsd`."""
    min_lr: float = 0.0
    """The floor, 0 up to the highest rate; not for `constant`."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"schedule is {self.kind!r}, expected one of {', '.join(get_args(Kind))}")
        if self.decay not in get_args(Decay):
            raise ConfigError(f"decay is {self.decay!r}, expected one of {', '.join(get_args(Decay))}")
        if self.warmup_steps < 0 or (self.steps is not None and (self.steps < 1 or self.warmup_steps > self.steps)):
            raise ConfigError(
                f"{self.warmup_steps} warm-up steps of {self.steps}: expected 1 step or more and a warm-up inside them"
            )
        if not 0 <= self.min_lr < math.inf:
            raise ConfigError(f"min_lr is {self.min_lr}, expected 0 or more")
        if self.kind == "constant" and self.min_lr:
            raise ConfigError(f"min_lr is {self.min_lr}, but a constant schedule never falls: leave it at 0")
        self._check_wsd()

    def _check_wsd(self) -> None:
        if self.kind != "wsd":
            if self.decay_start is not None or self.decay != "half_life":
                raise ConfigError(f"decay and decay_start belong to kind 'wsd', the schedule is {self.kind!r}")
        elif self.decay_start is not None and not self.warmup_steps <= self.decay_start <= (self.steps or math.inf):
            raise ConfigError(
                f"decay_start is {self.decay_start}, expected {self.warmup_steps} (end of warm-up) to {self.steps} (end)"
            )


class LrSchedule:
    """A function from step to learning rate, without state."""

    def __init__(self, config: ScheduleConfig, lr: float) -> None:
        """Args: lr: the highest rate. Raises: ConfigError if the floor lies above it, or the steps are not told."""
        if config.steps is None:
            raise ConfigError("the schedule has no steps: say how many")
        self._steps = config.steps
        if config.min_lr > lr:
            raise ConfigError(f"min_lr is {config.min_lr}, expected at most the learning rate {lr}")
        self.config, self.lr = config, lr

    def __call__(self, step: int) -> float:
        """Rate of a step, counted from 0."""
        config = self.config
        if step < config.warmup_steps:
            return self.lr * step / config.warmup_steps
        start = self._decay_start()
        if config.kind == "constant" or step < start:
            return self.lr
        length = self._steps - start
        progress = min(1.0, (step - start) / length) if length else 1.0
        return _left(config, progress) * (self.lr - config.min_lr) + config.min_lr

    def _decay_start(self) -> float:
        config = self.config
        if config.kind != "wsd":
            return config.warmup_steps
        return max(config.warmup_steps, 0.9 * self._steps) if config.decay_start is None else config.decay_start


def _left(config: ScheduleConfig, progress: float) -> float:
    """Share of the way down that is still to go, from 1 to 0."""
    curve = config.decay if config.kind == "wsd" else config.kind
    if curve == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if curve == "1-sqrt":
        return 1 - math.sqrt(progress)
    if curve == "half_life":
        return float((_LEAST_HALF_LIFE**progress - _LEAST_HALF_LIFE) / (1 - _LEAST_HALF_LIFE))
    return 1 - progress
