"""One connection: uvicorn's, with a limit on every wait for the client.

uvicorn waits without end for the rest of a request's headers, and for a client to read the last of an answer. Here both end,
and a route may cut a connection whose client does not read.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from ernie45.server.config import Limits

_KEY = "connection"


class Connection(H11Protocol):
    """HTTP/1.1, bounded. `bounded` makes the class that uvicorn wants."""

    limits: Limits

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """As uvicorn calls it."""
        super().__init__(*arguments, **named)
        self.app_state = {**self.app_state, _KEY: self}  # copied into every scope's state
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn narrows it, too
        """Begin; the first request has to come soon."""
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """Take bytes; the first of a new request start its clock, the end of its headers stops it."""
        waiting = self.conn.their_state is h11.IDLE
        if waiting and self._header_timer is None:
            self._expect_headers()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE or self.cycle is not None:
            self._stop_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._stop_header_timer()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """An answer was written; what of it the client does not read in time is given up."""
        super().on_response_complete()
        if self.transport.get_write_buffer_size() > 0:
            self.loop.call_later(self.limits.write_timeout_s, self._give_up_unread)

    def abort(self) -> None:
        """Cut the connection, unsent bytes included."""
        self.transport.abort()

    def _expect_headers(self) -> None:
        self._stop_header_timer()
        self._header_timer = self.loop.call_later(self.limits.header_timeout_s, self.abort)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _give_up_unread(self) -> None:
        if self.transport.get_write_buffer_size() > 0:
            self.abort()


def bounded(limits: Limits) -> type[Connection]:
    """The protocol class with these limits."""
    return type("BoundedConnection", (Connection,), {"limits": limits})


def cut(scope: Scope) -> None:
    """Abort the connection behind a request: its client does not read. Nothing to do under another server."""
    connection = scope.get("state", {}).get(_KEY)
    if isinstance(connection, Connection):
        connection.abort()
