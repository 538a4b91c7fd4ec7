"""Small things that the middlewares share: one header, one error answer."""

from __future__ import annotations

import re
import secrets

import msgspec
from starlette.types import Scope, Send

from ernie45.server.errors import ApiError

_json = msgspec.json.Encoder()
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of that (lower-case) name."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def request_id(scope: Scope) -> str:
    """The request's id: the client's own `x-request-id` if it is well-formed, else a new one. The same on every call."""
    state = scope.setdefault("state", {})
    if "request_id" not in state:
        given = header(scope, b"x-request-id")
        state["request_id"] = given if given and _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
    found: str = state["request_id"]
    return found


def json_bytes(value: object) -> bytes:
    """Compact JSON."""
    return _json.encode(value)


def error_bytes(scope: Scope, error: ApiError) -> bytes:
    """An error's body, in the form that the route's clients expect."""
    ident = request_id(scope)
    anthropic = scope["path"].rstrip("/").endswith(("/messages", "/messages/count_tokens"))
    return json_bytes(error.anthropic_body(ident) if anthropic else error.body(ident))


def shown_path(scope: Scope) -> str:
    """The path for a log: of bounded length, and on one line."""
    return str(scope["path"])[:200].encode("unicode_escape").decode()


async def send_error(scope: Scope, send: Send, error: ApiError) -> None:
    """Answer with an error, outside of any route. A body that nobody reads is the connection's business."""
    body = error_bytes(scope, error)
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "x-request-id": request_id(scope),
        **{key.lower(): value for key, value in error.headers.items()},
    }
    pairs = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
