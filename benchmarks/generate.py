"""Load time, memory and speed of text generation, beside transformers in the same run.

    python benchmarks/generate.py                             # all cases; nothing else may run meanwhile
    python benchmarks/generate.py --only random --only bfloat16 --repeats 1
    python benchmarks/generate.py --json FILE --plot FILE.png

README.md says what is measured, and how. Exit codes are those of `ernie`.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.generate_report import BATCH, BYTES_PER_WEIGHT, PEER, Network, Row, plot, rows_of, to_data, to_markdown
from ernie45.errors import Ernie45Error, NotFoundError, UsageError
from ernie45.store.location import DEFAULT_MODEL, home, resolve

_OURS = "ernie45"
_PACKAGES = (_OURS, PEER)
_PRESET = "ERNIE-4.5-0.3B"
_SEED = 0
_WORKER = "benchmarks.generate_worker"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

    networks: tuple[str, ...]
    prompt_tokens: int = 128
    decode_steps: int = 64
    bandwidth_bytes: int = field(default_factory=common.bandwidth_size_bytes)
    bandwidth_repeats: int = 5


FULL = (DEFAULT_MODEL, f"random-{_PRESET}")
TINY = "random-tiny"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A network on disk, ready to be measured."""

    network: Network
    folder: Path
    prompts: list[list[int]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; errors become one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = _parser().parse_args(arguments)
        command = shlex.join(["python", "benchmarks/generate.py", *arguments])
        report, rows = run(options, command)
    except Ernie45Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(to_markdown(report, rows))
    if options.json is not None:
        common.write_json(options.json, to_data(report, rows))
    if options.plot is not None:
        plot(options.plot, rows, f"{report['machine']['cpu']}, {options.threads} threads, commit {report['commit']}")
    return 0


def run(options: argparse.Namespace, command: str) -> tuple[dict[str, Any], list[Row]]:
    """Measure everything that was asked for; returns what the report tells beside the rows, and the rows."""
    _check_outputs(options)
    plan = _quick_plan() if options.quick else Plan(networks=FULL)
    cases = select_cases(plan.networks, options.only)
    began = {"date": common.now(), "commit": common.commit()}  # before somebody edits or commits
    rehearsal = _prepare(TINY, plan, options)
    names = dict.fromkeys(name for name, _ in cases)
    prepared = {name: rehearsal if name == TINY else _prepare(name, plan, options) for name in names}
    before = _bandwidth(plan, options.threads)
    runs = [run for name, dtype in cases for run in _measure(prepared[name], dtype, rehearsal.folder, plan, options)]
    after = before if options.quick else _bandwidth(plan, options.threads)
    bandwidth = max((before, after), key=lambda measured: float(measured["bytes_per_s"]))
    rows = [
        row
        for name, dtype in cases
        for row in rows_of(
            prepared[name].network,
            dtype,
            ours=[r["figures"] for r in _of(runs, name, dtype, _OURS)],
            peer=[r["figures"] for r in _of(runs, name, dtype, PEER)],
            bytes_per_s=bandwidth["bytes_per_s"],
        )
    ]
    noises = [measured["other_cores"] for measured in (before, *runs, after)]
    report = {
        "benchmark": "generate",
        **began,
        "command": command,
        "versions": common.software_versions(("torch", PEER, "numpy")),
        "native_extension": common.native_extension(),
        "machine": common.machine_facts(),
        "settings": {
            "threads": options.threads,
            "omp_wait_policy": common.thread_environment(options.threads)["OMP_WAIT_POLICY"],
            "repeats": options.repeats,
            "prompt_tokens": plan.prompt_tokens,
            "decode_steps": plan.decode_steps,
            "batch": BATCH,
            "seed": _SEED,
            "quick": options.quick,
            "memory_method": "/".join(sorted({r["memory_method"] for r in runs})),
        },
        "bandwidth": bandwidth,
        "bandwidth_before_and_after": [before["bytes_per_s"], after["bytes_per_s"]],
        "networks": [asdict(p.network) for p in prepared.values()],
        "weight_bytes": {
            f"{name}/{dtype}": prepared[name].network.active_parameters * BYTES_PER_WEIGHT[dtype]
            for name, dtype in cases
        },
        "same_tokens": {f"{name}/{dtype}": _same_tokens(runs, name, dtype) for name, dtype in cases},
        "other_cores_max": None if None in noises else max(noises),
        "runs": runs,
    }
    return report, rows


def select_cases(networks: Sequence[str], only: Sequence[str]) -> list[tuple[str, str]]:
    """Network and dtype of the cases whose name, `network/dtype`, holds every word. Raises: UsageError if none does."""
    cases = [(name, dtype) for name in networks for dtype in BYTES_PER_WEIGHT]
    chosen = [(name, dtype) for name, dtype in cases if all(word in f"{name}/{dtype}" for word in only)]
    if not chosen:
        known = ", ".join(f"{name}/{dtype}" for name, dtype in cases)
        raise UsageError(f"no case holds all of {', '.join(map(repr, only))} in its name; the cases are {known}")
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="generate.py", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repeats", type=_positive, default=3, help="fresh processes per case and package (3)")
    parser.add_argument("--threads", type=_positive, default=common.usable_cores(), help="threads (all cores)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORD", help="cases with this in their name; several: with all"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single value here as well")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw decode speeds and bounds (matplotlib)")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="where checkpoints of random weights are kept (in the model store)"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny network only: tests the program, measures nothing")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def _quick_plan() -> Plan:
    return Plan(networks=(TINY,), prompt_tokens=16, decode_steps=8, bandwidth_bytes=1 << 26, bandwidth_repeats=2)


def _check_outputs(options: argparse.Namespace) -> None:
    """What would fail after the measurements fails before them."""
    for path in (options.json, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise NotFoundError(f"there is no folder {path.absolute().parent} for {path.name}: make it first")
    needed = {"transformers": "the peer", **({"matplotlib": "--plot"} if options.plot is not None else {})}
    for package, purpose in needed.items():
        if importlib.util.find_spec(package) is None:
            raise NotFoundError(f"{package} ({purpose}) is not installed: pip install 'ernie45[bench]'")


def _prepare(name: str, plan: Plan, options: argparse.Namespace) -> Prepared:
    _note(f"preparing {name}")
    sizes: dict[str, Any] = {"num_prompts": BATCH, "prompt_tokens": plan.prompt_tokens}
    weights: Literal["real", "seeded random"]
    if name == DEFAULT_MODEL:
        folder, weights = resolve(name), "real"
        fresh = common.run_fresh(f"{_WORKER}:prepare_real", threads=options.threads, folder=str(folder), **sizes)
    else:
        folder, weights = (options.cache or home() / "benchmarks").absolute() / f"{name}-seed{_SEED}", "seeded random"
        fresh = common.run_fresh(
            f"{_WORKER}:prepare_random",
            threads=options.threads,
            preset=None if name == TINY else _PRESET,
            folder=str(folder),
            seed=_SEED,
            **sizes,
        )
    found = fresh.result
    network = Network(name=name, weights=weights, active_parameters=found["active_parameters"])
    return Prepared(network=network, folder=folder, prompts=found["prompts"])


def _measure(
    prepared: Prepared, dtype: str, rehearsal: Path, plan: Plan, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """All repeats of one case, both packages in turns; who begins changes, so that a drift of the machine hits both."""
    runs = []
    name = prepared.network.name
    for repeat in range(options.repeats):
        for package in _PACKAGES if repeat % 2 == 0 else reversed(_PACKAGES):
            _note(f"{name}/{dtype}: {package}, repeat {repeat + 1} of {options.repeats}")
            common.warm_page_cache(prepared.folder)
            fresh = common.run_fresh(
                f"{_WORKER}:measure",
                threads=options.threads,
                package=package,
                folder=str(prepared.folder),
                rehearsal=str(rehearsal),
                dtype=dtype,
                prompts=prepared.prompts,
                decode_steps=plan.decode_steps,
            )
            case = {"network": name, "dtype": dtype, "package": package, "repeat": repeat}
            runs.append({**case, "other_cores": fresh.other_cores, **fresh.result})
    return runs


def _bandwidth(plan: Plan, threads: int) -> dict[str, Any]:
    _note("memory bandwidth")
    arguments: dict[str, Any] = {"size_bytes": plan.bandwidth_bytes, "repeats": plan.bandwidth_repeats}
    fresh = common.run_fresh("benchmarks.common:measure_bandwidth", threads=threads, **arguments)
    return {**fresh.result, "other_cores": fresh.other_cores}


def _of(runs: Sequence[dict[str, Any]], name: str, dtype: str, package: str) -> list[dict[str, Any]]:
    return [r for r in runs if (r["network"], r["dtype"], r["package"]) == (name, dtype, package)]


def _same_tokens(runs: Sequence[dict[str, Any]], name: str, dtype: str) -> dict[str, int]:
    """How long both packages wrote the same from the first prompt: evidence that they did the same work."""
    ours, peer = (_of(runs, name, dtype, package)[0]["ids"] for package in _PACKAGES)
    equal = next((i for i, (a, b) in enumerate(zip(ours, peer, strict=True)) if a != b), len(ours))
    return {"equal": equal, "of": len(ours)}


def _note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
