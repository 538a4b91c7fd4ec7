"""Keys: how they are made, kept and compared; and that every route wants one unless it was declared public."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.routing import BaseRoute

from ernie45.server.app import build_app
from ernie45.server.config import ServerConfig
from ernie45.server.keys import PUBLIC_PATHS, Gate, Keys, new_key
from ernie45.server.metrics import Metrics
from ernie45.server.page import page_routes
from tests.server.raw import AUTH, exchange, head, post
from tests.server.served import KEY, Served

DECLARED_PUBLIC = {"/health", "/ping", "/ready"}


def test_keys_are_random_and_long() -> None:
    made = {new_key() for _ in range(1000)}
    assert len(made) == 1000
    assert all(len(key) >= 40 and key.startswith("ek-") for key in made)


def test_only_whole_keys_are_known() -> None:
    keys = Keys(["first-key-1", "second-key-2"])
    first, second = keys.caller("first-key-1"), keys.caller("second-key-2")
    assert first is not None
    assert second is not None
    assert first.tenant != second.tenant
    for wrong in ("", "first-key-", "first-key-1 ", "first-key-11", "FIRST-KEY-1", "first-key-1\0", "\udcff"):
        assert keys.caller(wrong) is None


def test_names_of_callers_are_stable_and_hide_the_key() -> None:
    one, other = Keys(["first-key-1"]).caller("first-key-1"), Keys(["x" * 8, "first-key-1"]).caller("first-key-1")
    assert one == other
    assert one is not None
    assert "first" not in one.tenant


def test_nothing_that_is_kept_holds_a_key() -> None:
    keys = Keys(["first-key-1"])
    assert "first-key-1" not in repr(vars(keys))


def test_every_known_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of single look-ups drown in noise: what is shown is that each one does the same work, whatever the key."""
    compared: list[tuple[int, int]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr("hmac.compare_digest", compare)
    keys = Keys([f"key-number-{number}" for number in range(5)])
    for presented in ("key-number-0", "key-number-4", "key-number-", "x" * 5000, ""):
        compared.clear()
        keys.caller(presented)
        assert compared == [(32, 32)] * 5


class _Silent:
    """An engine of which only its absence is asked."""

    state, facts, stats, loading, restarts = "loading", None, None, None, 0


@pytest.fixture(scope="module")
def gate() -> Gate:
    """The application with the chat page, without an engine."""
    config = ServerConfig(api_keys=(KEY,), served_model_names=("tiny",), chat_page=True)
    engine: Any = _Silent()
    service: Any = SimpleNamespace(config=config, engine=engine, metrics=Metrics(engine, "tiny"), draining=False)
    guard: Any = build_app(service)
    return guard._app


def routes_of(app: Any) -> Iterator[BaseRoute]:
    """All routes, those of included routers too."""
    for route in app.routes:
        inner = getattr(route, "routes", None)
        if inner:
            yield from routes_of(route)
        else:
            yield route


def test_public_routes_are_the_declared_ones(gate: Gate) -> None:
    """Whoever adds a public path has to add it here, too."""
    assert PUBLIC_PATHS == DECLARED_PUBLIC
    assert gate._public == DECLARED_PUBLIC | {route.path for route in page_routes()}
    assert all(path == "/" or path.startswith("/page/") for path in gate._public - DECLARED_PUBLIC)


def test_every_other_route_answers_401_without_a_key(gate: Gate) -> None:
    document: dict[str, Any] = gate._app.openapi()  # type: ignore[attr-defined]  # FastAPI, seen as any application
    guarded = {path for path, _ in _walk(gate) if path not in gate._public}
    assert {"/v1/chat/completions", "/metrics", "/openapi.json", "/version"} <= guarded
    transport = httpx.ASGITransport(app=gate)

    async def ask() -> dict[tuple[str, str], int]:
        found = {}
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for path, methods in _walk(gate):
                for method in {*methods, "POST", "DELETE", "OPTIONS"}:
                    if path not in gate._public or method not in ("GET", "HEAD"):
                        found[method, path] = (await client.request(method, path.replace("{model}", "x"))).status_code
        return found

    answers = asyncio.run(ask())
    assert len(answers) > 60
    assert set(answers.values()) == {401}, {key for key, status in answers.items() if status != 401}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["security"] == ([] if path in gate._public else [{"key": []}]), path


def _walk(gate: Gate) -> list[tuple[str, set[str]]]:
    """Paths and methods of the route table, mounts and included routers opened."""
    document: dict[str, Any] = gate._app.openapi()  # type: ignore[attr-defined]
    found = {
        path: {method.upper() for method in operations} | {"HEAD"} for path, operations in document["paths"].items()
    }
    for route in routes_of(gate._app):
        path = getattr(route, "path", "")
        if path:
            found.setdefault(path, set()).update(getattr(route, "methods", None) or {"GET"})
    for prefix in ("/v3/openai", "/openai/v1"):
        for path in [path for path in found if path.startswith("/v1/")]:
            found.setdefault(prefix + path.removeprefix("/v1"), set()).update(found[path])
    return sorted(found.items())


@pytest.mark.parametrize(
    "target",
    [
        "/v1/models",
        "//v1/models",
        "/v1//models",
        "/v1/models/",
        "/v1/models.",
        "/v1/%6dodels",
        "/V1/MODELS",
        "/%76%31/models",
        "/health/../v1/models",
        "/health/..%2fv1/models",
        "/health%2f..%2fv1%2fmodels",
        "/health%00",
        "/health?/v1/models",
        "/health;/v1/models",
        "/./v1/models",
        "/%2fv1/models",
        "/v1/models?x=/health",
        "http://localhost/v1/models",
        "http://localhost/health",
        "/HEALTH",
        "/health/",
        "//health",
        "/%68ealth",
        "/metrics",
        "/version",
        "/openapi.json",
        "/docs",
        "/redoc",
        "/",
        "/page/app.js",
        "/nothing",
        "*",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "TRACE", "BREW"])
def test_variants_of_paths_stay_guarded(server: Served, target: str, method: str) -> None:
    reply = exchange(server, head(target, method=method, headers=""))
    expected = 200 if target == "/health?/v1/models" and method == "GET" else 401
    if target.startswith("/health?") and method == "HEAD":
        expected = 405
    assert reply.status == expected
    if expected == 200:  # a query changes no path: this is the probe
        assert b'"ok"' in reply.body


@pytest.mark.parametrize(
    "headers",
    [
        "X-HTTP-Method-Override: GET\r\nX-Original-URL: /health\r\nX-Rewrite-URL: /health\r\n",
        "X-Forwarded-Prefix: /health\r\nX-Forwarded-For: 127.0.0.1\r\nForwarded: for=127.0.0.1;host=localhost\r\n",
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAAA\r\n",
        "Authorization: Bearer \r\n",
        "Authorization: Bearer\r\n",
        f"Authorization: Basic {KEY}\r\n",
        f"Authorization: {KEY}\r\n",
        f"Authorization: Bearer {KEY}x\r\n",
        f"Authorization: Bearer {KEY[:-1]}\r\n",
        f"Authorization: Bearer {KEY.upper()}\r\n",
        f"Authorization: Bearer wrong\r\nx-api-key: {KEY}\r\n",
        f"Cookie: authorization={KEY}\r\n",
        "x-api-key: \r\n",
        "Authorization: Bearer \xff\xfe\r\n",
    ],
)
def test_headers_open_nothing(server: Served, headers: str) -> None:
    reply = exchange(server, head("/v1/models", headers=headers))
    assert reply.status == 401
    assert KEY.encode() not in reply.body


def test_a_key_in_the_query_is_none(server: Served) -> None:
    assert exchange(server, head(f"/v1/models?api_key={KEY}", headers="")).status == 401


@pytest.mark.parametrize("headers", [AUTH, f"x-api-key: {KEY}\r\n", f"authorization: bEARER  {KEY} \r\n"])
def test_a_key_opens_either_way(server: Served, headers: str) -> None:
    assert exchange(server, head("/v1/models", headers=headers)).status == 200


def test_refusals_say_what_is_missing(server: Served) -> None:
    missing, wrong = (
        exchange(server, head("/v1/models", headers="")),
        exchange(server, post("/v1/x", b"{}", "x-api-key: no\r\n")),
    )
    assert (missing.error["code"], wrong.error["code"]) == ("missing_api_key", "invalid_api_key")
    assert missing.headers["www-authenticate"] == "Bearer"
    assert missing.error["type"] == "authentication_error"
    assert missing.headers["x-request-id"] == missing.error["request_id"]


def test_probes_need_none_and_tell_little(server: Served) -> None:
    for path in DECLARED_PUBLIC:
        reply = exchange(server, head(path, headers=""))
        assert reply.status == 200
        assert set(httpx.Response(200, content=reply.body).json()) == {"status", "message"}
