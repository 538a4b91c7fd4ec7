"""Pausing, going on, and ending requests by their ids: who may, what is held, and what comes back."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.server.raw import metric, wait_idle, wait_until
from tests.server.served import Served

CHAT = "/v1/chat/completions"
OTHER_KEY = "another-key-of-the-suite"
TURNS = [{"role": "user", "content": "x"}]
LONG: dict[str, Any] = {"messages": TURNS, "max_tokens": 3000, "ignore_eos": True, "temperature": 1, "seed": 1}


@pytest.fixture(scope="module")
def shared(start: Callable[..., Served]) -> Served:
    """One with two keys."""
    return start("ernie", "--max-model-len", "4096", "--max-num-seqs", "4", "--api-key", OTHER_KEY)


@pytest.fixture(autouse=True)
def going_on(shared: Served) -> Iterator[None]:
    """Whatever a test does, the next one finds the server computing."""
    yield
    shared.post("/resume", {})


class Client:
    """A request on a thread of its own."""

    def __init__(self, served: Served, request_id: str, *, key: str = "", **fields: Any) -> None:
        self.served, self.body = served, {**LONG, **fields}
        self.headers = {"authorization": f"Bearer {key or served.key}", "x-request-id": request_id}
        self.status = self.num_events = 0
        self.last = ""
        self.thread = threading.Thread(target=self._ask)
        self.thread.start()

    def _ask(self) -> None:
        client = httpx.Client(base_url=self.served.url, headers=self.headers, timeout=60)
        with client, client.stream("POST", CHAT, json=self.body) as response:
            self.status = response.status_code
            for line in response.iter_lines():
                if line:
                    self.num_events += 1
                    self.last = line.removeprefix("data: ")

    def begun(self) -> Client:
        wait_until(lambda: self.num_events > 5, 10, "it streams")
        return self

    def ended(self, timeout_s: float = 60) -> str:
        """The last event, or the code of the error."""
        self.thread.join(timeout_s)
        assert not self.thread.is_alive(), "it still waits"
        return self.last if self.last == "[DONE]" else str(json.loads(self.last)["error"]["code"])


def abort(served: Served, *request_ids: str, key: str = "") -> int:
    headers = {"authorization": f"Bearer {key or served.key}"}
    response = httpx.post(f"{served.url}/abort_requests", json={"request_ids": list(request_ids)}, headers=headers)
    assert response.status_code == 200, response.text
    return int(response.json()["aborted"])


def ready(served: Served) -> tuple[int, str]:
    response = httpx.get(f"{served.url}/ready", timeout=5)
    return response.status_code, response.json()["status"]


def test_a_pause_holds_streams_and_new_requests_until_it_is_over(shared: Served) -> None:
    brief = {"messages": TURNS, "max_tokens": 3, "temperature": 0}
    expected = shared.post(CHAT, brief).json()["choices"]
    running = Client(shared, "held", stream=True, max_tokens=600).begun()
    paused = httpx.post(f"{shared.url}/pause", headers=shared.headers)  # without a body, as it has none
    assert (paused.status_code, paused.json()["status"]) == (200, "paused")
    assert ready(shared) == (503, "paused")
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(shared.post(CHAT, brief).json()["choices"]))
    waiting.start()
    time.sleep(0.3)
    before = running.num_events
    time.sleep(0.5)
    assert running.num_events == before
    assert not answers
    assert httpx.get(f"{shared.url}/health", timeout=5).status_code == 200
    assert shared.post("/resume", {}).json()["status"] == "resumed"
    assert ready(shared) == (200, "ready")
    waiting.join(20)
    assert answers == [expected]
    assert running.ended() == "[DONE]"


def test_a_pause_outlives_the_engines_process(shared: Served) -> None:
    shared.post("/pause", {})
    os.kill(shared.engine_pid(), signal.SIGKILL)
    wait_until(lambda: ready(shared) == (503, "restarting"), 5, "its end is seen")
    wait_until(lambda: ready(shared) == (503, "paused"), 30, "the new one is paused, too")
    shared.post("/resume", {})
    assert shared.chat(max_tokens=1)["model"]


@pytest.mark.parametrize("route", ["/pause", "/resume"])
def test_only_the_first_key_holds_up_everybody(shared: Served, route: str) -> None:
    response = httpx.post(shared.url + route, headers={"authorization": f"Bearer {OTHER_KEY}"})
    assert response.status_code == 403
    assert "the first key" in response.json()["error"]["message"]
    assert ready(shared) == (200, "ready")


def test_other_ways_to_pause_are_refused_by_name(shared: Served) -> None:
    assert shared.post("/pause?mode=keep", {}).status_code == 200
    shared.post("/resume", {})
    error = shared.post("/pause?mode=abort", {}).json()["error"]
    assert (error["param"], error["code"]) == ("mode", "invalid_value")
    assert ready(shared) == (200, "ready")


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_is_ended_by_its_id(shared: Served, stream: bool) -> None:
    one, other = Client(shared, "one", stream=stream), Client(shared, "other", stream=True, max_tokens=200)
    other.begun()
    wait_until(lambda: abort(shared, "one", "nobody") == 1, 5, "it runs")
    assert one.ended(5) == "aborted"
    assert one.status == (200 if stream else 499)
    assert other.ended() == "[DONE]"
    assert abort(shared, "one", "other") == 0
    wait_idle(shared)


def test_all_choices_of_a_request_end_and_nothing_is_left(shared: Served) -> None:
    failed = metric(shared, "ernie45_request_failure_total")
    many = Client(shared, "many", stream=True, n=4).begun()
    assert abort(shared, "many") == 1
    assert many.ended(5) == "aborted"
    wait_idle(shared)
    assert metric(shared, "ernie45_request_failure_total") == failed + 1


def test_keys_end_their_own_requests_and_the_first_those_of_all(shared: Served) -> None:
    mine = Client(shared, "mine", stream=True).begun()
    theirs = Client(shared, "theirs", key=OTHER_KEY, stream=True).begun()
    assert abort(shared, "mine", key=OTHER_KEY) == 0
    assert abort(shared, "theirs") == 1
    assert theirs.ended(5) == "aborted"
    assert abort(shared, "mine") == 1
    assert mine.ended(5) == "aborted"


def test_what_a_pause_holds_can_be_ended(shared: Served) -> None:
    held = Client(shared, "held", stream=True).begun()
    shared.post("/pause", {})
    assert abort(shared, "held") == 1
    assert held.ended(5) == "aborted"
    wait_idle(shared)


@pytest.mark.parametrize(
    ("body", "param"), [({}, "request_ids"), ({"request_ids": "x"}, "request_ids"), ({"request_ids": [""]}, "request_ids[0]")]
)  # fmt: skip
def test_ids_have_their_form(shared: Served, body: dict[str, Any], param: str) -> None:
    response = shared.post("/abort_requests", body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_what_is_held_may_end_when_the_server_shuts_down(start: Callable[..., Served]) -> None:
    served = start("ernie", "--max-model-len", "4096")
    held = Client(served, "held", stream=True, max_tokens=600).begun()
    served.post("/pause", {})
    served.process.send_signal(signal.SIGTERM)
    assert held.ended() == "[DONE]"
    assert served.process.wait(10) == 0
