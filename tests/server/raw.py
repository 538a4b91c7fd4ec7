"""Requests as bytes: what no well-behaved client sends, and what comes back."""

from __future__ import annotations

import itertools
import json
import re
import socket
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.server.served import KEY, Served

AUTH = f"Authorization: Bearer {KEY}\r\n"


@dataclass
class Reply:
    """One answer."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    seconds: float = 0.0

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


def connect(served: Served, *, receive_bytes: int | None = None) -> socket.socket:
    """A connection. Args: receive_bytes: of the kernel's buffer, so that what is not read stays with the server."""
    parts = urlsplit(served.url)
    sock = socket.socket()
    if receive_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.settimeout(15)
    sock.connect((parts.hostname, parts.port))
    return sock


def head(target: str, *, method: str = "GET", headers: str = AUTH, host: str = "localhost") -> bytes:
    """The head of a request."""
    return f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n".encode("latin-1")


def post(path: str, body: bytes, headers: str = AUTH) -> bytes:
    """A whole request."""
    return head(path, method="POST", headers=f"{headers}Content-Length: {len(body)}\r\n") + body


def exchange(served: Served, first: bytes, rest: Iterable[bytes] = ()) -> Reply:
    """Send, as far as the server takes it, and read one answer. Status 0: the connection was closed without one."""
    with connect(served) as sock:
        start = time.monotonic()
        try:
            for part in itertools.chain([first], rest):
                sock.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            pass
        reply = read_reply(sock, has_body=first[:5] != b"HEAD ")
        reply.seconds = time.monotonic() - start
        reply.body = reply.body[
            : int(reply.headers.get("content-length", len(reply.body)))
        ]  # what may follow is another one
        return reply


def read_reply(sock: socket.socket, *, has_body: bool = True) -> Reply:
    """Read one answer with a known length; bytes of the next one may stand behind its body."""
    received = b""
    try:
        while b"\r\n\r\n" not in received:
            data = sock.recv(1 << 16)
            if not data:
                return Reply(0)
            received += data
        top, _, body = received.partition(b"\r\n\r\n")
        first, *lines = top.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        while has_body and len(body) < int(headers.get("content-length", 0)):
            body += sock.recv(1 << 16)
    except ConnectionResetError:
        return Reply(0)
    return Reply(int(first.split()[1]), headers, body)


def is_closed(sock: socket.socket, timeout_s: float) -> bool:
    """Whether the server closes the connection in that time, whatever it sends before."""
    sock.settimeout(timeout_s)
    try:
        while sock.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


def reset(sock: socket.socket) -> None:
    """Leave as a client that crashed."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def metric(served: Served, name: str, **labels: str) -> float:
    """The sum of a metric over the samples that have these labels."""
    total, found = 0.0, False
    for line in served.get("/metrics").text.splitlines():
        match = re.fullmatch(rf"{re.escape(name)}(\{{.*\}})? (\S+)", line)
        if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
            total, found = total + float(match[2]), True
    assert found or labels, f"there is no metric {name}"
    return total


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll. Raises: AssertionError."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def wait_idle(served: Served, timeout_s: float = 5) -> None:
    """Until the engine holds nothing: no sequence and no page."""
    names = ("ernie45_num_requests_running", "ernie45_num_requests_waiting", "ernie45_kv_cache_usage_perc")
    wait_until(lambda: not any(metric(served, name) for name in names), timeout_s, "the engine is idle")


def health_s(served: Served) -> float:
    """Seconds that the event loop takes for nothing."""
    start = time.monotonic()
    assert httpx.get(f"{served.url}/health", timeout=30).status_code == 200
    return time.monotonic() - start
