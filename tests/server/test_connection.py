"""Clients that are slow, silent, or many: their connections end, and nobody else notices."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server.raw import (
    AUTH,
    connect,
    exchange,
    head,
    health_s,
    is_closed,
    metric,
    post,
    read_reply,
    reset,
    wait_idle,
    wait_until,
)
from tests.server.served import Served

CHAT = "/v1/chat/completions"
LIMITS = {
    "header_timeout_s": 0.8,
    "body_timeout_s": 0.8,
    "write_timeout_s": 1.0,
    "connections": 24,
    "request_timeout_s": 30,
}


@pytest.fixture(scope="module")
def strict(start: Callable[..., Served]) -> Served:
    """A server without patience."""
    program = (str(Path(__file__).parent / "tuned_server.py"), json.dumps({"limits": LIMITS, "keep_alive_s": 0.2}))
    return start("ernie_thinking", "--max-model-len", "4096", "--served-model-name", "tiny", program=program)


def drip(sock: socket.socket, data: bytes, pause_s: float, total_s: float) -> bool:
    """Send byte by byte; returns whether the server has closed the connection in that time."""
    deadline = time.monotonic() + total_s
    sock.settimeout(pause_s)
    for at in range(len(data)):
        try:
            sock.sendall(data[at : at + 1])
            if not sock.recv(1 << 16):
                return True
        except TimeoutError:
            pass
        except OSError:
            return True
        if time.monotonic() > deadline:
            return False
    return False


def test_silent_connections_end(strict: Served) -> None:
    with connect(strict) as sock:
        assert is_closed(sock, 3)


def test_headers_that_drip_end(strict: Served) -> None:
    with connect(strict) as sock:
        assert drip(sock, head("/v1/models", headers="X-Slow: " + "a" * 500 + "\r\n"), 0.05, 5)


def test_headers_of_a_second_request_may_not_drip_either(strict: Served) -> None:
    """Where a connection is used again, the first request's end must not stop the second one's clock."""
    with connect(strict) as sock:
        sock.sendall(head("/health"))
        assert read_reply(sock).status == 200
        assert drip(sock, head("/v1/models", headers="X-Slow: " + "a" * 500 + "\r\n"), 0.05, 5)


def test_empty_lines_are_no_request(strict: Served) -> None:
    with connect(strict) as sock:
        assert drip(sock, b"\r\n" * 100, 0.05, 5)


def test_a_request_that_began_behind_another_has_a_clock(strict: Served) -> None:
    with connect(strict) as sock:
        sock.sendall(head("/health") + b"GET /v1/models HTT")
        assert read_reply(sock).status == 200
        assert is_closed(sock, 3)


def test_a_connection_that_is_kept_waits_longer_than_headers_may_take(strict: Served) -> None:
    with connect(strict) as sock:
        for _ in range(2):
            sock.sendall(head("/health"))
            assert read_reply(sock).status == 200
            time.sleep(1.2)
        sock.sendall(head("/health"))
        assert read_reply(sock).status == 200


@pytest.mark.parametrize(
    "headers", ["Content-Length: 100\r\n", pytest.param("Transfer-Encoding: chunked\r\n", marks=pytest.mark.slow)]
)
def test_bodies_that_drip_end_with_a_408(strict: Served, headers: str) -> None:
    with connect(strict) as sock:
        sock.sendall(head(CHAT, method="POST", headers=AUTH + headers))
        start = time.monotonic()
        reply = read_reply(sock)
        assert (reply.status, reply.error["code"]) == (408, "body_timeout")
        assert time.monotonic() - start < 2
        assert is_closed(sock, 4)


def test_a_body_behind_its_refusal_is_read_for_a_while_only(strict: Served) -> None:
    """A route that does not exist answers at once; what is still sent then must not hold the connection for ever."""
    with connect(strict) as sock:
        sock.sendall(
            head("/v1/nothing", method="POST", headers=f"{AUTH}Transfer-Encoding: chunked\r\n") + b"1\r\nx\r\n"
        )
        assert read_reply(sock).status == 404
        assert drip(sock, b"1\r\nx\r\n" * 200, 0.03, 8)


def test_a_broken_chunk_ends_the_request(strict: Served) -> None:
    with connect(strict) as sock:
        sock.sendall(head(CHAT, method="POST", headers=f"{AUTH}Transfer-Encoding: chunked\r\n") + b"5\r\n{\r\n")
        sock.sendall(b"nonsense\r\n\r\n")
        assert read_reply(sock).status == 400
        assert is_closed(sock, 4)


def test_leaving_amid_a_body_is_no_failure_of_the_server(strict: Served) -> None:
    for _ in range(5):
        sock = connect(strict)
        sock.sendall(head(CHAT, method="POST", headers=f"{AUTH}Content-Length: 100\r\n") + b'{"mess')
        time.sleep(0.02)
        reset(sock)
    time.sleep(0.3)
    assert not [line for line in strict.log if "Traceback" in line]


def stream_body(**fields: Any) -> bytes:
    """A stream of megabytes."""
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "stream": True,
        "ignore_eos": True,
        "temperature": 2,
        **fields,
    }
    return json.dumps(
        {"max_tokens": 3500, "logprobs": True, "top_logprobs": 20, "return_token_ids": True, **body}
    ).encode()


def test_a_stream_that_nobody_reads_is_cut_and_frees_its_pages(strict: Served) -> None:
    slow = connect(strict, receive_bytes=2048)
    slow.sendall(post(CHAT, stream_body()))
    wait_until(lambda: metric(strict, "ernie45_num_requests_running") > 0, 10, "the stream runs")
    start = time.monotonic()
    assert strict.chat(max_tokens=4)["usage"]["completion_tokens"] == 4
    assert health_s(strict) < 0.5
    wait_until(lambda: any("has not read its stream" in line for line in strict.log), 20, "the stream is given up")
    wait_idle(strict)
    assert time.monotonic() - start < 20
    assert is_closed(slow, 5)
    slow.close()


def test_a_whole_answer_that_nobody_reads_is_cut(strict: Served) -> None:
    body = stream_body(stream=False, max_tokens=900)
    time.sleep(0.3)  # those of earlier tests are closed by now
    before = _connections(strict)
    slow = connect(strict, receive_bytes=2048)
    slow.sendall(post(CHAT, body))
    wait_until(lambda: _connections(strict) > before, 5, "the connection is there")
    wait_until(lambda: _connections(strict) <= before, 20, "the connection is given up")
    slow.close()
    wait_idle(strict)


def test_a_slow_reader_that_reads_gets_everything(strict: Served) -> None:
    sock = connect(strict, receive_bytes=64 << 10)
    sock.sendall(post(CHAT, stream_body(stream=False, max_tokens=300)))
    received = b""
    while b"\r\n\r\n" not in received or len(received.partition(b"\r\n\r\n")[2]) < _length(received):
        received += sock.recv(64 << 10)
        time.sleep(0.02)
    assert len(json.loads(received.partition(b"\r\n\r\n")[2])["choices"][0]["logprobs"]["content"]) == 300
    sock.close()


def _length(received: bytes) -> int:
    top = received.partition(b"\r\n\r\n")[0].decode().lower()
    return int(top.partition("content-length:")[2].split()[0])


def _connections(served: Served) -> int:
    return len([link for link in Path(f"/proc/{served.process.pid}/fd").iterdir() if _is_socket(link)])


def _is_socket(link: Path) -> bool:
    try:
        return str(link.readlink()).startswith("socket:")
    except OSError:
        return False


def test_idle_connections_make_way_for_others(strict: Served) -> None:
    """With all places taken by connections that do nothing, a new one is served, and their number stays bounded."""
    idle = [connect(strict) for _ in range(80)]
    try:
        for _ in range(20):
            assert exchange(strict, head("/health")).status == 200
            assert strict.chat(max_tokens=1)["model"] == "tiny"
        assert _connections(strict) < LIMITS["connections"] + 12
    finally:
        for sock in idle:
            sock.close()


def test_with_all_connections_busy_another_one_is_told_so(strict: Served) -> None:
    busy = [connect(strict) for _ in range(24)]
    try:
        for sock in busy:
            sock.sendall(post(CHAT, stream_body(logprobs=False, top_logprobs=None, max_tokens=2000)))
        for sock in busy:
            sock.recv(100)
        reply = exchange(strict, head("/health"))
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert reply.error["code"] == "too_many_connections"
    finally:
        for sock in busy:
            sock.close()
    wait_until(lambda: exchange(strict, head("/health")).status == 200, 5, "there is room again")
    wait_idle(strict)


def test_pipelining_hides_no_departure(strict: Served) -> None:
    """A client that sends more while it waits must still be seen to leave: what it asked for would run on for nobody."""
    sock = connect(strict)
    sock.sendall(post(CHAT, stream_body(stream=False, logprobs=False, top_logprobs=None)) + head("/health") * 3)
    wait_until(lambda: metric(strict, "ernie45_num_requests_running") > 0, 5, "it runs")
    sock.sendall(head("/health"))
    time.sleep(0.1)
    reset(sock)
    start = time.monotonic()
    wait_idle(strict, 3)
    assert time.monotonic() - start < 3


def test_pipelining_is_bounded(strict: Served) -> None:
    with connect(strict) as sock:
        sock.sendall(post(CHAT, stream_body(logprobs=False, top_logprobs=None)))
        sender = threading.Thread(target=_flood, args=[sock])
        sender.start()
        assert is_closed(sock, 5)
        sender.join()
    wait_idle(strict)


def _flood(sock: socket.socket) -> None:
    try:
        for _ in range(200):
            sock.sendall(b"GET /health HTTP/1.1\r\n" * 1000)
    except OSError:
        pass


def test_connections_that_were_reset_leave_nothing_behind(strict: Served) -> None:
    """Neither a descriptor nor, for as long as a connection may be kept, the memory of one."""

    def rss() -> int:
        return int(Path(f"/proc/{strict.process.pid}/statm").read_text().split()[1]) << 12

    def leave(count: int) -> None:
        for _ in range(count):
            sock = connect(strict)
            sock.sendall(head("/health") + post("/v1/tokenize", b'{"prompt": "x"}'))
            read_reply(sock)
            reset(sock)

    leave(300)
    before, files = rss(), _connections(strict)
    leave(1500)
    assert rss() - before < 4 << 20  # 10 MB, were they kept
    wait_until(lambda: _connections(strict) <= files, 3, "their descriptors are closed")


def test_answers_on_a_connection_that_is_kept_do_not_wait_for_acknowledgements(strict: Served) -> None:
    """Nagle's algorithm would hold the end of each answer back for 40 ms."""
    with strict.client() as client:
        client.get("/version")
        start = time.monotonic()
        for _ in range(20):
            assert client.get("/version").status_code == 200
        assert time.monotonic() - start < 0.5
