"""Shutting down: nobody's answer is lost without a word, and the process is gone in time, with exit code 0 and a clean log."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.raw import connect, metric, post, wait_until
from tests.server.served import Served

CHAT = "/v1/chat/completions"


class Streams:
    """Many streams at once, each read on a thread of its own to its end."""

    def __init__(self, served: Served, count: int, **fields: Any) -> None:
        self.served, self.ends, self.begun = served, [""] * count, threading.Barrier(count + 1)
        turns = [{"role": "user", "content": "x"}]
        self.body = {"messages": turns, "stream": True, "ignore_eos": True, "temperature": 2, **fields}
        self.threads = [threading.Thread(target=self._read, args=[number]) for number in range(count)]
        for thread in self.threads:
            thread.start()
        self.begun.wait(30)

    def _read(self, number: int) -> None:
        waited = False
        try:
            with self.served.client() as client, client.stream("POST", CHAT, json=self.body) as response:
                for line in response.iter_lines():
                    if not waited:
                        waited = True
                        self.begun.wait(30)
                    if line.startswith("data: "):
                        self.ends[number] = line.removeprefix("data: ")
        except httpx.HTTPError as error:
            self.ends[number] = repr(error)

    def join(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for thread in self.threads:
            thread.join(max(deadline - time.monotonic(), 0))
        assert not any(thread.is_alive() for thread in self.threads)

    def codes(self) -> set[str]:
        return {end if end == "[DONE]" else json.loads(end)["error"]["code"] for end in self.ends}


def ended_well(served: Served, engine: int, number: int = signal.SIGTERM) -> None:
    """Exit code 0, no process left over, no trace in the log."""
    assert served.process.wait(15) == 0
    wait_until(lambda: not Path(f"/proc/{engine}").exists(), 2, "the engine's process is gone")
    time.sleep(0.1)
    assert not [line for line in served.log if "Traceback" in line or "ERROR" in line], "".join(served.log)[-3000:]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_streams_end_and_new_requests_are_sent_away(start: Callable[..., Served], number: int) -> None:
    served = start("ernie", "--max-model-len", "2048", "--max-num-seqs", "16")
    engine = served.engine_pid()
    streams = Streams(served, 50, max_tokens=60)
    served.process.send_signal(number)
    wait_until(lambda: httpx.get(f"{served.url}/ready", timeout=5).status_code == 503, 2, "it is not ready any more")
    assert httpx.get(f"{served.url}/health", timeout=5).status_code == 200
    refused = served.post(CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert refused.headers["retry-after"] == "5"
    streams.join(30)
    assert streams.codes() == {"[DONE]"}
    ended_well(served, engine)


def test_what_does_not_end_in_time_gets_an_error_event(start: Callable[..., Served]) -> None:
    served = start("ernie", "--max-model-len", "4096", "--drain-timeout", "0.5", "--max-num-seqs", "4")
    engine = served.engine_pid()
    streams = Streams(served, 4, max_tokens=4000)
    whole: list[int] = []
    body = {**streams.body, "stream": False, "max_tokens": 4000}
    asked = threading.Thread(target=lambda: whole.append(served.post(CHAT, body).status_code))
    asked.start()
    time.sleep(0.2)
    began = time.monotonic()
    served.process.send_signal(signal.SIGTERM)
    streams.join(10)
    asked.join(10)
    assert streams.codes() == {"engine_unavailable"}
    assert whole == [503]
    ended_well(served, engine)
    assert time.monotonic() - began < 4


@pytest.mark.slow
def test_a_second_signal_cuts_it_short(start: Callable[..., Served]) -> None:
    served = start("ernie", "--max-model-len", "4096", "--max-num-seqs", "4")
    engine = served.engine_pid()
    streams = Streams(served, 4, max_tokens=4000)
    began = time.monotonic()
    served.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert served.process.poll() is None
    served.process.send_signal(signal.SIGINT)
    streams.join(10)
    assert streams.codes() == {"engine_unavailable"}
    ended_well(served, engine)
    assert time.monotonic() - began < 4


@pytest.mark.slow
def test_a_client_that_does_not_read_holds_up_no_exit(start: Callable[..., Served]) -> None:
    served = start("ernie", "--max-model-len", "4096", "--drain-timeout", "1")
    engine = served.engine_pid()
    slow = connect(served, receive_bytes=2048)
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "ignore_eos": True, "temperature": 2}
    slow.sendall(post(CHAT, json.dumps({**body, "max_tokens": 3000, "logprobs": True, "top_logprobs": 20}).encode()))
    wait_until(lambda: metric(served, "ernie45_generation_tokens_total") + 1 > 0, 5, "it runs")
    time.sleep(1)
    began = time.monotonic()
    served.process.send_signal(signal.SIGTERM)
    ended_well(served, engine)
    assert time.monotonic() - began < 6
    slow.close()


def test_a_signal_amid_loading_ends_it(model_folder: Callable[[str], Path]) -> None:
    command = [sys.executable, "-m", "ernie45.cli.main", "serve", str(model_folder("ernie")), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: _catches(process.pid, signal.SIGTERM), 20, "the server listens to signals")
    assert _children(process.pid), "the engine's process was started before"
    process.send_signal(signal.SIGTERM)
    out, log = process.communicate(timeout=10)
    assert process.returncode == 0, log
    assert "Traceback" not in log
    assert "Ctrl-C stops" not in out


def _catches(pid: int, number: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def _children(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except FileNotFoundError:
        return ""
