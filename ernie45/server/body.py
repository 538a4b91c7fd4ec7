"""Request bodies: JSON, read strictly, before any model sees it."""

from __future__ import annotations

import json
import math
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from ernie45.server.asgi import header
from ernie45.server.errors import ApiError

MAX_DEPTH = 64
"""Levels that JSON may be nested; tool schemas take about 10."""
MAX_COMMAS = 200_000
"""Bounds the number of values, and with it the time that they take; a prompt of ids has 131,072."""


class JsonRequest(Request):
    """A request whose JSON holds nothing that JSON does not: no NaN, no half characters, no bottomless nesting."""

    async def json(self) -> Any:
        """The body. Raises: ApiError that says where it is no JSON."""
        if not hasattr(self, "_json"):
            try:
                data = await self.body()
            except ClientDisconnect as error:
                raise ApiError(499, "the client closed the connection", code="client_closed_request") from error
            self._json = parse(data)
            if isinstance(self._json, dict):
                # For errors: a message that begins with one of these names is about that field.
                self.scope.setdefault("state", {})["fields"] = frozenset(self._json)
        return self._json


class JsonRoute(APIRoute):
    """A route of JSON in and out; what does not fit becomes a 400 that names the field."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the handler."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            if request.method == "POST":
                if header(request.scope, b"content-type") is None:
                    request.scope["headers"].append((b"content-type", b"application/json"))  # FastAPI insists on one
                kind = request.headers["content-type"].split(";")[0].strip().lower()
                if kind != "application/json":
                    raise ApiError(
                        415, f"content-type is {kind!r}, expected application/json", code="unsupported_media_type"
                    )
            strictly = JsonRequest(request.scope, request.receive)
            if request.method == "POST":
                await strictly.json()  # kept by the request; FastAPI would hide the error's place and reason
            try:
                return await handle(strictly)
            except RequestValidationError as error:
                raise invalid(error) from error

        return strict


def parse(data: bytes) -> Any:
    """A JSON value. Raises: ApiError (400) with the place and the reason."""
    if not data.strip():
        raise _no_json("is empty, expected a JSON object")
    commas = data.count(b",")
    if commas > MAX_COMMAS:
        message = f"the body holds {commas} commas, the limit is {MAX_COMMAS}: send fewer values"
        raise ApiError(413, message, code="request_too_large")
    try:
        text = data.decode()
        value = _decoder.decode(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        line, column = data.count(b"\n", 0, error.start) + 1, error.start - data.rfind(b"\n", 0, error.start)
        raise _no_json(f"is no UTF-8 at line {line} column {column}") from error
    except UnicodeEncodeError as error:
        raise _no_json("holds half of a surrogate pair") from error
    except RecursionError as error:
        raise _too_deep() from error
    except json.JSONDecodeError as error:
        found = error.msg.removesuffix(" at").replace("Expecting", "expected")
        place = f"at line {error.lineno} column {error.colno}"
        raise _no_json(f"is no JSON: {found[:1].lower()}{found[1:]} {place}") from error
    except ValueError as error:  # Python converts no more than some thousand digits
        raise _no_json("holds a whole number that is too long") from error
    _check_values(value)
    return value


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object. Raises: ApiError for a name that stands there twice: programs differ in which one they keep."""
    found = dict(members)
    if len(found) < len(members):
        (twice, _), *_ = Counter(name for name, _ in members).most_common(1)
        raise _no_json(f"has an object with several members {twice[:80]!r}: send one")
    return found


def _constant(name: str) -> None:
    raise _no_json(f"holds {name}, which JSON does not have")


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""Half of a pair, perhaps beside its other half."""


def _check_values(value: object) -> None:
    """Raises: ApiError for nesting without bottom, and for numbers that are infinite as a float."""
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for outer in level:
            for item in outer.values() if type(outer) is dict else outer:
                kind = type(item)
                if kind is dict or kind is list:
                    inner.append(item)
                elif kind is float and math.isinf(item):
                    raise _no_json(f"holds a number beyond {sys.float_info.max:.2g}, the largest there is")
        if not inner:
            return
        level = inner
    raise _too_deep()


def _no_json(what: str) -> ApiError:
    return ApiError(400, f"the body {what}", code="invalid_json")


def _too_deep() -> ApiError:
    return _no_json(f"is nested more than {MAX_DEPTH} levels deep: flatten it")


def invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, named by its field."""
    found = error.errors()
    # Of a field with several forms, each says why it is not it: the one that the value came closest to tells most.
    about = [one for one in found if one["loc"][:2] == found[0]["loc"][:2]]
    first = min(about, key=lambda one: (one["type"].endswith("_type"), -len(one["loc"])))
    path = [part for part in first["loc"] if part not in ("body", "query", "path", "header")]
    # Names of union members stand in the path beside fields and positions; they mean nothing to a caller.
    shown = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path if _is_field(part)).lstrip(
        "."
    )
    if first["type"] == "missing":
        return ApiError(
            400, f"{shown or 'the body'} is missing", code="missing_required_parameter", param=shown or None
        )
    got = _shown.repr(first.get("input"))
    got = got if len(got) <= 80 else f"{got[:77]}..."
    message = f"{shown or 'the body'} is {got}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return ApiError(400, message, code="invalid_value", param=shown or None)


def _is_field(part: object) -> bool:
    return isinstance(part, int) or (isinstance(part, str) and part.isidentifier() and part not in _TYPE_NAMES)


_shown = reprlib.Repr()
"""Never writes out a long value to cut it afterwards."""
_shown.maxstring = _shown.maxother = _shown.maxlong = 80
_TYPE_NAMES = frozenset({"str", "int", "float", "bool", "list", "dict", "none"})
