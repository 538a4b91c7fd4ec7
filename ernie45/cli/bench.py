"""`ernie bench`."""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import ernie45
from ernie45.bench import peers
from ernie45.bench.measure import Figure, measure, measure_bandwidth, peak_memory_bytes
from ernie45.bench.random_weights import write_packed
from ernie45.bench.report import check_plot, facts, save_plot, table
from ernie45.cli.output import ProgressBar, human_bytes, note, print_facts, print_json
from ernie45.errors import UsageError
from ernie45.kernels.choice import describe, kernels
from ernie45.quant.scheme import make_scheme
from ernie45.store.location import resolve


def run(options: argparse.Namespace) -> int:
    """Measure, print, save."""
    with kernels(options.kernels, why=f"--kernels {options.kernels}"):
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    if (options.model is None) == (options.shape is None):
        raise UsageError("give a MODEL, or --shape NAME --scheme SCHEME for random weights of a published size")
    if not (options.contexts or options.prompts or max(options.batches, default=1) > 1):
        raise UsageError("there is nothing to measure: give --contexts, --prompts, or --batches above 1")
    if options.plot is not None:
        check_plot(options.plot)
    if options.peer is not None:
        peers.require(options.peer, _llama_cpp(options))
    if options.model is not None:
        return _bench(resolve(options.model), options)
    if options.folder is not None and (options.folder / "config.json").is_file():
        note(f"using the random weights in {options.folder}")
        return _bench(options.folder, options)
    if options.folder is not None:
        _write(options.folder, options)
        return _bench(options.folder, options)
    with tempfile.TemporaryDirectory() as scratch:
        _write(Path(scratch, "random"), options)
        return _bench(Path(scratch, "random"), options)


def _llama_cpp(options: argparse.Namespace) -> peers.LlamaCpp:
    return peers.LlamaCpp(tools=options.llama_cpp, file=options.peer_file)


def _write(folder: Path, options: argparse.Namespace) -> None:
    with ProgressBar() as bar:
        scheme = make_scheme(options.scheme, options.group_size)
        write_packed(ernie45.preset(options.shape), scheme, folder, progress=bar.stage("random weights"))


def _bench(path: Path, options: argparse.Namespace) -> int:
    note("measuring the memory bandwidth")
    bandwidth = measure_bandwidth()
    start = time.perf_counter()
    model = ernie45.load_model(path, options.dtype)
    load_s = time.perf_counter() - start
    figures = measure(
        model,
        bandwidth=bandwidth,
        contexts=options.contexts,
        batches=options.batches,
        prompts=options.prompts,
        repeats=options.repeats,
        note=note,
    )
    peak = peak_memory_bytes()
    del model
    rivals: list[Figure] = []
    if options.peer is not None:
        note(f"measuring {options.peer}")
        rivals = peers.measure(
            options.peer, path, options.contexts, options.batches, options.prompts, _llama_cpp(options)
        )
    about = facts() | {
        "model": options.shape or path.name,
        "weights": f"seeded random, {options.scheme}" if options.shape else "as in the checkpoint",
        "kernels": describe(),
        "load_s": load_s,
        "peak_memory_bytes": peak,
        "bandwidth_bytes_per_s": bandwidth,
        "peer": options.peer,
    }
    data = {"about": about, "figures": [asdict(f) for f in figures], "peer_figures": [asdict(f) for f in rivals]}
    if options.json:
        print_json(data)
    else:
        print_facts([(name, _shown(name, value)) for name, value in about.items() if value is not None])
        print()
        print(table(figures, rivals, options.peer))
    if options.plot is not None:
        save_plot(options.plot, figures, rivals, options.peer, about)
        note(f"plot: {options.plot}")
    return 0


def _shown(name: str, value: object) -> str:
    if name.endswith("bytes") and isinstance(value, int):
        return human_bytes(value)
    if name == "bandwidth_bytes_per_s" and isinstance(value, float):
        return f"{human_bytes(value)}/s"
    return f"{value:.2f} s" if isinstance(value, float) else str(value)
