"""Probes, metrics, version, and the list of models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ernie45 import __version__
from ernie45.server.answers import json_answer, service_of
from ernie45.server.documented import ERRORS, PROBE_ERRORS, READ_ERRORS
from ernie45.server.errors import ApiError
from ernie45.server.metrics import CONTENT_TYPE
from ernie45.server.schema.tokens import ModelCard, ModelList, Status, Version
from ernie45.server.service import Service

probes = APIRouter(tags=["operations"])
models = APIRouter(tags=["models"])


@probes.get("/health", response_model=Status, responses=PROBE_ERRORS, summary="Whether the process runs")
@probes.get("/ping", response_model=Status, include_in_schema=False)
async def health() -> Response:
    """200 as long as the process answers at all; `/ready` tells whether it can take requests."""
    return json_answer({"status": "ok", "message": "the server runs"})


@probes.get(
    "/ready",
    response_model=Status,
    responses={**PROBE_ERRORS, 503: {"model": Status}},
    summary="Whether requests are taken",
)
async def ready(request: Request) -> Response:
    """200 while requests are computed; 503 while the engine is being started or paused, or the server shuts down."""
    service = service_of(request)
    if service.draining:
        status, message = "draining", "the server is shutting down"
    elif service.engine.state != "ready":
        status, message = service.engine.state, _progress(service)
    elif service.engine.paused:
        status, message = "paused", "the engine is paused until POST /resume; requests wait"
    else:
        return json_answer({"status": "ready", "message": "requests are computed"})
    answer = json_answer({"status": status, "message": message}, {"retry-after": "1"})
    answer.status_code = 503
    return answer


@probes.get("/metrics", responses=READ_ERRORS, summary="Counts for Prometheus", response_class=Response)
async def metrics(request: Request) -> Response:
    """Counts in Prometheus' text form."""
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE)


@probes.get("/version", response_model=Version, responses=READ_ERRORS, summary="The version of the server")
async def version() -> Response:
    """The version of the package."""
    return json_answer({"version": __version__})


@models.get("/models", response_model=ModelList, responses=ERRORS, summary="The models that are served")
async def list_models(request: Request) -> Response:
    """The model under each of its names."""
    service = service_of(request)
    return json_answer({"object": "list", "data": [_card(service, name) for name in service.config.served_model_names]})


@models.get("/models/{model:path}", response_model=ModelCard, responses=ERRORS, summary="One model")
async def show_model(request: Request, model: str) -> Response:
    """A model by one of its names."""
    service = service_of(request)
    service.check_model(model)
    return json_answer(_card(service, model))


def _card(service: Service, name: str) -> dict[str, Any]:
    facts = service.facts
    return {
        "id": name,
        "object": "model",
        "created": service.started_at,
        "owned_by": "ernie45",
        "root": service.model_name,
        "parent": None,
        "max_model_len": facts.max_model_len,
        "context_length": facts.context,
        "capabilities": sorted(service.tokenizer.capabilities),
        "thinking": service.tokenizer.thinking,
        "kind": facts.kind,
        "weights": facts.weights,
        "parameters": facts.parameters,
        "active_parameters": facts.active_parameters,
    }


def _progress(service: Service) -> str:
    loading = service.engine.loading
    if loading is None:
        return "the engine is being started"
    return f"the model is being loaded: {loading.done >> 20} of {loading.total >> 20} MiB"


def not_found(path: str) -> ApiError:
    """The answer for a path that no route has."""
    return ApiError(404, f"there is no route {path[:200]!r}: GET /openapi.json lists them", code="unknown_url")
