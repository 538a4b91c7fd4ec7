"""One connection: uvicorn's, with a limit on every wait for the client.

uvicorn waits without end for the rest of a request's headers, for the rest of a body that nobody wants, and for a client to
read the last of an answer; and it takes connections without end. Here all of that ends, and a route may cut a connection whose
client does not read.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import h11
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from ernie45.server.asgi import json_bytes
from ernie45.server.config import Limits
from ernie45.server.errors import ApiError

_KEY = "connection"
_DISCARD_S = 2.0
"""How long what a client goes on sending is read and thrown away after it was refused: a connection that is closed at once
takes the answer with it, before the client has seen it."""
_PROGRESS_BYTES = 64 << 10
"""A client that takes less than this of an answer within the write timeout does not read."""


class Connection(H11Protocol):
    """HTTP/1.1, bounded. `bounded` makes the class that uvicorn wants."""

    limits: Limits

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """As uvicorn calls it."""
        super().__init__(*arguments, **named)
        self.app_state = {**self.app_state, _KEY: self}  # copied into every scope's state
        self._header_timer: asyncio.TimerHandle | None = None
        self._discard_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._refused = False
        self._idle_since = 0.0

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn narrows it, too
        """Begin; the first request has to come soon."""
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        if self._has_room():
            self._expect_headers()
        else:
            error = ApiError(
                503,
                f"{self.limits.connections} connections are busy, which is the limit: try again shortly",
                code="too_many_connections",
                headers={"retry-after": "1"},
            )
            self._refuse(error)

    def data_received(self, data: bytes) -> None:
        """Take bytes; the first of a new request start its clock, the end of its headers stops it."""
        if self._refused:
            return
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._expect_headers()
        self._bound()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        for timer in (self._header_timer, self._discard_timer, self._unread_timer):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()  # uvicorn keeps it after a reset, and all of the connection with it
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """An answer was written; what of it the client does not read in time is given up."""
        self._idle_since = self.loop.time()
        super().on_response_complete()
        if self._unread_timer is not None:
            self._unread_timer.cancel()
        self._expect_reading()
        if self.conn.their_state is h11.SEND_BODY and self._discard_timer is None:
            self._discard_timer = self.loop.call_later(_DISCARD_S, self.abort)
        self._bound()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, in the form of all errors."""
        limit = self.limits.header_bytes
        if len(self.conn.trailing_data[0]) > limit:
            error = ApiError(431, f"the headers have more than {limit} bytes", code="headers_too_large")
        else:
            error = ApiError(400, "what was sent is no HTTP/1.1 request", code="invalid_http")
        self._refuse(error)

    def abort(self) -> None:
        """Cut the connection, unsent bytes included."""
        self.transport.abort()

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: a request that would like to be a web socket is answered as what it is, and not worth a line each."""

    def _has_room(self) -> bool:
        """Whether one more connection fits; the one that has been idle longest makes way."""
        open_ones = [one for one in self.connections if isinstance(one, Connection) and not one.transport.is_closing()]
        if len(open_ones) <= self.limits.connections:
            return True
        idle = [one for one in open_ones if one.idle and one is not self]
        if not idle:
            return False
        min(idle, key=lambda one: one._idle_since).abort()
        return True

    def _refuse(self, error: ApiError) -> None:
        """Say why, past any route, and listen no more."""
        if not self.idle and self.cycle.response_started:
            self.abort()
            return
        body = json_bytes(error.body())
        head = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", "content-type: application/json"]
        head += [f"{name}: {value}" for name, value in error.headers.items()]
        head += [f"content-length: {len(body)}", "connection: close", "", ""]
        self._refused = True
        if not self.idle:  # a body that turned out to be none: whoever reads it hears that nobody is there
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write("\r\n".join(head).encode("latin-1") + body)
        self.transport.write_eof()
        self.flow.resume_reading()
        self._discard_timer = self.loop.call_later(_DISCARD_S, self.abort)

    def _expect_headers(self) -> None:
        if self._header_timer is None and not self._refused:
            self._header_timer = self.loop.call_later(self.limits.header_timeout_s, self.abort)

    def _expect_reading(self) -> None:
        unread = self.transport.get_write_buffer_size()
        self._unread_timer = None
        if unread > 0:
            self._unread_timer = self.loop.call_later(self.limits.write_timeout_s, self._give_up_unread, unread)

    def _give_up_unread(self, before: int) -> None:
        if self.transport.get_write_buffer_size() > max(before - _PROGRESS_BYTES, 0):
            self.abort()
        else:
            self._expect_reading()

    def _bound(self) -> None:
        """Stop the clocks of what has come, and bound what came too early."""
        state = self.conn.their_state
        if state in (h11.SEND_BODY, h11.DONE, h11.MUST_CLOSE) and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        if state is not h11.SEND_BODY and self._discard_timer is not None and not self._refused:
            self._discard_timer.cancel()
            self._discard_timer = None
        early = len(self.conn.trailing_data[0])
        if state is h11.IDLE and early:
            self._expect_headers()
        elif state is h11.DONE and not self.idle:
            # The next request, sent before this one is answered. uvicorn stops reading then, and with that would not see the
            # client leave.
            if early > self.limits.header_bytes:
                self.abort()
            else:
                self.flow.resume_reading()


def bounded(limits: Limits) -> type[Connection]:
    """The protocol class with these limits."""
    return type("BoundedConnection", (Connection,), {"limits": limits})


def cut(scope: Scope) -> None:
    """Abort the connection behind a request: its client does not read. Nothing to do under another server."""
    connection = scope.get("state", {}).get(_KEY)
    if isinstance(connection, Connection):
        connection.abort()
