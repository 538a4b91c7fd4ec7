"""Processes that die: every client hears of it soon, the service returns by itself, and nothing is left over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.raw import metric, wait_idle, wait_until
from tests.server.served import Served

CHAT = "/v1/chat/completions"
SLOW = pytest.mark.slow
TUNED = (str(Path(__file__).parent / "tuned_server.py"), json.dumps({"stall_s": 1.0}))


@pytest.fixture(scope="module")
def watched(start: Callable[..., Served]) -> Served:
    """One whose engine may be silent for a second."""
    options = ["--max-model-len", "4096", "--max-num-seqs", "4", "--concurrent-requests", "40"]
    return start("ernie", *options, program=TUNED)


class Clients:
    """Streams and whole answers under way; what became of each, and when."""

    def __init__(self, served: Served, count: int) -> None:
        self.served = served
        self.ends: list[tuple[str, float]] = []
        self.threads = [threading.Thread(target=self._ask, args=[number % 2 == 0]) for number in range(count)]
        for thread in self.threads:
            thread.start()

    def _ask(self, stream: bool) -> None:
        turns = [{"role": "user", "content": "x"}]
        body = {"messages": turns, "max_tokens": 4000, "ignore_eos": True, "temperature": 2, "stream": stream}
        last = ""
        try:
            with self.served.client() as client, client.stream("POST", CHAT, json=body) as response:
                for line in response.iter_lines():
                    last = line.removeprefix("data: ") if line else last
            end = "[DONE]" if last == "[DONE]" else str(json.loads(last)["error"]["code"])
        except (httpx.HTTPError, ValueError, KeyError) as error:
            end = repr(error)
        self.ends.append((end, time.monotonic()))

    def join(self) -> list[tuple[str, float]]:
        for thread in self.threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in self.threads), "a client still waits"
        return self.ends


def zombies(pid: int) -> list[str]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            found.append(child)
    return found


@pytest.mark.parametrize(
    ("number", "within_s"), [(signal.SIGKILL, 5), (signal.SIGSTOP, 8), pytest.param(signal.SIGSEGV, 5, marks=SLOW)]
)
def test_a_dead_engine_is_told_to_everyone_and_replaced(watched: Served, number: int, within_s: float) -> None:
    restarts = metric(watched, "ernie45_engine_restarts_total")
    engine = watched.engine_pid()
    clients = Clients(watched, 12)
    wait_until(lambda: metric(watched, "ernie45_num_requests_running") == 4, 10, "they run")
    began = time.monotonic()
    os.kill(engine, number)
    ends = clients.join()
    assert {end for end, _ in ends} == {"engine_unavailable"}
    assert max(at for _, at in ends) - began < within_s
    wait_until(lambda: httpx.get(f"{watched.url}/ready", timeout=5).status_code == 200, 20, "it is ready by itself")
    assert metric(watched, "ernie45_engine_restarts_total") == restarts + 1
    assert watched.engine_pid() != engine
    assert not zombies(watched.process.pid)
    wait_idle(watched)
    assert watched.chat(max_tokens=3)["usage"]["completion_tokens"] == 3
    assert not [line for line in watched.log if "Traceback" in line]


def test_while_it_is_replaced_requests_are_sent_away_with_a_time(watched: Served) -> None:
    os.kill(watched.engine_pid(), signal.SIGKILL)
    wait_until(lambda: httpx.get(f"{watched.url}/ready", timeout=5).status_code == 503, 3, "readiness is off")
    refused = watched.post(CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
    assert int(refused.headers["retry-after"]) >= 1
    assert metric(watched, "ernie45_engine_up") == 0
    assert metric(watched, "ernie45_num_requests_running") == 0
    assert httpx.get(f"{watched.url}/health", timeout=5).status_code == 200
    watched.wait_ready()
    assert metric(watched, "ernie45_engine_up") == 1


@SLOW
def test_load_while_it_dies_again_and_again_leaves_no_ticket_behind(watched: Served) -> None:
    """40 at a time are allowed: were any lost, the last round would be refused."""
    for _ in range(2):
        clients = Clients(watched, 20)
        time.sleep(0.3)
        os.kill(watched.engine_pid(), signal.SIGKILL)
        assert {end for end, _ in clients.join()} == {"engine_unavailable"}
        watched.wait_ready()
    with httpx.Client(base_url=watched.url, headers=watched.headers, timeout=30) as client:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        assert client.post(CHAT, json=body).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSEGV, marks=SLOW)])
def test_without_a_server_the_engine_ends_by_itself(start: Callable[..., Served], number: int) -> None:
    served = start("ernie", "--max-model-len", "4096")
    engine = served.engine_pid()
    clients = Clients(served, 3)
    wait_until(lambda: metric(served, "ernie45_num_requests_running") == 3, 10, "they run")
    served.process.send_signal(number)
    wait_until(lambda: _is_gone(engine), 3, "the engine is gone")
    clients.join()


def _is_gone(pid: int) -> bool:
    try:  # nobody may be there to wait for it: a zombie computes nothing
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def serve(*arguments: str) -> tuple[int, str, float]:
    """Run `ernie serve` to its end; exit code, log, seconds."""
    began = time.monotonic()
    command = [sys.executable, "-m", "ernie45.cli.main", "serve", *arguments, "--api-key", "a-test-key"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr, time.monotonic() - began


def test_a_port_in_use_is_said_before_anything_is_loaded(model_folder: Callable[[str], Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, log, took = serve(str(model_folder("ernie")), "--port", str(port))
    assert code == 1
    assert f"127.0.0.1:{port} cannot be listened on" in log
    assert "--port" in log
    assert "Traceback" not in log
    assert took < 10


def _loading_engine(server: int) -> int:
    """The engine's process as soon as it runs a program of its own; until then its parent waits for it. 0: not yet."""
    for child in Path(f"/proc/{server}/task/{server}/children").read_text().split():
        if b"ernie45.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    return 0


