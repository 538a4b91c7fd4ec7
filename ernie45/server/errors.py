"""What goes wrong, as HTTP answers that the official SDKs understand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ernie45.errors import ContextLengthError, EngineDownError, Ernie45Error, RequestError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
# Anthropic's names where they differ.
_ANTHROPIC_TYPES = {500: "api_error", 503: "overloaded_error", 504: "api_error", 408: "api_error"}
_LEADING_FIELD = re.compile(r"[a-z_]\w*(\[\d+\])?(\.\w+(\[\d+\])?)*(?= )")


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Args: code: what programs tell cases apart by. param: the request's field at fault. headers: such as Retry-After."""
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self, request_id: str | None = None) -> dict[str, Any]:
        """OpenAI's form."""
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error"),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error if request_id is None else {**error, "request_id": request_id}}

    def anthropic_body(self, request_id: str | None = None) -> dict[str, Any]:
        """Anthropic's form."""
        kind = _ANTHROPIC_TYPES.get(self.status) or _TYPES.get(self.status, "api_error")
        body: dict[str, Any] = {"type": "error", "error": {"type": kind, "message": self.message}}
        return body if request_id is None else {**body, "request_id": request_id}


def api_error(error: Exception, fields: frozenset[str] = frozenset()) -> ApiError:
    """The answer for an error of ours; messages of others stay in the log.

    Args: fields: names of the request's fields: a message that begins with one is about it.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        return ApiError(400, str(error), code="context_length_exceeded", param=_prompt_field(fields))
    if isinstance(error, RequestError):
        return ApiError(400, str(error), code="invalid_value", param=_named_field(str(error), fields))
    if isinstance(error, EngineDownError):
        return ApiError(503, str(error), code="engine_unavailable", headers={"Retry-After": "2"})
    if isinstance(error, Ernie45Error):
        return ApiError(500, "the server cannot handle this request; its log says why", code="internal_error")
    return ApiError(500, "the server failed at this request; its log says why", code="internal_error")


def _prompt_field(fields: frozenset[str]) -> str | None:
    return next((name for name in ("messages", "input", "prompt") if name in fields), None)


def _named_field(message: str, fields: frozenset[str]) -> str | None:
    found = _LEADING_FIELD.match(message)
    if found is None or re.split(r"[.\[]", found.group(), maxsplit=1)[0] not in fields:
        return None
    return found.group()
