"""`ernie eval`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from ernie45.cli.output import note, print_facts, print_json
from ernie45.errors import UsageError
from ernie45.evaluation.files import find_task
from ernie45.evaluation.perplexity import Perplexity, perplexity
from ernie45.evaluation.run import TaskResult, run_task
from ernie45.evaluation.subject import NetworkSubject
from ernie45.kernels.choice import kernels
from ernie45.models.text import CausalLM
from ernie45.store.api import load_model, load_tokenizer
from ernie45.store.location import resolve
from ernie45.store.text import read_text


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    _check(options)
    with kernels(options.kernels, why=f"--kernels {options.kernels}"):
        found = _perplexity(options) if options.ppl is not None else _task(options)
    if options.json:
        print_json({"model": str(options.model), **asdict(found)})
    else:
        print_facts(_perplexity_facts(found) if isinstance(found, Perplexity) else _task_facts(found))
    return 0


def _check(options: argparse.Namespace) -> None:
    for_ppl = {"--window": options.window, "--stride": options.stride}
    for_task = {"--output": options.output}
    for name, value in (for_task if options.ppl is not None else for_ppl).items():
        if value is not None:
            other = "--task" if options.ppl is not None else "--ppl"
            raise UsageError(f"{name} means nothing without {other}: leave it out")
    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit is {options.limit}: expected 1 or more")


def _perplexity(options: argparse.Namespace) -> Perplexity:
    text = read_text(options.ppl)
    tokenizer = load_tokenizer(options.model)
    return perplexity(
        _model(options),
        tokenizer,
        text,
        window=options.window,
        stride=options.stride,
        max_tokens=options.limit,
        progress=_Steps("tokens"),
    )


def _task(options: argparse.Namespace) -> TaskResult:
    task = find_task(options.task)
    subject = NetworkSubject(_model(options), load_tokenizer(options.model))
    about = f"{resolve(options.model)}{f' + {options.adapter}' if options.adapter else ''}, {options.dtype}"
    return run_task(task, subject, limit=options.limit, output=options.output, about=about, progress=_Steps("items"))


def _model(options: argparse.Namespace) -> CausalLM:
    model = load_model(options.model, options.dtype)
    if options.adapter is not None:
        from ernie45.training.lora.adapter import merge
        from ernie45.training.lora.read import load_adapter

        load_adapter(model, Path(options.adapter))
        merge(model)
    return model


class _Steps:
    """Says how far it is, at every tenth."""

    def __init__(self, unit: str) -> None:
        self._unit, self._said = unit, 0

    def __call__(self, done: int, total: int) -> None:
        tenth = 10 * done // total
        if tenth > self._said and done < total:
            self._said = tenth
            note(f"{done} of {total} {self._unit}")


def _perplexity_facts(found: Perplexity) -> list[tuple[str, str]]:
    return [
        ("perplexity", f"{found.perplexity:.4f}"),
        ("nats per token", f"{found.nats_per_token:.4f} ± {found.standard_error:.4f}"),
        ("bits per byte", f"{found.bits_per_byte:.4f}"),
        ("tokens", f"{found.tokens} in windows of {found.window}, {found.stride} apart"),
    ]


def _task_facts(found: TaskResult) -> list[tuple[str, str]]:
    facts = [("task", found.task), ("items", str(found.items))]
    for name, estimate in found.measures.items():
        error = "" if estimate.standard_error is None else f" ± {estimate.standard_error:.4f}"
        facts.append((name, f"{estimate.mean:.4f}{error}"))
    return facts
