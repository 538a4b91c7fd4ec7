"""Server-sent events: frames, signs of life while nothing happens, and an end when the client has gone or does not read."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ernie45.server.asgi import json_bytes
from ernie45.server.connection import cut

_logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_TICK_S = 0.5


def data(value: object) -> bytes:
    """An event of JSON."""
    return b"data: " + json_bytes(value) + b"\n\n"


def named(event: str, value: object) -> bytes:
    """An event with a name, as Responses and Anthropic's messages have them."""
    return b"event: " + event.encode() + b"\ndata: " + json_bytes(value) + b"\n\n"


class EventStream(Response):
    """Sends frames as they come. Every way out closes the frames' generator and calls `on_end`."""

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncIterator[bytes],
        *,
        on_end: Callable[[], None],
        keep_alive_s: float,
        write_timeout_s: float,
        headers: Mapping[str, str] | None = None,
        keep_alive: bytes = KEEP_ALIVE,
    ) -> None:
        """Args: keep_alive_s: silence before `keep_alive` is sent. write_timeout_s: how long the client may not read."""
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self._frames, self._on_end = frames, on_end
        self._keep_alive, self._keep_alive_s, self._write_timeout_s = keep_alive, keep_alive_s, write_timeout_s
        self._sending_since: float | None = None
        self._sent_at = time.monotonic()
        self._lock = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or stop where there is no sense in going on."""
        head = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        writer = asyncio.create_task(self._write(send, head))
        others = [asyncio.create_task(client_gone(receive)), asyncio.create_task(self._watch(scope, send))]
        try:
            await asyncio.wait([writer, *others], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in [writer, *others]:
                task.cancel()
            results = await asyncio.gather(writer, *others, return_exceptions=True)
            self._on_end()
        if isinstance(results[0], Exception) and not isinstance(results[0], OSError):
            raise results[0]

    async def _write(self, send: Send, head: Message) -> None:
        try:
            async with self._lock:
                self._sending_since = time.monotonic()
                await send(head)
                self._sending_since = None
            async for chunk in self._frames:
                await self._send(send, chunk)
            await self._send(send, b"", more=False)
        finally:
            with suppress(RuntimeError):  # it may be running, if it was cancelled inside
                await self._frames.aclose()  # type: ignore[attr-defined]  # a generator, which is what routes pass

    async def _send(self, send: Send, chunk: bytes, *, more: bool = True) -> None:
        async with self._lock:
            self._sending_since = time.monotonic()
            await send({"type": "http.response.body", "body": chunk, "more_body": more})
            self._sending_since = None
            self._sent_at = time.monotonic()

    async def _watch(self, scope: Scope, send: Send) -> None:
        """Signs of life in silence; an end to a client that does not read. One timer for the stream, none per token."""
        while True:
            await asyncio.sleep(min(_TICK_S, self._keep_alive_s))
            now, since = time.monotonic(), self._sending_since
            if since is not None:
                if now - since > self._write_timeout_s:
                    _logger.info("a client has not read its stream for %.0f s: closing it", self._write_timeout_s)
                    cut(scope)
                    return
            elif now - self._sent_at >= self._keep_alive_s:
                await self._send(send, self._keep_alive)


async def client_gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
