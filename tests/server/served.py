"""A server in a process of its own, as `ernie serve` starts it, and what a test asks of it."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

KEY = "test-key-of-the-suite"
_START_S = 120


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[str]
    url: str
    banner: list[str]
    log: list[str] = field(default_factory=list)
    key: str = KEY

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def client(self, **settings: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=60, **settings)

    def post(self, path: str, body: Any, **settings: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=self.headers, timeout=60, **settings)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=self.headers, timeout=60)

    def chat(self, content: str = "Hello", **fields: Any) -> dict[str, Any]:
        response = self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a stream: JSON values, and the text `[DONE]`."""
        found = []
        with self.client() as client, client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: "):
                    text = line.removeprefix("data: ")
                    found.append(text if text == "[DONE]" else json.loads(text))
        return found

    def engine_pid(self) -> int:
        """The process that computes: the server's one child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1, f"expected one child, found {children}"
        return int(children[0])

    def wait_ready(self, timeout_s: float = _START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready within {timeout_s} s:\n" + "".join(self.log[-40:]))

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60) -> int:
        """Signal, wait; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def launch(
    model: Path | str,
    *options: str,
    key: str | None = KEY,
    verb: str = "serve",
    program: Sequence[str] = ("-m", "ernie45.cli.main"),
) -> Served:
    """Start `ernie serve MODEL` on a free port and wait until it has greeted.

    Args: program: what Python runs in place of `ernie`, with the same arguments.
    """
    keys = [] if key is None else ["--api-key", key]
    command = [sys.executable, *program, verb, str(model), "--port", "0", *keys, *options]
    environment = {**os.environ, "ERNIE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    log: list[str] = []
    lines: queue.Queue[str | None] = queue.Queue()
    assert process.stdout is not None
    assert process.stderr is not None

    def drain_log(stream: Any) -> None:
        log.extend(iter(stream.readline, ""))

    def drain_lines(stream: Any) -> None:
        for line in stream:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=drain_log, args=[process.stderr], daemon=True).start()
    threading.Thread(target=drain_lines, args=[process.stdout], daemon=True).start()
    banner: list[str] = []
    while not banner or not banner[-1].startswith("Ctrl-C"):
        line = lines.get(timeout=_START_S)
        if line is None:
            process.wait()
            time.sleep(0.1)
            raise AssertionError(f"the server ended with {process.returncode}:\n" + "".join(log))
        banner.append(line)
    found = re.search(r"API +(http://\S+)/v1", "\n".join(banner))
    assert found is not None, banner
    shown = re.search(r"^key +(\S+)", "\n".join(banner), re.MULTILINE)
    return Served(process, found[1], banner, log, key or (shown[1] if shown else ""))
