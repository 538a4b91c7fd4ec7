"""`ernie train`."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ernie45.cli.output import ProgressBar, human_bytes, human_count, note
from ernie45.config.run_file import describe, dump_run, read_run_file
from ernie45.errors import UsageError
from ernie45.models.text import CausalLM
from ernie45.processing.tokenizer import Tokenizer
from ernie45.store import api
from ernie45.store.trained import find_trained
from ernie45.training.allocator import keep_freed_memory, return_freed_memory, use_huge_pages
from ernie45.training.config import RunConfig
from ernie45.training.erniekit import convert_erniekit
from ernie45.training.interrupt import stop_on_signal
from ernie45.training.packed_twin import PackedTwin
from ernie45.training.rollout import Generator, LlmGenerator
from ernie45.training.run import Run, prepare
from ernie45.training.run_tables import duration
from ernie45.training.sampler_weights import sampler_twin
from ernie45.training.upo_config import SamplingWeights


def run(options: argparse.Namespace) -> int:
    """Train, or print what a run file may hold, or turn an ERNIEKit file into one."""
    if options.schema:
        print(describe(RunConfig), end="")
        return 0
    if options.from_erniekit is not None:
        return _convert(options.from_erniekit)
    if options.config is None:
        raise UsageError("name a run file, as in `ernie train run.yaml`; --schema prints what it may hold")
    config = read_run_file(options.config, RunConfig, options.settings)
    folder = Path(options.run or Path("runs") / Path(options.config).stem)
    use_huge_pages()
    if not config.returns_memory:
        keep_freed_memory()
    elif not return_freed_memory():
        note("returns_memory has no effect: this system's C library has no such setting")
    with ProgressBar() as bar:
        prepared = prepare(config, folder, _Store(), progress=bar.stage)
    for line in prepared.notes:
        note(line)
    note(_head(prepared))
    screen = _Screen(prepared)
    try:
        with stop_on_signal(screen.say) as stop:
            finished = prepared.trainer.run(stop=stop, on_step=screen.show)
    finally:
        screen.end()
        prepared.close()
    step = prepared.trainer.step
    if finished:
        note(f"done: {step} steps, {human_count(prepared.trainer.tokens)} tokens, in {folder}")
    else:
        note(f"saved after step {step} of {prepared.trainer.num_steps}; the same command goes on from there")
    return 0


class _Store:
    """The models of this machine, and the engine: what training is handed."""

    def load_model(self, name: str, dtype: str, progress: Callable[[int, int], None] | None) -> CausalLM:
        """See `run.Library`; takes the folder of a run as well, whose newest checkpoint it is then."""
        return api.load_model(_weights(name), dtype, progress=progress)

    def load_tokenizer(self, name: str, chat_format: str | None) -> Tokenizer:
        """See `run.Library`."""
        return api.load_tokenizer(_weights(name), chat_format=chat_format)

    def address(self, name: str) -> str:
        """See `run.Library`."""
        return str(_weights(name).resolve()) if Path(name).expanduser().exists() else name

    def generator(self, model: CausalLM, tokenizer: Tokenizer, weights: SamplingWeights) -> Generator:
        """See `run.Library`."""
        from ernie45.engine.params import SamplingParams
        from ernie45.llm import LLM

        twin = PackedTwin(model) if weights == "wint8" else None
        network = sampler_twin(model) if twin is None else twin.network
        # A fixed number, where serving goes by the clock: equal rollouts need equal steps.
        llm = LLM(network, tokenizer=tokenizer, max_step_tokens_beside_decodes=512)
        return LlmGenerator(llm, params=SamplingParams, renew=None if twin is None else twin.renew)


def _weights(name: str) -> Path:
    trained = find_trained(name)
    if trained.adapter is not None:
        raise UsageError(
            f"{name} holds an adapter: make a model of it first, `ernie export {name} DIR --merge --to pt`"
        )
    return trained.base


def _convert(path: str) -> int:
    converted = convert_erniekit(path)
    print(dump_run(converted.config), end="")
    for line in converted.report:
        note(line)
    return 0


def _head(prepared: Run) -> str:
    size = f"{human_count(prepared.num_parameters)} parameters"
    if prepared.config.lora is not None:
        size += f", {human_count(prepared.num_trained)} of them trained"
    elif prepared.num_active != prepared.num_parameters:
        size += f", {human_count(prepared.num_active)} active per token"
    begun = f"goes on after step {prepared.trainer.step}" if prepared.trainer.step else "begins"
    return (
        f"{prepared.config.method} of {size}, {prepared.trainer.num_steps} steps; {begun} in {prepared.trainer.folder}"
    )


class _Screen:
    """The live line: redrawn on a terminal, elsewhere a line per logged step."""

    def __init__(self, prepared: Run) -> None:
        self._steps = prepared.trainer.num_steps
        self._first: tuple[int, float] | None = None
        self._open = False

    def show(self, line: dict[str, Any]) -> None:
        """Show a step's figures."""
        self._first = self._first or (line["step"], line["time_s"])
        text = step_line(line, self._steps, self._remaining(line))
        if not sys.stderr.isatty():
            note(text)
            return
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]}\x1b[K", end="", file=sys.stderr, flush=True)
        self._open = True
        if any(name.startswith("eval/") for name in line):
            self.end()

    def say(self, message: str) -> None:
        """Say something between two lines."""
        self.end()
        note(message)

    def end(self) -> None:
        """Close a line that is still open."""
        if self._open:
            print(file=sys.stderr, flush=True)
            self._open = False

    def _remaining(self, line: dict[str, Any]) -> float | None:
        assert self._first is not None, "set by show"
        steps, seconds = line["step"] - self._first[0], line["time_s"] - self._first[1]
        return seconds / steps * (self._steps - line["step"]) if steps else None


def step_line(line: dict[str, Any], steps: int, remaining_s: float | None) -> str:
    """One step in one line: loss parts, learning rate, gradient, speed, time left, memory."""
    losses = [name for name in line if name == "loss" or name.endswith("_loss") or name == "eval/loss"]
    parts = [f"step {line['step']}/{steps}"]
    parts += [f"{name.removesuffix('_loss')} {line[name]:.4g}" for name in losses]
    parts += [f"{name.rpartition('/')[2]} {line[name]:.3g}" for name in line if name in _SHOWN]
    parts += [f"lr {line['lr']:.2e}", f"|g| {line['grad_norm']:.3g}", f"{line['tokens_per_s']:,.0f} tok/s"]
    if line.get("mfu") is not None:
        parts.append(f"MFU {line['mfu']:.0%}")
    if remaining_s is not None:
        parts.append(f"{duration(remaining_s)} left")
    parts.append(human_bytes(line["memory_bytes"]))
    return "  ".join(parts)


_SHOWN = ("rewards/accuracy", "rewards/margin", "rewards/score")
