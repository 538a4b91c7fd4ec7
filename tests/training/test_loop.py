"""The loop on a problem that fits into a few lines: what it adds up, when it saves, and that going on is the same as not stopping."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ernie45.errors import ConfigError, TrainingError
from ernie45.training.interrupt import stop_on_signal
from ernie45.training.loop import LoopConfig, Parts, StepInfo, Trainer, dump_batches
from ernie45.training.objective import Loss
from ernie45.training.state import CheckpointConfig, Checkpoints, checkpoint_paths


@dataclass
class Points:
    """A batch: inputs and targets of a line."""

    x: Tensor
    origins: tuple[int, ...]


class Line:
    """The objective: fit y = 3 x, with noise from torch's generator as dropout would draw it."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise

    def collate(self, rows: Sequence[Sequence[float]]) -> Points:
        return Points(torch.tensor(rows).flatten(), tuple(range(len(rows))))

    def totals(self, batches: Sequence[Points]) -> int:
        return sum(len(batch.x) for batch in batches)

    def loss(self, network: Any, batch: Points, totals: int) -> Loss:
        x = batch.x + self.noise * torch.randn(len(batch.x))
        loss = (network.model(x[:, None])[:, 0] - 3 * batch.x).square().sum() / totals
        return Loss(total=loss, logged={"loss": loss.detach()})

    def num_tokens(self, batch: Points) -> int:
        return len(batch.x)


class Rows:
    """Numbers that follow from their place."""

    def __init__(self) -> None:
        self.at = 0

    def next_row(self) -> list[float]:
        self.at += 1
        return [math.sin(self.at), math.cos(self.at)]

    def state(self) -> dict[str, Any]:
        return {"at": self.at}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.at = state["at"]


class Momentum:
    """An optimizer with state."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        self.moments = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    def clip(self) -> float:
        return float(torch.stack([p.grad.norm() for p in self.parameters.values() if p.grad is not None]).norm())

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for name, p in self.parameters.items():
            assert p.grad is not None
            self.moments[name].mul_(0.9).add_(p.grad)
            p.sub_(lr * self.moments[name])

    def zero_grad(self) -> None:
        for p in self.parameters.values():
            p.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        return dict(self.moments)

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.moments[name].copy_(tensor)


class TensorsOf:
    """Weights of a checkpoint that are no ERNIE model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def capture(self, *, copy: bool) -> Callable[[Path], None]:
        state = {name: tensor.tolist() for name, tensor in self.model.state_dict().items()}

        def write(folder: Path) -> None:
            (folder / "w.json").write_text(json.dumps(state))

        return write

    def restore(self, folder: Path) -> None:
        state = json.loads((folder / "w.json").read_text())
        self.model.load_state_dict({name: torch.tensor(value) for name, value in state.items()})


def trainer(folder: Path, *, noise: float = 0.1, every: int = 0, schedule: Any = None, **fields: Any) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    folder.mkdir(exist_ok=True)
    parts = Parts(
        network=SimpleNamespace(model=model),
        objective=Line(noise),
        rows=Rows(),
        optimizer=Momentum(model),
        schedule=schedule or (lambda step: 0.02 / (step + 1)),
        checkpoints=Checkpoints(folder / "checkpoints", TensorsOf(model), CheckpointConfig(every=every)),
        held_out=[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]],
    )
    return Trainer(parts, LoopConfig(**({"steps": 6, "rows_per_pass": 2} | fields)), folder)


def weights(run: Trainer) -> list[float]:
    return [p.item() for p in run.parts.network.model.parameters()]


