"""The one training loop. Data, loss, optimizer and network are parts that are handed in; the loop only knows their shapes.

A step: take rows, make micro-batches, add up their gradients, look at loss and gradient before anything moves, step, let those act that
act by rule (balance of experts), log, save. Everything that the next step depends on is in a checkpoint, so a run that was killed and
goes on gives the same bits as one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ernie45.checkpoint.safetensors import write_tensors
from ernie45.errors import ConfigError, TrainingError
from ernie45.training.metrics import MetricsFile
from ernie45.training.objective import Objective, RowStream
from ernie45.training.resident import memory_bytes
from ernie45.training.state import Checkpoints, Snapshot, random_state, set_random_state


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How many steps of how many rows, and how often something is said."""

    steps: int | None = None
    """Optimizer steps of the whole run."""
    epochs: float | None = None
    """Instead of steps: how often the run goes over its rows, above 0. They are counted before it begins. Not for upo."""
    rows_per_pass: int = 1
    """Packed rows of one forward and backward pass: the micro-batch."""
    accumulation: int = 1
    """Passes whose gradients are added up before a step."""
    seed: int = 0
    """Of weights that start at random, dropout, and the order of the data."""
    log_every: int = 1
    """Steps between two lines of metrics."""
    eval_every: int = 0
    """Steps between two looks at held-out rows, 0 for none."""
    eval_rows: int = 32
    """Held-out rows of such a look; always the same ones."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(f"steps is {self.steps} and epochs is {self.epochs}: set exactly one of the two")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ConfigError(f"epochs is {self.epochs}, expected a number above 0")
        for name in ("steps", "rows_per_pass", "accumulation", "log_every", "eval_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, expected 1 or more")
        if self.eval_every < 0:
            raise ConfigError(f"eval_every is {self.eval_every}, expected 0 or more")

    @property
    def rows_per_step(self) -> int:
        """Packed rows of one optimizer step."""
        return self.rows_per_pass * self.accumulation


class Optimizer(Protocol):
    """What the loop wants of an optimizer; `optim.build_optimizer` gives one."""

    def clip(self) -> float:
        """Norm of all gradients, which are then scaled down to the limit."""

    def step(self, lr: float) -> None:
        """Move the parameters."""

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and masters."""

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put them back, bit for bit."""


class Stateful(Protocol):
    """A further part of a run whose tensors belong into checkpoints: weight averages, a critic."""

    def state_tensors(self) -> dict[str, Tensor]:
        """What to keep."""

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put it back, bit for bit."""


