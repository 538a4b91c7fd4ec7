"""How answers leave: whole unless the client goes first, or as a stream; with the headers that every answer has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response

from ernie45.engine.request import Usage
from ernie45.server.answering import Answering
from ernie45.server.asgi import error_bytes, json_bytes
from ernie45.server.errors import ApiError, api_error
from ernie45.server.guard import log_failure
from ernie45.server.keys import Caller
from ernie45.server.service import Service
from ernie45.server.stream import KEEP_ALIVE, EventStream, client_gone

_Result = TypeVar("_Result")

WARNING_HEADER = "x-ernie45-ignored-fields"
"""Names the fields of a request that nobody knows, and that were ignored."""


def service_of(request: Request) -> Service:
    """The service behind a route."""
    service: Service = request.app.state.service
    return service


def caller_of(request: Request) -> Caller:
    """Who asks; set by the gate."""
    caller: Caller = request.scope["state"]["caller"]
    return caller


def json_answer(value: object, headers: dict[str, str] | None = None) -> Response:
    """A JSON body."""
    return Response(json_bytes(value), media_type="application/json", headers=headers)


def extra_headers(request: Request, unknown_fields: list[str]) -> dict[str, str]:
    """Rate limits, and what of the request was ignored."""
    headers = service_of(request).limiter.headers(caller_of(request).tenant)
    if unknown_fields:
        names = ", ".join(name for name in unknown_fields[:16] if name.isascii() and name.isidentifier())
        headers[WARNING_HEADER] = names or f"{len(unknown_fields)} fields"
    return headers


async def unless_gone(request: Request, answering: Answering, work: Awaitable[_Result]) -> _Result:
    """Wait for an answer as long as the client does; in the end nothing of it runs on. Raises: ApiError if it left."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(client_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection", code="client_closed_request")
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()
        answering.close()


def streamed(
    request: Request,
    answering: Answering,
    frames: AsyncIterator[bytes],
    headers: dict[str, str],
    on_error: Callable[[ApiError], bytes] | None = None,
    keep_alive: bytes = KEEP_ALIVE,
) -> EventStream:
    """A stream of frames.

    Args: on_error: the last frames of a stream that fails; None: OpenAI's, an event of the error. keep_alive: sent in silence.
    """
    config = service_of(request).config

    async def guarded() -> AsyncIterator[bytes]:
        try:
            async for frame in frames:
                yield frame
        except Exception as error:
            shaped = api_error(error)
            if shaped.status == 500:
                log_failure(request.scope, error)
            yield b"data: " + error_bytes(request.scope, shaped) + b"\n\n" if on_error is None else on_error(shaped)

    return EventStream(
        guarded(),
        on_end=answering.close,
        keep_alive_s=config.keep_alive_s,
        write_timeout_s=config.limits.write_timeout_s,
        headers=headers,
        keep_alive=keep_alive,
    )


def usage_body(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage, in which cached and reasoning tokens are parts of the two sums."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "accepted_prediction_tokens": usage.accepted_tokens,
            "rejected_prediction_tokens": usage.drafted_tokens - usage.accepted_tokens,
        },
    }
