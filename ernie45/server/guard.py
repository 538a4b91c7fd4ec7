"""Bounds on every request before anything reads it, and a line in the log behind every answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ernie45.server.asgi import header, request_id, send_error, shown_path
from ernie45.server.config import Limits
from ernie45.server.connection import cut
from ernie45.server.errors import ApiError, api_error
from ernie45.server.keys import PUBLIC_PATHS

access_log = logging.getLogger("ernie45.access")
_logger = logging.getLogger(__name__)

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Guard:
    """ASGI middleware around everything else: sizes, times, the host's name; errors that nobody handled; the log."""

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        allowed_hosts: frozenset[str] | None,
        answered: Callable[[str, int], None],
    ) -> None:
        """Args: allowed_hosts: names under which the server may be asked for, None = any. answered: told route and status."""
        self._app, self._limits, self._answered = app, limits, answered
        self._hosts = None if allowed_hosts is None else allowed_hosts | _LOOPBACK_NAMES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or let through with a bounded body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        status, complete = 0, False

        async def tagged(message: Message) -> None:
            nonlocal status, complete
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            if message["type"] == "http.response.start":
                status = message["status"]
                pairs = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
                message = {**message, "headers": [*pairs, (b"x-request-id", request_id(scope).encode())]}
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await send_error(scope, tagged, refusal)
            else:
                await self._app(scope, self._bounded(scope, receive), tagged)
        except Exception as error:  # whatever it is, the client gets an answer and the log the rest
            if complete:  # Starlette raises again what it has answered and logged
                return
            shaped = api_error(error)
            if shaped.status == 500:
                log_failure(scope, error)
            if status:
                cut(scope)
            else:
                await send_error(scope, tagged, shaped)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._answered(route, status)
            _log(scope, status, time.monotonic() - start)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers, limits = scope["headers"], self._limits
        size = sum(len(key) + len(value) for key, value in headers) + len(scope.get("raw_path") or b"")
        if len(headers) > limits.headers or size > limits.header_bytes:
            return ApiError(
                431,
                f"the request has {len(headers)} headers of {size} bytes, the limits are {limits.headers} and "
                f"{limits.header_bytes}",
                code="headers_too_large",
            )
        if self._hosts is not None and (refusal := self._wrong_host(scope)):
            return refusal
        encoding = header(scope, b"content-encoding")
        if encoding not in (None, "", "identity"):
            return ApiError(
                415, f"content-encoding is {encoding!r}: send the body as it is", code="unsupported_encoding"
            )
        length = header(scope, b"content-length")
        if length is not None and header(scope, b"transfer-encoding") is not None:
            # A proxy in front may have believed the other one, and then sees other requests than this server.
            return ApiError(
                400,
                "content-length and transfer-encoding exclude each other: send one",
                code="invalid_header",
                headers={"Connection": "close"},
            )
        if length is not None and (not length.isascii() or not length.isdigit() or len(length) > 18):
            return ApiError(400, "content-length is no number", code="invalid_header")
        return self._too_large(int(length)) if length is not None and int(length) > limits.body_bytes else None

    def _wrong_host(self, scope: Scope) -> ApiError | None:
        assert self._hosts is not None, "asked for with names alone"
        host = (header(scope, b"host") or "").lower()
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if name in self._hosts:
            return None
        return ApiError(421, f"this server is not {name[:80]!r}: --allowed-host NAME makes it so", code="unknown_host")

    def _too_large(self, size: int) -> ApiError:
        limit = self._limits.body_bytes
        return ApiError(413, f"the body has {size} bytes or more, the limit is {limit}", code="request_too_large")

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """The body, up to its limits in size and time."""
        read = 0
        complete = scope["method"] in ("GET", "HEAD")
        deadline = time.monotonic() + self._limits.body_timeout_s

        async def bounded() -> Message:
            nonlocal read, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0.001))
            except (TimeoutError, asyncio.TimeoutError) as error:  # one class from Python 3.11 on
                seconds = self._limits.body_timeout_s
                raise ApiError(408, f"the body did not arrive within {seconds:g} s", code="body_timeout") from error
            read += len(message.get("body", b""))
            if read > self._limits.body_bytes:
                raise self._too_large(read)
            complete = not message.get("more_body", False)
            return message

        return bounded


def log_failure(scope: Scope, error: Exception) -> None:
    """What went wrong, with its trace; nothing of the request but its id and path."""
    _logger.error("request %s to %s failed", request_id(scope), shown_path(scope), exc_info=error)


def _log(scope: Scope, status: int, seconds: float) -> None:
    """One line: no query, no headers, no bodies. The tenant is a hash of the key's hash."""
    caller = scope.get("state", {}).get("caller")
    tenant = caller.tenant if caller is not None else "-"
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
    access_log.log(
        logging.DEBUG if scope["path"] in PUBLIC_PATHS else logging.INFO,
        "%s %s %d %s %.3f s tenant=%s id=%s",
        scope["method"][:16],
        shown_path(scope),
        status,
        phrase,
        seconds,
        tenant,
        request_id(scope),
    )
