"""A long mixed load: no page, no memory, no file descriptor, no thread and no request is left behind.

    ERNIE45_SOAK_S=60 python -m pytest -m slow tests/server/test_soak.py

Twenty minutes unless the variable says otherwise.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.raw import connect, metric, post, reset, wait_idle
from tests.server.served import Served

CHAT = "/v1/chat/completions"
SECONDS = float(os.environ.get("ERNIE45_SOAK_S", "1200"))
CLIENTS = 6


@dataclass(frozen=True)
class Sample:
    """What a process holds."""

    at: float
    rss: int
    files: int
    threads: int


def sample(pid: int) -> Sample:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Sample(time.monotonic(), int(status["VmRSS"].split()[0]) << 10, files, int(status["Threads"]))


class Client:
    """Does one thing after another, chosen by chance, until it is told to stop."""

    def __init__(self, served: Served, seed: int, stop: threading.Event) -> None:
        self.served, self.random, self.stop = served, random.Random(seed), stop
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        deeds = [self.whole, self.stream, self.leave, self.mistake, self.schema, self.tokens, self.several]
        with self.served.client() as self.http:
            while not self.stop.is_set():
                deed = self.random.choice(deeds)
                try:
                    deed()
                except Exception as error:  # reported by the test, which would not hear of it otherwise
                    self.wrong.append(f"{deed.__name__}: {error!r}")
                self.done[deed.__name__] += 1

    def body(self, **fields: Any) -> dict[str, Any]:
        words = " ".join(self.random.choices(["one", "two", "three", "four"], k=self.random.randint(1, 60)))
        return {"messages": [{"role": "user", "content": words}], "max_tokens": self.random.randint(1, 80), **fields}

    def expect(self, answer: httpx.Response, *statuses: int) -> None:
        if answer.status_code not in statuses:
            self.wrong.append(f"{answer.status_code}: {answer.text[:200]}")

    def whole(self) -> None:
        self.expect(self.http.post(CHAT, json=self.body(temperature=1)), 200)

    def several(self) -> None:
        body = {"prompt": ["a", "b", "c"], "n": 2, "max_tokens": 20, "logprobs": 3}
        self.expect(self.http.post("/v1/completions", json=body), 200)

    def stream(self) -> None:
        with self.http.stream("POST", CHAT, json=self.body(stream=True)) as response:
            last = [line for line in response.iter_lines() if line][-1]
        if last != "data: [DONE]":
            self.wrong.append(last)

    def leave(self) -> None:
        with connect(self.served) as sock:
            body = self.body(stream=self.random.random() < 0.7, ignore_eos=True)
            sock.sendall(post(CHAT, json.dumps({**body, "max_tokens": 900}).encode()))
            time.sleep(self.random.random() / 5)
            reset(sock)

    def mistake(self) -> None:
        mistakes: list[dict[str, Any]] = [{"n": -1}, {"max_tokens": 10**9}, {"guided_regex": "("}, {"tools": [{}]}]
        fields = self.random.choice([*mistakes, {"model": "x"}])
        self.expect(self.http.post(CHAT, json=self.body() | fields), 400, 404)

    def schema(self) -> None:
        properties = {f"p{self.random.randint(0, 10**6)}": {"type": "boolean"}}
        body = self.body(guided_json={"type": "object", "properties": properties}, reasoning_max_tokens=2)
        self.expect(self.http.post(CHAT, json=body), 200)

    def tokens(self) -> None:
        self.expect(self.http.post("/v1/tokenize", json={"prompt": "x" * self.random.randint(1, 5000)}), 200)


def slope(samples: list[Sample]) -> float:
    """Bytes a second, by least squares."""
    mean_at = sum(one.at for one in samples) / len(samples)
    mean = sum(one.rss for one in samples) / len(samples)
    spread = sum((one.at - mean_at) ** 2 for one in samples)
    return sum((one.at - mean_at) * (one.rss - mean) for one in samples) / spread


@pytest.mark.slow
def test_nothing_is_left_behind(start: Callable[..., Served]) -> None:
    served = start("ernie_thinking", "--max-model-len", "1024", "--kv-cache-memory", "64MiB", "--max-num-seqs", "8")
    pids = {"server": served.process.pid, "engine": served.engine_pid()}
    for _ in range(3):
        served.chat(max_tokens=8)
    stop = threading.Event()
    clients = [Client(served, seed, stop) for seed in range(CLIENTS)]
    samples: dict[str, list[Sample]] = {name: [] for name in pids}
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(2.0, SECONDS / 30))
        for name, pid in pids.items():
            samples[name].append(sample(pid))
    stop.set()
    for client in clients:
        client.thread.join(60)
    wait_idle(served, 10)
    assert not [wrong for client in clients for wrong in client.wrong][:10]
    done = sum((client.done for client in clients), Counter())
    assert min(done.values()) > 0, done
    assert metric(served, "ernie45_engine_restarts_total") == 0
    assert not [line for line in served.log if "Traceback" in line]
    time.sleep(0.5)
    for name, pid in pids.items():
        found = samples[name]
        later = found[len(found) // 3 :]  # caches of prefixes and grammars fill in the beginning
        growth = slope(later) * (later[-1].at - later[0].at)
        print(
            f"{name}: {growth / (1 << 20):+.1f} MiB over {later[-1].at - later[0].at:.0f} s at {later[-1].rss >> 20} MiB; {done}"
        )
        assert growth < (24 << 20 if SECONDS < 600 else 16 << 20), name
        now = sample(pid)
        assert now.files <= found[0].files + CLIENTS + 4
        assert max(one.threads for one in later) <= found[len(found) // 3].threads + 2
    del served.log[:]
    assert served.stop() == 0
