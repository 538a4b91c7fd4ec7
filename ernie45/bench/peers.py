"""The same figures from other programs on the same machine: llama.cpp and transformers.

llama.cpp runs random Q4_0 weights of the same shape (embedding and head Q6_K, as it chooses them). Where a build is at hand,
its own tools measure it with and without repacked weights and flash attention, and the best of each row counts. Else
the prebuilt `xllamacpp` serves, which uses AVX2 at most.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ernie45.bench.measure import Figure
from ernie45.bench.random_weights import write_gguf
from ernie45.checkpoint.source import open_source
from ernie45.config.model import ModelConfig
from ernie45.errors import NotFoundError, UsageError

_DECODE_TOKENS = 48
_KEEPS_UP = 0.9
"""Share of the best that keeps a setting of llama.cpp in the race for longer rows."""
_LONG = 4096


@dataclass(frozen=True, kw_only=True)
class LlamaCpp:
    """Where llama.cpp is, and the weights it runs."""

    tools: Path | None = None
    """Folder with `llama-bench` and `llama-batched-bench`; None: the Python package xllamacpp."""
    file: Path | None = None
    """GGUF to use, written if it is not there; None: one that is removed afterwards."""


def require(peer: str, llama_cpp: LlamaCpp | None = None) -> None:
    """Refuse what is not there before anything is measured. Raises: NotFoundError with what to install or build."""
    tools = None if llama_cpp is None else llama_cpp.tools
    if peer == "llama.cpp" and tools is not None:
        for name in ("llama-bench", "llama-batched-bench"):
            if not (tools / name).is_file():
                raise NotFoundError(f"there is no {tools / name}: build llama.cpp with that target")
        return
    package = {"llama.cpp": "xllamacpp", "transformers": "transformers"}[peer]
    if importlib.util.find_spec(package) is None:
        raise NotFoundError(f"{peer} is not installed: pip install {package}")


def measure(
    peer: str,
    path: Path,
    contexts: Sequence[int],
    batches: Sequence[int],
    prompts: Sequence[int],
    llama_cpp: LlamaCpp | None = None,
) -> list[Figure]:
    """Decode and prefill speed of a peer; batches above 1 only where it can. Raises: NotFoundError if it is not installed."""
    config = open_source(path).config
    if peer == "transformers":
        return _transformers(path, batches, prompts)
    if peer != "llama.cpp":
        raise UsageError(f"peer is {peer!r}, expected llama.cpp or transformers")
    where = llama_cpp or LlamaCpp()
    with tempfile.TemporaryDirectory() as scratch:
        file = where.file or Path(scratch, "peer.gguf")
        if not file.exists():
            write_gguf(config, file)
        if where.tools is None:
            return _llama_cpp(file, config, contexts, prompts)
        return _llama_tools(where.tools, file, contexts, batches, prompts)


def _figure(what: str, context: int, batch: int, rates: Sequence[float]) -> Figure:
    return Figure(
        what=what,
        context=context,
        batch=batch,
        tokens_per_s=statistics.median(rates),
        low=min(rates),
        high=max(rates),
        bytes_per_step=0,
        bound_tokens_per_s=None,
    )


def _llama_tools(
    tools: Path, file: Path, contexts: Sequence[int], batches: Sequence[int], prompts: Sequence[int]
) -> list[Figure]:
    """The best of four settings for every row, as llama.cpp's own tools report them.

    Rows go from short to long, and a setting that is clearly behind is not tried on longer ones: filling a context of 16384 takes a
    21B model a quarter of an hour. From `_LONG` tokens on one repeat has to do.
    """
    common = ["-m", str(file), "-t", str(torch.get_num_threads())]
    figures = _race(
        [(context, 1) for context in sorted(contexts)],
        lambda setting, context, _: _bench(
            tools, [*common, *setting.bench, "-p", "0", "-n", str(_DECODE_TOKENS), "-d", str(context)], context
        ),
        "decode",
    )
    figures += _race(
        [(prompt, 1) for prompt in sorted(prompts)],
        lambda setting, prompt, _: _bench(tools, [*common, *setting.bench, "-n", "0", "-p", str(prompt)], prompt),
        "prefill",
    )
    figures += _race(
        [(0, batch) for batch in sorted(batches) if batch > 1],
        lambda setting, _, batch: _batched(tools, [*common, *setting.batched], batch),
        "decode",
    )
    return figures


@dataclass(frozen=True)
class _Setting:
    """With or without repacked weights and flash attention, in the words of both tools."""

    repack: bool
    flash: bool

    @property
    def bench(self) -> list[str]:
        return ["-fa", str(int(self.flash)), "--repack", str(int(self.repack))]

    @property
    def batched(self) -> list[str]:
        return ["-fa", "on" if self.flash else "off", "--repack" if self.repack else "--no-repack"]


def _race(
    rows: Sequence[tuple[int, int]], rates_of: Callable[[_Setting, int, int], list[float]], what: str
) -> list[Figure]:
    """For each row (context or prompt, batch) the best setting of those that kept up so far."""
    running = [_Setting(repack, flash) for repack, flash in itertools.product((True, False), repeat=2)]
    figures = []
    for context, batch in rows:
        rates = {setting: rates_of(setting, context, batch) for setting in running}
        best = max(rates, key=lambda setting: statistics.median(rates[setting]))
        level = _KEEPS_UP * statistics.median(rates[best])
        running = [setting for setting in running if statistics.median(rates[setting]) >= level]
        figures.append(_figure(what, context, batch, rates[best]))
    return figures


def _bench(tools: Path, arguments: list[str], length: int) -> list[float]:
    repeats = "1" if length >= _LONG else "3"
    (result,) = json.loads(_run(tools / "llama-bench", *arguments, "-o", "json", "-r", repeats))
    rates: list[float] = result["samples_ts"]
    return rates


def _batched(tools: Path, arguments: list[str], batch: int) -> list[float]:
    text = _run(
        tools / "llama-batched-bench",
        *(*arguments, "-c", str(batch * 2 * _DECODE_TOKENS), "-npp", "16", "-ntg", str(_DECODE_TOKENS)),
        *("-npl", str(batch), "--output-format", "jsonl"),
    )
    return [json.loads(line)["speed_tg"] for line in text.splitlines() if line.startswith("{")]


def _run(program: Path, *arguments: str) -> str:
    if not program.is_file():
        raise NotFoundError(
            f"there is no {program}: build llama.cpp with the targets llama-bench and llama-batched-bench"
        )
    # Our command line lets OpenMP's threads sleep while they wait; the peer, whose threads meet often, waits as it likes.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = " ".join(done.stderr.strip().splitlines()[-2:])
        raise UsageError(f"{program} ended with status {done.returncode}: {last[-300:]}")
    return done.stdout


def _llama_cpp(file: Path, config: ModelConfig, contexts: Sequence[int], prompts: Sequence[int]) -> list[Figure]:
    try:
        import xllamacpp
    except ImportError as error:
        raise NotFoundError(f"llama.cpp is not installed ({error}): pip install xllamacpp") from error
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = max([*contexts, *prompts]) + 2 * _DECODE_TOKENS + 64
    parameters.n_parallel, parameters.verbosity = 1, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(parameters)

    def timings(prompt: int, predict: int) -> dict[str, Any]:
        ids = [5 + i % (config.vocab_size - 10) for i in range(max(prompt, 1))]
        request = {"prompt": ids, "n_predict": predict, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions(request)
        return dict((answer if isinstance(answer, dict) else json.loads(answer))["timings"])

    figures = []
    for context in contexts:
        rates = [timings(context, _DECODE_TOKENS)["predicted_per_second"] for _ in range(3)]
        figures.append(_figure("decode", context, 1, rates))
    figures += [
        _figure("prefill", prompt, 1, [timings(prompt, 1)["prompt_per_second"] for _ in range(3)]) for prompt in prompts
    ]
    return figures


@torch.inference_mode()
def _transformers(path: Path, batches: Sequence[int], prompts: Sequence[int]) -> list[Figure]:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise NotFoundError(f"transformers is not installed ({error}): pip install 'transformers>=5.16'") from error
    if open_source(path).format != "pt":
        raise UsageError(f"transformers reads -PT folders only: measure {path} against llama.cpp")
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.randint(model.config.vocab_size, (1, max([*prompts, 8])), generator=torch.Generator().manual_seed(0))
    figures = []
    for batch in batches:
        past = model(ids[:, :2].expand(batch, 2), use_cache=True).past_key_values
        rates = []
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(16):
                model(ids[:, :1].expand(batch, 1), past_key_values=past, use_cache=True).logits.argmax(-1)
            rates.append(16 * batch / (time.perf_counter() - start))
        figures.append(_figure("decode", 0, batch, rates))
    for prompt in prompts:
        rates = []
        for _ in range(3):
            start = time.perf_counter()
            model(ids[:, :prompt], use_cache=True, logits_to_keep=1)
            rates.append(prompt / (time.perf_counter() - start))
        figures.append(_figure("prefill", prompt, 1, rates))
    return figures