def test_an_engine_that_hangs_while_it_loads_is_given_up(model_folder: Callable[[str], Path]) -> None:
    """Stopped as soon as it is there: it imports torch then, which takes a second."""
    program = [str(Path(__file__).parent / "tuned_server.py"), json.dumps({"load_timeout_s": 1.0})]
    arguments = ["serve", str(model_folder("ernie")), "--port", "0", "--api-key", "a-test-key"]
    process = subprocess.Popen(
        [sys.executable, *program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: _loading_engine(process.pid) > 0, 30, "the engine's process is started")
        os.kill(_loading_engine(process.pid), signal.SIGSTOP)
        out, log = process.communicate(timeout=40)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "silent for 1 s" in log
    assert "load_timeout_s" in log
    assert "Traceback" not in log
    assert "Ctrl-C stops" not in out


def _broken(name: str, folder: Path) -> list[str]:
    """What is wrong with a copy of the model; further arguments."""
    if name == "no weights":
        for file in folder.glob("*.safetensors"):
            file.unlink()
    elif name == "cut weights":
        file = next(folder.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif name == "no config":
        (folder / "config.json").unlink()
    elif name == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif name == "no memory":
        return ["--kv-cache-memory", "100000GiB"]
    elif name == "no length":
        return ["--max-model-len", "100000000"]
    return []


@pytest.mark.parametrize(
    "name",
    [
        "cut weights",
        *(
            pytest.param(name, marks=SLOW)
            for name in ("no weights", "no config", "no tokenizer", "no memory", "no length")
        ),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(
    name: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder("ernie"), folder)
    code, log, took = serve(str(folder), "--port", "0", *_broken(name, folder))
    assert code not in (0, None)
    assert code > 0, "it ended, it did not crash"
    lines = [line for line in log.splitlines() if line.strip()]
    assert "Traceback" not in log
    assert len(lines[-1]) > 20
    assert took < 30


def test_nothing_but_the_port_is_listened_on(watched: Served) -> None:
    """Between the processes there is a pair of sockets that nobody else can reach."""
    listening: list[Any] = []
    for pid in (watched.process.pid, watched.engine_pid()):
        inodes = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
        for table in ("tcp", "tcp6", "udp", "udp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == "0A" and f"socket:[{columns[9]}]" in inodes:
                    listening.append(columns[1])
    (address,) = listening
    host, port = address.split(":")
    assert host == "0100007F", "127.0.0.1, as the kernel writes it"
    assert int(port, 16) == int(watched.url.rpartition(":")[2])
