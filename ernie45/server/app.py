"""The application: routes under their prefixes, and around them the gate and the guard."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from ernie45 import __version__
from ernie45.errors import Ernie45Error
from ernie45.server import chat, completions, control, messages, operations, responses, tokens
from ernie45.server.asgi import error_bytes
from ernie45.server.body import invalid
from ernie45.server.errors import ApiError, api_error
from ernie45.server.guard import Guard, log_failure
from ernie45.server.keys import PUBLIC_PATHS, Gate, Keys
from ernie45.server.page import page_routes
from ernie45.server.service import Service

PREFIXES = ("/v1", "/v3/openai", "/openai/v1")
"""OpenAI's own, and those of hosted platforms. All lead to the same routes."""
_FIELD_NAMES = re.compile(r"[a-z_]\w*")


def build_app(service: Service) -> ASGIApp:
    """Everything that answers, in its order: guard, gate, routes."""
    api = FastAPI(
        title="ernie45",
        version=__version__,
        summary="ERNIE 4.5 models behind OpenAI's and Anthropic's interfaces",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
        generate_unique_id_function=lambda route: f"{route.name}_{_identifier(route.path)}",
        exception_handlers={
            ApiError: _on_error,
            Ernie45Error: _on_error,  # not left to Exception's: behind that one Starlette raises again, and the connection ends
            Exception: _on_error,
            HTTPException: _on_http_error,
            RequestValidationError: _on_error,
        },
    )
    api.state.service = service
    for prefix in PREFIXES:
        documented = prefix == PREFIXES[0]  # one of three equal ones is enough to read
        for router in (
            operations.models,
            chat.router,
            completions.router,
            responses.router,
            messages.router,
            tokens.router,
        ):
            api.include_router(router, prefix=prefix, include_in_schema=documented)
    api.include_router(tokens.router, include_in_schema=False)
    api.include_router(operations.probes)
    api.include_router(control.router)
    public = PUBLIC_PATHS
    if service.config.chat_page:
        pages = page_routes()
        api.router.routes.extend(pages)
        public |= {route.path for route in pages}
    _declare_keys(api, public)
    hosts = frozenset(name.lower() for name in service.config.allowed_hosts) if service.config.on_loopback else None
    gate = Gate(api, Keys(service.config.api_keys), public)
    return Guard(gate, service.config.limits, hosts, service.metrics.answered)


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        error = invalid(error)
    shaped = api_error(error, _field_names(request))
    if shaped.status == 500:
        log_failure(request.scope, error)
    return Response(
        error_bytes(request.scope, shaped), shaped.status, headers=shaped.headers, media_type="application/json"
    )


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for these"
    if error.status_code == 404:
        return await _on_error(request, operations.not_found(request.url.path))
    if error.status_code == 405:
        allowed = dict(error.headers or {})
        message = f"{request.method} is not what this route takes: {allowed.get('Allow', 'another method')} is"
        return await _on_error(request, ApiError(405, message, code="method_not_allowed", headers=allowed))
    return await _on_error(request, ApiError(error.status_code, str(error.detail), code="http_error"))


def _field_names(request: Request) -> frozenset[str]:
    """The names of the body's fields, so that an error can say which one it is about."""
    fields = request.scope.get("state", {}).get("fields")
    return fields if isinstance(fields, frozenset) else frozenset()


def _identifier(path: str) -> str:
    return "_".join(_FIELD_NAMES.findall(path))


def _declare_keys(api: FastAPI, public: frozenset[str]) -> None:
    """Say in the OpenAPI document which routes want a key: all but the public ones."""
    make: Callable[[], dict[str, Any]] = api.openapi

    def with_keys() -> dict[str, Any]:
        if api.openapi_schema is None:
            schema = make()
            schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, operations_of in schema["paths"].items():
                for operation in operations_of.values():
                    operation["security"] = [] if path in public else [{"key": []}]
        return api.openapi_schema or {}

    api.openapi = with_keys  # type: ignore[method-assign]  # FastAPI's documented way to extend the document
