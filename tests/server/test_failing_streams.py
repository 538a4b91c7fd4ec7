"""What clients of `/responses` and `/messages` see when a stream fails, and when they ask for too much at once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from tests.server.served import Served

openai = pytest.importorskip("openai", reason="openai is not installed: pip install ernie45[test]")
anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed: pip install ernie45[test]")

LONG: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1900, "min_tokens": 1900, "stream": True},
    "/v1/messages": {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 1900,
        "min_tokens": 1900,
        "stream": True,
    },
}


@pytest.fixture(scope="module")
def narrow(start: Callable[..., Served]) -> Served:
    """One request at a time."""
    return start("ernie_thinking", "--concurrent-requests", "1", "--max-model-len", "2048")


def frames_of_a_stream_whose_engine_dies(server: Served, path: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and values of the events; the engine's process is killed when the first text has come."""
    found: list[tuple[str, dict[str, Any]]] = []
    name = ""
    killed = False
    server.wait_ready()
    with server.client() as client, client.stream("POST", path, json=LONG[path]) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                found.append((name, json.loads(line.removeprefix("data: "))))
            if name.endswith("delta") and not killed:
                killed = True
                os.kill(server.engine_pid(), signal.SIGKILL)
    server.wait_ready()
    return found


def test_a_response_that_fails_says_so_twice(narrow: Served) -> None:
    frames = frames_of_a_stream_whose_engine_dies(narrow, "/v1/responses")
    (name, error), (last_name, last) = frames[-2:]
    assert (name, error["type"], error["code"]) == ("error", "error", "engine_unavailable")
    assert "send it again" in error["message"]
    assert last_name == last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": error["message"]}
    assert last["response"]["output"][-1]["status"] == "incomplete"
    assert [event["sequence_number"] for _, event in frames] == list(range(len(frames)))


def test_a_message_that_fails_ends_with_an_error(narrow: Served) -> None:
    name, error = frames_of_a_stream_whose_engine_dies(narrow, "/v1/messages")[-1]
    assert name == error["type"] == "error"
    assert error["error"]["type"] == "overloaded_error"
    assert "send it again" in error["error"]["message"]
    assert error["request_id"]


def test_the_clients_raise_at_streams_that_fail(narrow: Served) -> None:
    client = anthropic.Anthropic(base_url=narrow.url, api_key=narrow.key, max_retries=0)
    narrow.wait_ready()
    body = {name: value for name, value in LONG["/v1/messages"].items() if name not in ("stream", "min_tokens")}
    with client.messages.stream(model="ernie_thinking", extra_body={"min_tokens": 1900}, **body) as stream:
        next(stream)
        os.kill(narrow.engine_pid(), signal.SIGKILL)
        with pytest.raises(anthropic.APIStatusError, match="send it again"):
            stream.until_done()
    narrow.wait_ready()


def test_too_much_at_once_is_a_rate_limit_error(narrow: Served) -> None:
    openais = openai.OpenAI(base_url=f"{narrow.url}/v1", api_key=narrow.key, max_retries=0)
    anthropics = anthropic.Anthropic(base_url=narrow.url, api_key=narrow.key, max_retries=0)
    narrow.wait_ready()
    with narrow.client() as client, client.stream("POST", "/v1/responses", json=LONG["/v1/responses"]) as running:
        lines = running.iter_lines()
        next(lines)
        with pytest.raises(openai.RateLimitError) as one:
            openais.responses.create(model="ernie_thinking", input="Hi")
        with pytest.raises(anthropic.RateLimitError, match="rate_limit_error") as other:
            anthropics.messages.create(
                model="ernie_thinking", max_tokens=1, messages=[{"role": "user", "content": "Hi"}]
            )
    for refused in (one, other):
        response: httpx.Response = refused.value.response
        assert int(response.headers["retry-after"]) >= 1


def test_a_silent_stream_of_messages_is_kept_alive_by_pings() -> None:
    from ernie45.server.stream import EventStream

    async def slow() -> AsyncIterator[bytes]:
        yield b"first\n\n"
        await asyncio.sleep(0.2)
        yield b"last\n\n"

    async def run() -> list[bytes]:
        sent: list[bytes] = []

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))

        async def receive() -> Any:
            await asyncio.sleep(10)

        stream = EventStream(
            slow(), on_end=lambda: None, keep_alive_s=0.05, write_timeout_s=5, keep_alive=b"event: ping\n\n"
        )
        await stream({"type": "http", "headers": []}, receive, send)
        return sent

    sent = asyncio.run(run())
    assert b"event: ping\n\n" in sent[sent.index(b"first\n\n") : sent.index(b"last\n\n")]