def metrics(run: Trainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_many_small_passes_make_the_step_of_a_large_one(tmp_path: Path) -> None:
    large = trainer(tmp_path / "a", noise=0.0, rows_per_pass=4)
    small = trainer(tmp_path / "b", noise=0.0, rows_per_pass=1, accumulation=4)
    large.run()
    small.run()
    assert weights(small) == pytest.approx(weights(large), rel=1e-6)
    assert [line["loss"] for line in metrics(small)] == pytest.approx(
        [line["loss"] for line in metrics(large)], rel=1e-5
    )
    assert large.tokens == small.tokens == 6 * 4 * 2


@pytest.mark.parametrize("at", [1, 3, 5])
def test_going_on_gives_the_bits_of_not_stopping(tmp_path: Path, at: int) -> None:
    whole = trainer(tmp_path / "whole")
    whole.run()
    first = trainer(tmp_path / "parts")
    assert not first.run(stop=lambda: first.step >= at)
    second = trainer(tmp_path / "parts")
    torch.manual_seed(99)
    second.resume(checkpoint_paths(tmp_path / "parts/checkpoints")[-1])
    assert second.step == at
    assert second.run()
    assert weights(second) == weights(whole)
    assert [line["loss"] for line in metrics(second)] == [line["loss"] for line in metrics(whole)]
    assert [line["tokens"] for line in metrics(second)] == [line["tokens"] for line in metrics(whole)]


def test_a_finished_run_does_nothing(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.run()
    before = weights(run)
    assert run.run()
    assert weights(run) == before


def test_saved_as_often_as_asked_and_at_the_end(tmp_path: Path) -> None:
    run = trainer(tmp_path, every=4)
    run.run()
    assert [path.name for path in checkpoint_paths(tmp_path / "checkpoints")] == ["step-00000004", "step-00000006"]


def test_logged_and_looked_at_as_often_as_asked(tmp_path: Path) -> None:
    run = trainer(tmp_path, log_every=2, eval_every=3)
    shown: list[dict[str, Any]] = []
    run.run(on_step=shown.append)
    lines = metrics(run)
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    assert [line["step"] for line in lines if "eval/loss" in line] == [3, 6]
    assert [line["lr"] for line in lines] == [0.02 / 2, 0.02 / 3, 0.02 / 4, 0.02 / 6]
    assert [line["step"] for line in shown] == [2, 3, 4, 6]
    assert all(line["tokens_per_s"] > 0 and line["memory_bytes"] > 10**6 and line["mfu"] is None for line in lines)
    assert all(0 <= line["data_share"] < 1 for line in lines)


def test_mfu_is_what_the_tokens_cost_over_what_the_machine_can(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.parts.flops_per_token, run.parts.peak_flops = 10.0, 1000.0
    run.run()
    assert all(line["mfu"] == pytest.approx(line["tokens_per_s"] / 100) for line in metrics(run))


def test_a_look_at_held_out_rows_moves_nothing(tmp_path: Path) -> None:
    looked = trainer(tmp_path / "a", eval_every=1)
    looked.run()
    not_looked = trainer(tmp_path / "b")
    not_looked.run()
    assert weights(looked) == weights(not_looked)
    expected = sum((p - 3 * x) ** 2 for x in range(1, 7) for p in [weights(looked)[0] * x + weights(looked)[1]]) / 6
    looked.parts.objective = Line(0.0)
    assert looked.evaluate() == {"eval/loss": pytest.approx(expected, rel=1e-5)}
    assert looked.parts.network.model.training


def test_what_acts_after_a_step_is_told_and_logged(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    seen: list[StepInfo] = []

    def act(info: StepInfo) -> dict[str, float]:
        seen.append(info)
        return {"extra": info.step * 2.0}

    run.parts.after_step = (act, lambda _: None)
    run.run()
    assert [info.step for info in seen] == [1, 2, 3, 4, 5, 6]
    assert [line["extra"] for line in metrics(run)] == [2, 4, 6, 8, 10, 12]
    assert [info.losses["loss"] for info in seen] == [line["loss"] for line in metrics(run)]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_before_anything_moves(tmp_path: Path, what: str) -> None:
    run = trainer(tmp_path)
    run.run(stop=lambda: run.step >= 2)
    before, moments = weights(run), {k: v.clone() for k, v in run.parts.optimizer.state_tensors().items()}
    if what == "loss":
        with torch.no_grad():
            run.parts.network.model.bias.fill_(float("nan"))
        before = weights(run)
    else:
        run.parts.optimizer.clip = lambda: float("inf")  # type: ignore[method-assign]
    message = "the loss of pass 1 is nan" if what == "loss" else "the gradient's norm is inf"
    with pytest.raises(TrainingError, match=f"step 3: {message}; nothing was moved"):
        run.run()
    assert str(weights(run)) == str(before)
    assert all(torch.equal(v, moments[k]) for k, v in run.parts.optimizer.state_tensors().items())
    dumped = load_file(tmp_path / "failed-step-00000003.safetensors")
    assert dumped["0.x"].tolist() == pytest.approx([f(i) for i in (5, 6) for f in (math.sin, math.cos)])
    assert run.step == 2


def test_a_dump_reaches_into_batches_of_batches(tmp_path: Path) -> None:
    @dataclass
    class Outer:
        inner: Points
        several: list[Tensor]

    dump_batches(tmp_path / "x.safetensors", [Outer(Points(torch.arange(2.0), (7,)), [torch.ones(1)])])
    dumped = load_file(tmp_path / "x.safetensors")
    assert {name: value.tolist() for name, value in dumped.items()} == {"0.inner.x": [0, 1], "0.several.0": [1]}
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"0.inner.origins": "[7]"}


def test_further_state_is_saved_and_put_back(tmp_path: Path) -> None:
    class Average:
        def __init__(self) -> None:
            self.value = torch.zeros(1)

        def state_tensors(self) -> dict[str, Tensor]:
            return {"value": self.value}

        def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
            self.value = tensors["value"]

    first, second = trainer(tmp_path), trainer(tmp_path)
    own, other = Average(), Average()
    own.value.fill_(5)
    first.parts.stateful, second.parts.stateful = {"ema": own}, {"ema": other}
    first.run()
    second.resume(checkpoint_paths(tmp_path / "checkpoints")[-1])
    assert other.value.tolist() == [5]


def test_the_first_signal_stops_after_the_step_and_the_second_at_once() -> None:
    told: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signal(told.append) as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        assert len(told) == 1
        assert "Ctrl-C again stops at once" in told[0]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(told) == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_settings_are_checked() -> None:
    for name in ("steps", "rows_per_pass", "accumulation", "log_every", "eval_rows"):
        with pytest.raises(ConfigError, match=f"{name} is 0, expected 1 or more"):
            LoopConfig(**({"steps": 1} | {name: 0}))
    with pytest.raises(ConfigError, match="eval_every is -1"):
        LoopConfig(steps=1, eval_every=-1)
