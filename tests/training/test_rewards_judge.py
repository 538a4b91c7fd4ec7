"""The judge: an endpoint that answers, is busy, is slow, or talks nonsense."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ernie45.errors import ConfigError, NotFoundError, TransferError
from ernie45.training import reward_judge
from ernie45.training.reward_judge import judge

Reply = Callable[[int, dict[str, Any]], tuple[int, str]]


class Endpoint:
    """A chat endpoint that replies as `reply` says: from the number of the call and its body to status and body."""

    def __init__(self) -> None:
        self.reply: Reply = lambda number, body: (200, content("Score: 7"))
        self.calls: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.calls.append((self.path, body, dict(self.headers)))
                status, text = endpoint.reply(len(endpoint.calls), body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


def content(text: str) -> str:
    return json.dumps({"choices": [{"message": {"content": text}}]})


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(reward_judge, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Endpoint()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_asks_and_scales(endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    ask = judge(
        url=endpoint.url + "/",
        model="m",
        template="{prompt}|{answer}|{row[level]}",
        low=2,
        high=12,
        max_tokens=9,
        key_file=str(tmp_path / "key"),
    )
    assert ask("Why?", "So.", {"level": 3}) == 0.5
    ((path, body, headers),) = endpoint.calls
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Why?|So.|3"}],
        "temperature": 0,
        "max_tokens": 9,
    }
    assert headers["Authorization"] == "Bearer secret"


def test_the_last_score_counts_within_bounds(endpoint: Endpoint) -> None:
    endpoint.reply = lambda number, body: (200, content("Score: 1, no, score: **99**"))
    assert judge(url=endpoint.url, model="m")("", "", {}) == 1
    assert "Authorization" not in endpoint.calls[0][2]
    assert judge(url=endpoint.url, model="m", pattern=r"Score: (\d)")("", "", {}) == 0.1


def test_a_busy_endpoint_is_asked_again(endpoint: Endpoint) -> None:
    endpoint.reply = lambda number, body: (200, content("Score: 10")) if number == 3 else (503, "busy")
    assert judge(url=endpoint.url, model="m", retries=2)("", "", {}) == 1
    assert len(endpoint.calls) == 3
    endpoint.reply = lambda number, body: (503, "busy")
    with pytest.raises(TransferError, match="attempt 2: .*503"):
        judge(url=endpoint.url, model="m", retries=1)("", "", {})


def test_a_refusal_is_not_repeated(endpoint: Endpoint) -> None:
    endpoint.reply = lambda number, body: (401, "no key")
    with pytest.raises(TransferError, match="attempt 1: .*401"):
        judge(url=endpoint.url, model="m", retries=5)("", "", {})


def test_waiting_has_an_end(endpoint: Endpoint) -> None:
    wait = threading.Event()
    endpoint.reply = lambda number, body: (200, content("Score: 1")) if wait.wait(5) else (200, "")
    with pytest.raises(TransferError, match="timed out"):
        judge(url=endpoint.url, model="m", retries=0, timeout_s=0.1)("", "", {})
    wait.set()


@pytest.mark.parametrize("text", ["no json", "{}", '{"choices": []}', content("I like it")])
def test_nonsense_is_an_error(endpoint: Endpoint, text: str) -> None:
    endpoint.reply = lambda number, body: (200, text)
    with pytest.raises(TransferError, match="reply"):
        judge(url=endpoint.url, model="m")("", "", {})


def test_mistakes_in_options() -> None:
    for wrong in ({"url": "ftp://x"}, {"low": 3, "high": 3}, {"timeout_s": 0}, {"pattern": "("}, {"pattern": "a"}):
        with pytest.raises(ConfigError, match="reward judge"):
            judge(**({"url": "http://x", "model": "m"} | wrong))
    with pytest.raises(NotFoundError, match="no key file"):
        judge(url="http://x", model="m", key_file="/nowhere/key")
