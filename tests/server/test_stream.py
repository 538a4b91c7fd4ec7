"""Streams: frames, signs of life; and clients that leave at any moment, whose work ends with them."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from ernie45.server.stream import DONE, EventStream, data, named
from tests.server.raw import connect, metric, post, reset, wait_idle, wait_until
from tests.server.served import Served

CHAT = "/v1/chat/completions"


def test_frames_hold_one_line_of_data_whatever_is_in_them() -> None:
    for text in ("a\nb", "a\r\nb\r", "\u2028\u2029\x85", "\x00", "data: x\n\nevent: y", "é😀"):
        frame = data({"text": text})
        assert frame.endswith(b"\n\n")
        assert frame.count(b"\n") == 2
        assert b"\r" not in frame
        assert json.loads(frame.removeprefix(b"data: ")) == {"text": text}
        assert named("kind", {"text": text}).startswith(b"event: kind\ndata: ")


class Wire:
    """An ASGI server's side: what was sent, and a client that may leave or stop reading."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()

    async def send(self, message: Any) -> None:
        await self.reads.wait()
        self.sent.append(message)

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


def stream(frames: AsyncIterator[bytes], ended: list[str], **settings: Any) -> EventStream:
    return EventStream(
        frames, on_end=lambda: ended.append("end"), **{"keep_alive_s": 0.05, "write_timeout_s": 0.2, **settings}
    )


def test_a_first_frame_may_take_longer_than_a_client_that_does_not_read() -> None:
    async def frames() -> AsyncIterator[bytes]:
        await asyncio.sleep(0.8)  # a long prompt, or a long queue
        yield DONE

    async def check() -> None:
        wire = Wire()
        ended: list[str] = []
        await stream(frames(), ended)({"type": "http"}, wire.receive, wire.send)
        assert wire.body.startswith(b": keep-alive\n\n")
        assert wire.body.endswith(DONE)

    asyncio.run(check())


def test_silence_is_filled_with_comments() -> None:
    async def frames() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        await asyncio.sleep(0.3)
        yield DONE

    async def check() -> None:
        wire = Wire()
        ended: list[str] = []
        await stream(frames(), ended)({"type": "http"}, wire.receive, wire.send)
        assert ended == ["end"]
        assert wire.body.startswith(b"data: 1\n\n: keep-alive\n\n")
        assert wire.body.endswith(DONE)
        assert wire.sent[-1]["more_body"] is False
        headers = dict(wire.sent[0]["headers"])
        assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
        assert headers[b"cache-control"] == b"no-store"

    asyncio.run(check())


@pytest.mark.parametrize("way", ["leaves", "does not read", "server stops", "frames fail", "cannot begin"])
def test_every_way_out_closes_the_frames_and_says_so_once(way: str) -> None:
    closed: list[str] = []

    async def frames() -> AsyncIterator[bytes]:
        try:
            yield b"data: 1\n\n"
            if way == "frames fail":
                raise KeyError("frames")
            while True:
                await asyncio.sleep(0.01)
                yield b"data: 2\n\n"
        finally:
            closed.append("frames")

    async def check() -> None:
        wire = Wire()
        ended: list[str] = []
        if way == "cannot begin":
            wire.reads.clear()
        running = asyncio.create_task(stream(frames(), ended)({"type": "http"}, wire.receive, wire.send))
        await asyncio.sleep(0.05)
        if way == "leaves":
            wire.gone.set()
        elif way == "does not read":
            wire.reads.clear()
        elif way == "server stops":
            running.cancel()
        start = time.monotonic()
        result = (await asyncio.gather(running, return_exceptions=True))[0]
        assert time.monotonic() - start < 2
        assert isinstance(
            result, {"server stops": asyncio.CancelledError, "frames fail": KeyError}.get(way, type(None))
        )
        assert ended == ["end"]
        assert closed == ([] if way == "cannot begin" else ["frames"])

    asyncio.run(check())


@pytest.fixture(scope="module")
def limited(start: Callable[..., Served]) -> Served:
    """One request at a time: a ticket that is not given back shows at the next request."""
    return start("ernie", "--max-model-len", "4096", "--concurrent-requests", "1")