@dataclass(kw_only=True)
class Parts:
    """What a run is made of."""

    network: Any
    """A `training.network.TrainingNetwork`: what the objective runs."""
    objective: Objective[Any, Any]
    rows: RowStream[Any]
    optimizer: Optimizer
    schedule: Callable[[int], float]
    """Learning rate of a step, counted from 0."""
    checkpoints: Checkpoints
    after_step: Sequence[Callable[[StepInfo], Mapping[str, Any] | None]] = ()
    """Called when the parameters have moved: balance by rule, weight averages. What they return is logged."""
    held_out: Sequence[Any] = ()
    """Rows of the looks at held-out data."""
    stateful: Mapping[str, Stateful] = field(default_factory=dict)
    """Further state by file name in the checkpoint."""
    flops_per_token: float | None = None
    peak_flops: float | None = None
    """Multiplications and additions per second of the machine; with the field above, MFU is logged."""


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What happened in a step."""

    step: int
    """Counted from 1: steps done."""
    losses: Mapping[str, float]
    lr: float
    grad_norm: float


class Trainer:
    """A run: from a step to the last one, with everything that must not be lost in its folder."""

    def __init__(self, parts: Parts, config: LoopConfig, folder: Path) -> None:
        """Args: config: with steps; `length.py` has made them of epochs."""
        assert config.steps is not None, "epochs are turned into steps before"
        self.parts, self.config, self.folder = parts, config, folder
        self.num_steps = config.steps
        """Steps of the whole run."""
        self.step = 0
        """Steps done."""
        self.tokens = 0
        """Tokens read by the network in all."""
        self._seconds = 0.0
        torch.manual_seed(config.seed)

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint: weights, optimizer, data, random numbers, counters. Raises: CheckpointError."""
        snapshot = self.parts.checkpoints.restore(checkpoint)
        groups = dict(snapshot.tensors)
        self.parts.optimizer.load_state_tensors(groups.get("optimizer", {}))
        for name, part in self.parts.stateful.items():
            part.load_state_tensors(groups.get(name, {}))
        set_random_state(groups["rng"]["torch"])
        self.parts.rows.restore(snapshot.values["rows"])
        self.step, self.tokens = snapshot.step, snapshot.values["tokens"]
        self._seconds = snapshot.values["seconds"]

    def run(
        self, *, stop: Callable[[], bool] = lambda: False, on_step: Callable[[dict[str, Any]], None] | None = None
    ) -> bool:
        """Train until the last step, or until `stop` says so after one; saved in both cases.

        Args: on_step: called with what was logged, and with the figures of a look at held-out rows.
        Returns: whether the last step was done. Raises: TrainingError when loss or gradient is not finite.
        """
        metrics = MetricsFile(self.folder, after_step=self.step)
        every = self.parts.checkpoints.every
        saved = self.step
        while self.step < self.num_steps and not stop():
            line = self._timed_step()
            if self._due(self.config.eval_every):
                line |= self.evaluate()
            if self._due(self.config.log_every) or any(name.startswith("eval/") for name in line):
                metrics.write(line)
                if on_step is not None:
                    on_step(line)
            if every and self.step % every == 0:
                self.save()
                saved = self.step
        if saved != self.step:
            self.save()
        self.parts.checkpoints.wait()
        return self.step >= self.num_steps

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        tensors = {
            "optimizer": self.parts.optimizer.state_tensors(),
            "rng": {"torch": random_state()},
            **{name: part.state_tensors() for name, part in self.parts.stateful.items()},
        }
        values = {"rows": self.parts.rows.state(), "tokens": self.tokens, "seconds": self._seconds}
        self.parts.checkpoints.save(
            Snapshot(step=self.step, values=values, tensors={name: group for name, group in tensors.items() if group})
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Losses of the held-out rows, as `eval/loss` and so on; moves nothing, not even random numbers."""
        state = random_state()
        model = self.parts.network.model
        model.eval()
        per_pass = self.config.rows_per_pass
        rows = self.parts.held_out
        batches = [self.parts.objective.collate(rows[i : i + per_pass]) for i in range(0, len(rows), per_pass)]
        losses: dict[str, float] = {}
        try:
            totals = self.parts.objective.totals(batches)
            for batch in batches:
                _add(losses, self.parts.objective.loss(self.parts.network, batch, totals).logged)
        finally:
            model.train()
            set_random_state(state)
        return {f"eval/{name}": value for name, value in losses.items()}

    def _due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self.num_steps)

    def _timed_step(self) -> dict[str, Any]:
        start = time.perf_counter()
        lr = self.parts.schedule(self.step)
        batches = self._batches()
        waited = time.perf_counter() - start
        info = self._step(batches, lr)
        extra: dict[str, Any] = {}
        for act in self.parts.after_step:
            extra |= act(info) or {}
        seconds = time.perf_counter() - start
        num_tokens = sum(self.parts.objective.num_tokens(batch) for batch in batches)
        self.tokens += num_tokens
        self._seconds += seconds
        return {
            "step": self.step,
            "time_s": round(self._seconds, 3),
            "tokens": self.tokens,
            **info.losses,
            "lr": lr,
            "grad_norm": info.grad_norm,
            "tokens_per_s": num_tokens / seconds,
            "mfu": self._mfu(num_tokens / seconds),
            "data_share": waited / seconds,
            "memory_bytes": memory_bytes(),
            **extra,
        }

    def _batches(self) -> list[Any]:
        """The micro-batches of a step: always the same rows in the same order, however they are grouped."""
        size = self.config.rows_per_pass
        rows = [self.parts.rows.next_row() for _ in range(self.config.rows_per_step)]
        return [self.parts.objective.collate(rows[i : i + size]) for i in range(0, len(rows), size)]

    def _step(self, batches: Sequence[Any], lr: float) -> StepInfo:
        totals = self.parts.objective.totals(batches)
        losses: dict[str, float] = {}
        for index, batch in enumerate(batches):
            loss = self.parts.objective.loss(self.parts.network, batch, totals)
            if not math.isfinite(loss.total.item()):
                self._refuse(f"the loss of pass {index + 1} is {loss.total.item()}", batches)
            loss.total.backward()
            _add(losses, loss.logged)
        grad_norm = self.parts.optimizer.clip()
        if not math.isfinite(grad_norm):
            self._refuse(f"the gradient's norm is {grad_norm}", batches)
        self.parts.optimizer.step(lr)
        self.parts.optimizer.zero_grad()
        self.step += 1
        return StepInfo(step=self.step, losses=losses, lr=lr, grad_norm=grad_norm)

    def _refuse(self, what: str, batches: Sequence[Any]) -> None:
        """Stop before the parameters move, and leave the step's batches for whoever looks for the reason."""
        step = self.step + 1
        path = self.folder / f"failed-step-{step:08d}.safetensors"
        dump_batches(path, batches)
        raise TrainingError(
            f"step {step}: {what}; nothing was moved, the step's batches are in {path}. Resume from the last checkpoint with a lower "
            "learning rate, or leave out the rows that the file names"
        )

    def _mfu(self, tokens_per_s: float) -> float | None:
        flops, peak = self.parts.flops_per_token, self.parts.peak_flops
        return None if flops is None or peak is None else flops * tokens_per_s / peak


def dump_batches(path: Path, batches: Sequence[Any]) -> None:
    """Write every tensor of some batches as `<batch>.<field>`, with the fields that are no tensors in the header."""
    tensors: dict[str, Tensor] = {}
    words: dict[str, str] = {}
    for name, value in _leaves(list(batches), ""):
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            words[name] = json.dumps(value, default=str)
    write_tensors(path, tensors, metadata=words)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What a batch holds below lists and dataclasses that hold tensors, by its path."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts: Iterable[tuple[Any, Any]] = (
            (item.name, getattr(value, item.name)) for item in dataclasses.fields(value)
        )
    elif isinstance(value, list | tuple) and any(
        isinstance(part, Tensor) or dataclasses.is_dataclass(part) for part in value
    ):
        parts = enumerate(value)
    else:
        yield path, value
        return
    for name, part in parts:
        yield from _leaves(part, f"{path}.{name}" if path else str(name))


def _add(sums: dict[str, float], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value.item()
