"""For whoever runs the server: hold the engine, let it go on, end a request by its id."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from ernie45.server.answers import caller_of, json_answer, service_of
from ernie45.server.body import JsonRoute
from ernie45.server.documented import CONTROL_ERRORS, ERRORS
from ernie45.server.schema.control import Aborted, AbortRequests
from ernie45.server.schema.tokens import Status

router = APIRouter(route_class=JsonRoute, tags=["operations"])
_switches = APIRouter(tags=["operations"])  # they have no body

Mode = Annotated[Literal["keep"], Query(description="What becomes of requests: they wait, with all they hold.")]


@_switches.post("/pause", response_model=Status, responses=CONTROL_ERRORS, summary="Compute nothing for a while")
async def pause(request: Request, mode: Mode = "keep") -> Response:
    """Requests that run are held where they are, new ones wait; their time goes on. `/ready` is 503 until `/resume`."""
    service = service_of(request)
    service.check_operator(caller_of(request))
    service.engine.pause()
    return json_answer({"status": "paused", "message": "nothing is computed until POST /resume"})


@_switches.post("/resume", response_model=Status, responses=CONTROL_ERRORS, summary="Go on after a pause")
async def resume(request: Request) -> Response:
    """Go on as if nothing had been; no error where nothing was paused."""
    service = service_of(request)
    service.check_operator(caller_of(request))
    service.engine.resume()
    return json_answer({"status": "resumed", "message": "the engine goes on"})


@router.post("/abort_requests", response_model=Aborted, responses=ERRORS, summary="End requests by their ids")
async def abort_requests(request: Request, body: AbortRequests) -> Response:
    """End requests that run, by the `x-request-id` that they were sent with or answered with; their clients get an error."""
    count = service_of(request).abort(frozenset(body.request_ids), caller_of(request))
    return json_answer({"aborted": count})


router.include_router(_switches)
