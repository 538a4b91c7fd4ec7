"""What is refused before anything reads a request: names of hosts, sizes, encodings; and what no answer says."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ernie45.server.config import Limits
from ernie45.server.guard import Guard
from tests.server.raw import AUTH, connect, exchange, head, post, read_reply
from tests.server.served import Served


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:80", "LocalHost"]
)
def test_loopback_names_are_served(server: Served, host: str) -> None:
    assert exchange(server, head("/v1/models", host=host)).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example/?localhost",
        "localhost:80:80",
        "localhost@evil.example",
        "x/../localhost",
        "127.1",
        "0.0.0.0",
        "2130706433",
        "[::ffff:127.0.0.1]",
        "",
        "localhost/",
    ],
)
@pytest.mark.parametrize("target", ["/v1/models", "/health", "/"])
def test_names_that_a_web_page_could_choose_are_not(server: Served, host: str, target: str) -> None:
    reply = exchange(server, head(target, host=host))
    assert reply.status in (400, 421)
    if reply.status == 421:
        assert "--allowed-host" in reply.error["message"]


def test_two_hosts_or_none_are_no_request(server: Served) -> None:
    assert exchange(server, head("/health", headers="Host: localhost\r\n")).status == 400
    assert exchange(server, b"GET /health HTTP/1.1\r\n\r\n").status == 400
    assert exchange(server, b"GET /health HTTP/1.0\r\n\r\n").status == 421


@pytest.mark.parametrize("method", ["OPTIONS", "GET", "POST"])
def test_other_origins_are_told_nothing(server: Served, method: str) -> None:
    headers = f"{AUTH}Origin: http://evil.example\r\nAccess-Control-Request-Method: POST\r\n"
    headers += "Access-Control-Request-Headers: authorization\r\n"
    for target in ("/v1/chat/completions", "/health", "/v1/models"):
        for kind in (headers, headers.removeprefix(AUTH)):
            reply = exchange(server, head(target, method=method, headers=kind + "Content-Length: 0\r\n"))
            assert reply.status
            assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("X-Big: " + "a" * (64 << 10) + "\r\n", 431),
        ("X-Big: " + "a" * (1 << 20) + "\r\n", 431),
        ("X: 1\r\n" * 10_000, 431),
        ("X: 1\r\n" * 200, 431),
        ("X: 1\r\n" * 50, 200),
        ("Content-Length: 3\r\nContent-Length: 4\r\n", 400),
        ("Content-Length: -1\r\n", 400),
        ("Content-Length: 1e3\r\n", 400),
        ("Content-Length: " + "9" * 30 + "\r\n", 400),
        ("Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", 400),
        ("Transfer-Encoding: gzip, chunked\r\n", 400),
        ("Transfer-Encoding: gzip\r\n", 400),
        ("X-Bad\x00: 1\r\n", 400),
        ("X: a\x00b\r\n", 400),
        ("X : 1\r\n", 400),
        ("Content-Encoding: gzip\r\nContent-Length: 0\r\n", 415),
        ("Content-Encoding: br\r\nContent-Length: 0\r\n", 415),
        (f"Content-Length: {1 << 30}\r\n", 413),
    ],
)
def test_heads_out_of_bounds(server: Served, headers: str, status: int) -> None:
    reply = exchange(server, head("/v1/models", headers=AUTH + headers))
    assert reply.status == status or (status == 400 and reply.status == 501)
    assert reply.seconds < 0.5
    if status != 200:
        assert reply.error["message"]


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200 + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x00" * 4096 + b"\r\n\r\n",
        b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"\xff" * 10),
        b"a" * 100_000,
    ],
)
def test_what_is_no_http_is_told_so(server: Served, data: bytes) -> None:
    reply = exchange(server, data)
    assert reply.status in (400, 421, 431)
    assert reply.error["type"] == "invalid_request_error"
    assert exchange(server, head("/health")).status == 200


def test_request_ids_are_the_clients_if_they_are_well_formed(server: Served) -> None:
    assert exchange(server, head("/health", headers="x-request-id: abc-1\r\n")).headers["x-request-id"] == "abc-1"
    for bad in ("a b", "a" * 200, "<script>", "\xe9"):
        shown = exchange(server, head("/health", headers=f"x-request-id: {bad}\r\n")).headers["x-request-id"]
        assert shown.startswith("req_")


def _run_guard(app: Any) -> tuple[list[dict[str, Any]], list[tuple[str, int]]]:
    """What the guard sends and counts around an application."""
    sent: list[dict[str, Any]] = []
    answered: list[tuple[str, int]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "method": "GET", "path": "/x\nforged line", "headers": [], "raw_path": b"/x"}
    guard = Guard(app, Limits(), None, lambda route, status: answered.append((route, status)))
    asyncio.run(guard(scope, receive, send))
    return sent, answered


def test_an_unforeseen_error_is_a_500_with_an_id_and_a_trace_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError("secret detail")

    sent, answered = _run_guard(app)
    assert sent[0]["status"] == 500
    assert b"secret detail" not in sent[1]["body"]
    assert answered == [("other", 500)]
    (record,) = [record for record in caplog.records if record.exc_info]
    assert "\n" not in record.getMessage()


def test_an_error_behind_a_whole_answer_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Starlette raises again what its handlers have answered: it must not be logged, or told, twice."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})
        raise KeyError("again")

    sent, _ = _run_guard(app)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert not [record for record in caplog.records if record.exc_info]


def test_an_error_amid_an_answer_is_logged_and_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError("amid")

    sent, _ = _run_guard(app)
    assert len(sent) == 1
    assert [record for record in caplog.records if record.exc_info]


def test_a_pipelined_request_is_answered_in_turn(server: Served) -> None:
    with connect(server) as sock:
        sock.sendall(head("/v1/models") + head("/health"))
        first = read_reply(sock)
        assert first.status == 200
        if b"HTTP/1.1 200" not in first.body:
            assert read_reply(sock).status == 200
    assert exchange(server, post("/v1/nothing", b"{}")).status == 404