def body(stream: bool, **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": "x"}]
    return {"messages": turns, "stream": stream, "max_tokens": 3000, "ignore_eos": True, "temperature": 2, **fields}


def gone_and_forgotten(served: Served, failures: float) -> None:
    """The engine is idle, the key may go on, and the books say one more failure."""
    wait_idle(served, 3)
    assert served.chat(max_tokens=1)["usage"]["completion_tokens"] == 1
    assert metric(served, "ernie45_request_failure_total") == failures + 1


@pytest.mark.parametrize("index", [*range(8), 20, 60])
def test_leaving_at_any_event_frees_everything(limited: Served, index: int) -> None:
    failures = metric(limited, "ernie45_request_failure_total")
    with connect(limited) as sock:
        sock.sendall(post(CHAT, json.dumps(body(True)).encode(), f"Authorization: Bearer {limited.key}\r\n"))
        received = b""
        while received.count(b"data: ") < index:
            received += sock.recv(200)
        reset(sock)
    gone_and_forgotten(limited, failures)


@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.01, 0.05, 0.3])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_leaving_a_whole_answer_frees_everything(limited: Served, after_s: float, path: str) -> None:
    fields = body(False)
    if path != CHAT:
        del fields["messages"]
        fields |= {"prompt": ["one", "two", "three"], "n": 2}
        fields["max_tokens"] = 1500
    failures = metric(limited, "ernie45_request_failure_total")
    with connect(limited) as sock:
        sock.sendall(post(path, json.dumps(fields).encode(), f"Authorization: Bearer {limited.key}\r\n"))
        wait_until(lambda: after_s > 0.1 or metric(limited, "ernie45_num_requests_running") > 0, 5, "it runs")
        time.sleep(after_s)
        reset(sock)
    gone_and_forgotten(limited, failures)


@pytest.mark.parametrize("index", [1, 3, 9])
def test_leaving_a_stream_of_several_prompts_frees_everything(limited: Served, index: int) -> None:
    """Their events are merged: an end that the merging took in passing was waited for in vain once."""
    fields = {**body(True), "prompt": ["one", "two", "three"], "max_tokens": 1000}
    del fields["messages"]
    for _ in range(3):
        failures = metric(limited, "ernie45_request_failure_total")
        with limited.client() as client, client.stream("POST", "/v1/completions", json=fields) as response:
            for number, _line in enumerate(response.iter_lines()):
                if number == index:
                    break
        gone_and_forgotten(limited, failures)


def test_leaving_before_the_grammar_is_compiled_frees_everything(limited: Served) -> None:
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string", "maxLength": 50} for i in range(400)}}
    with connect(limited) as sock:
        request = json.dumps(body(False, guided_json=schema)).encode()
        sock.sendall(post(CHAT, request, f"Authorization: Bearer {limited.key}\r\n"))
        reset(sock)
    wait_until(lambda: limited.post(CHAT, body(False, max_tokens=1)).status_code == 200, 10, "the ticket is back")
    wait_idle(limited)


def test_a_whole_stream_is_no_failure(limited: Served) -> None:
    failures = metric(limited, "ernie45_request_failure_total")
    assert limited.events(CHAT, body(True, max_tokens=5))[-1] == "[DONE]"
    wait_idle(limited)
    assert metric(limited, "ernie45_request_failure_total") == failures


def test_many_leave_at_once(server: Served) -> None:
    def leave(number: int) -> None:
        with connect(server) as sock:
            sock.sendall(post(CHAT, json.dumps(body(True, max_tokens=1500)).encode()))
            for _ in range(number % 7):
                sock.recv(100)
            reset(sock)

    threads = [threading.Thread(target=leave, args=[number]) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_idle(server, 10)
    assert server.chat(max_tokens=1)["model"] == "tiny"


def test_a_request_that_takes_too_long_is_a_504(start: Callable[..., Served]) -> None:
    served = start("ernie", "--max-model-len", "4096", "--request-timeout", "0.2")
    whole = served.post(CHAT, body(False))
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
    with served.client() as client, client.stream("POST", CHAT, json=body(True)) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.status_code == 200
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    wait_idle(served)
    assert metric(served, "ernie45_request_failure_total") == 2
    served.stop()
