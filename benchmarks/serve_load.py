"""The client: streamed requests in closed and open loops, and when their tokens came.

Client and server share the cores, so the client does next to nothing while streams run: a read costs a look at the clock and an
append. HTTP, server-sent events and JSON are taken apart when the load is over. Every request has a connection of its own, which
the server closes behind the answer.
"""

from __future__ import annotations

import asyncio
import bisect
import json
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_BLANK_LINE = re.compile(rb"\r?\n\r?\n")
_POLL_S = 0.005
_FIRST_READS = 6  # head and some tokens: the stream runs
_OK = 200
_LAST_CHUNK = b"0\r\n\r\n"


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where requests go."""

    host: str
    port: int
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def encode(self, body: Mapping[str, Any]) -> bytes:
        """A whole POST request."""
        content = json.dumps(body, separators=(",", ":")).encode()
        stated = {
            "Host": f"{self.host}:{self.port}",
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            "Connection": "close",
            **self.headers,
        }
        head = f"POST {self.path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in stated.items())
        return head.encode() + b"\r\n" + content


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of one request. All times are seconds on one clock."""

    start_s: float
    """When it was due, which in an open loop may be a little before it could be sent."""
    token_times_s: tuple[float, ...] = ()
    """Arrivals of the events that carry output, mostly one token each."""
    end_s: float
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """As the server counts them."""
    cached_tokens: int | None = None
    """Prompt tokens that the server did not compute; None = it does not tell."""
    error: str | None = None
    """A status such as `429`, `deadline`, `connection`, `stream` or `incomplete`."""
    detail: str = ""
    """The beginning of what the server said about the error."""

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.token_times_s[0] - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Time per token behind the first; None for a single token."""
        if self.completion_tokens < 2:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / (self.completion_tokens - 1)

    @property
    def elapsed_s(self) -> float:
        """From the request to the end of its answer."""
        return self.end_s - self.start_s

    @property
    def gaps_s(self) -> list[float]:
        """Between events that carry output."""
        return [b - a for a, b in zip(self.token_times_s, self.token_times_s[1:], strict=False)]


@dataclass(frozen=True, kw_only=True)
class Load:
    """A load that is over."""

    answers: tuple[Answer, ...]
    client_cpu_s: float
    """CPU seconds that the client took while streams ran."""


@dataclass(kw_only=True)
class _Raw:
    """A request as it went over the wire."""

    start_s: float
    end_s: float = 0.0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None


class _Exchange(asyncio.Protocol):
    """One connection: sends the request, keeps what comes with the time."""

    def __init__(self, payload: bytes, raw: _Raw) -> None:
        self._payload, self._raw = payload, raw
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "a TCP connection"
        self._transport = transport
        transport.write(self._payload)

    def data_received(self, data: bytes) -> None:
        self._raw.pieces.append((time.perf_counter(), data))
        # For servers that keep the connection although they were asked to close it.
        if data == _LAST_CHUNK or data.endswith(b"\r\n" + _LAST_CHUNK):
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._raw.error = "connection" if exc is not None else self._raw.error
        if not self.closed.done():
            self.closed.set_result(None)


def closed_loop(endpoint: Endpoint, bodies: Sequence[Mapping[str, Any]], concurrency: int, deadline_s: float) -> Load:
    """As many clients as `concurrency`, each sending its next request when it has its answer, until all are sent."""
    payloads = iter([endpoint.encode(body) for body in bodies])

    async def client(raws: list[_Raw]) -> None:
        for payload in payloads:
            raws.append(await _send(endpoint, payload, deadline_s))

    async def load() -> list[_Raw]:
        raws: list[_Raw] = []
        await asyncio.gather(*(client(raws) for _ in range(concurrency)))
        return raws

    return _run(load)


def open_loop(
    endpoint: Endpoint, bodies: Sequence[Mapping[str, Any]], due_s: Sequence[float], deadline_s: float
) -> Load:
    """Every request at its time, whatever has become of the others. Args: due_s: behind the begin, ascending."""
    payloads = [endpoint.encode(body) for body in bodies]

    async def load() -> list[_Raw]:
        begin, tasks = time.perf_counter(), []
        for payload, due in zip(payloads, due_s, strict=True):
            await asyncio.sleep(max(0.0, begin + due - time.perf_counter()))
            tasks.append(asyncio.create_task(_send(endpoint, payload, deadline_s, start_s=begin + due)))
        return await asyncio.gather(*tasks)

    return _run(load)


def disturbed_streams(
    endpoint: Endpoint, running: Sequence[Mapping[str, Any]], late: Mapping[str, Any], quiet_s: float, deadline_s: float
) -> Load:
    """Streams that run by themselves for `quiet_s`, then one more request; its answer is the last."""
    payloads, late_payload = [endpoint.encode(body) for body in running], endpoint.encode(late)

    async def load() -> list[_Raw]:
        raws = [_Raw(start_s=time.perf_counter()) for _ in payloads]
        tasks = [
            asyncio.create_task(_send(endpoint, payload, deadline_s, raw=raw))
            for payload, raw in zip(payloads, raws, strict=True)
        ]
        while not all(len(raw.pieces) >= _FIRST_READS or t.done() for raw, t in zip(raws, tasks, strict=True)):
            await asyncio.sleep(_POLL_S)
        await asyncio.sleep(quiet_s)
        last = await _send(endpoint, late_payload, deadline_s)
        return [*await asyncio.gather(*tasks), last]

    return _run(load)


def poisson_times(rate_per_s: float, seconds: float, seed: int) -> list[float]:
    """Arrivals of a Poisson process within `seconds`."""
    generator, at, times = random.Random(seed), 0.0, []
    while (at := at + generator.expovariate(rate_per_s)) < seconds:
        times.append(at)
    return times


def _run(load: Callable[[], Awaitable[list[_Raw]]]) -> Load:
    async def timed() -> tuple[list[_Raw], float]:
        begin = time.process_time()
        raws = await load()
        return raws, time.process_time() - begin

    raws, cpu_s = asyncio.run(timed())
    return Load(answers=tuple(_read(raw) for raw in raws), client_cpu_s=cpu_s)


async def _send(
    endpoint: Endpoint, payload: bytes, deadline_s: float, *, start_s: float | None = None, raw: _Raw | None = None
) -> _Raw:
    raw = raw or _Raw(start_s=time.perf_counter() if start_s is None else start_s)
    loop = asyncio.get_running_loop()
    try:
        transport, exchange = await loop.create_connection(
            lambda: _Exchange(payload, raw), endpoint.host, endpoint.port
        )
    except OSError:
        raw.error, raw.end_s = "connection", time.perf_counter()
        return raw
    try:
        await asyncio.wait_for(exchange.closed, deadline_s)
    except asyncio.TimeoutError:
        raw.error = "deadline"
        transport.abort()
    raw.end_s = time.perf_counter()
    return raw


def _read(raw: _Raw) -> Answer:
    """Take an exchange apart."""
    whole = b"".join(data for _, data in raw.pieces)
    head, found, _ = whole.partition(b"\r\n\r\n")
    if not found:
        return Answer(start_s=raw.start_s, end_s=raw.end_s, error=raw.error or "connection")
    status = int(head.split(b" ", 2)[1])
    content, places = _content(whole, len(head) + 4, chunked=b"transfer-encoding: chunked" in head.lower())
    if status != _OK:
        detail = content[:300].decode(errors="replace")
        return Answer(start_s=raw.start_s, end_s=raw.end_s, error=str(status), detail=detail)
    return _read_events(raw, content, places)


def _content(whole: bytes, begin: int, *, chunked: bool) -> tuple[bytes, list[tuple[int, int]]]:
    """The content behind the head, and where its parts begin: in the content and on the wire."""
    if not chunked:
        return whole[begin:], [(0, begin)]
    parts, places, length = [], [], 0
    while (line_end := whole.find(b"\r\n", begin)) > 0:
        size = int(whole[begin:line_end].split(b";")[0], 16)
        if size == 0:
            break
        places.append((length, line_end + 2))
        parts.append(whole[line_end + 2 : line_end + 2 + size])
        length += len(parts[-1])
        begin = line_end + 2 + size + 2
    return b"".join(parts), places or [(0, begin)]


def _read_events(raw: _Raw, content: bytes, places: Sequence[tuple[int, int]]) -> Answer:
    times: list[float] = []
    usage: Mapping[str, Any] = {}
    finish_s, ended, error, detail = None, False, raw.error, ""
    for offset, event in _events(content):
        if event == b"[DONE]":
            ended = True
            continue
        told = json.loads(event)
        if "error" in told:
            error, detail = "stream", json.dumps(told["error"])[:300]
        usage = told.get("usage") or usage
        if told.get("choices"):
            choice = told["choices"][0]
            arrival_s = _arrival_s(raw, places, offset)
            if choice.get("finish_reason") is not None:
                finish_s, ended = arrival_s, True
            if _carries_output(choice):
                times.append(arrival_s)
    if not times and finish_s is not None:  # all tokens were parts of characters, which some servers keep to themselves
        times = [finish_s]
    return Answer(
        start_s=raw.start_s,
        token_times_s=tuple(times),
        # Some servers leave the connection open for a moment behind the last event.
        end_s=_arrival_s(raw, places, len(content) - 1) if ended else raw.end_s,
        prompt_tokens=usage.get("prompt_tokens", 0),
        completion_tokens=usage.get("completion_tokens", 0),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        error=error or (None if ended and times else "incomplete"),
        detail=detail,
    )


def _events(content: bytes) -> list[tuple[int, bytes]]:
    """The data of every complete event, with the offset of its last byte."""
    events, begin = [], 0
    for blank in _BLANK_LINE.finditer(content):
        lines = content[begin : blank.start()].splitlines()
        data = b"\n".join(line[5:].strip() for line in lines if line.startswith(b"data:"))
        begin = blank.end()
        if data:
            events.append((blank.end() - 1, data))
    return events


def _carries_output(choice: Mapping[str, Any]) -> bool:
    """Whether a token stands behind the event. A completion's event may be empty: its token ended within a character."""
    if "text" in choice:
        return bool(choice["text"]) or choice.get("finish_reason") is None
    delta = choice.get("delta") or {}
    return any(delta.get(name) for name in ("content", "reasoning_content", "reasoning"))


def _arrival_s(raw: _Raw, places: Sequence[tuple[int, int]], offset: int) -> float:
    """When the byte at `offset` of the content came."""
    in_content, on_wire = places[bisect.bisect_right(places, (offset, 1 << 62)) - 1]
    position, reached = on_wire + offset - in_content, 0
    for at, data in raw.pieces:
        reached += len(data)
        if position < reached:
            return at
    return raw.end_s
