"""What the OpenAPI document says of every route: errors, and streams beside JSON."""

from __future__ import annotations

from typing import Any

from ernie45.server.schema.chat import ErrorBody

_REASONS = {
    400: "The request cannot be honoured; `param` names the field.",
    401: "No key, or none of this server's.",
    403: "The key may not ask for this.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is no JSON, or compressed.",
    421: "The server is not called by this name.",
    429: "Too much at once; `Retry-After` says when to come back.",
    431: "The headers are too many or too large.",
    500: "The server failed.",
    503: "The engine is being started, or the server shuts down; `Retry-After` says when to come back.",
    504: "The request took too long.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": reason} for status, reason in _REASONS.items()
}
PROBE_ERRORS: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (400, 413, 415, 421, 431)}
"""Where no key is asked for."""
READ_ERRORS: dict[int | str, dict[str, Any]] = {401: ERRORS[401], **PROBE_ERRORS}
"""Where nothing is computed."""
CONTROL_ERRORS: dict[int | str, dict[str, Any]] = {403: ERRORS[403], **READ_ERRORS}
"""Where the engine is switched."""
JSON_OR_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream` as server-sent events.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}
