"""Keys, and the gate in front of everything: who brings none gets in nowhere but on the routes declared public.

The gate looks at the path as it came over the wire and compares it as a whole, before any routing: a path that only
resembles a public one is guarded.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Receive, Scope, Send

from ernie45.server.asgi import header, send_error
from ernie45.server.errors import ApiError

PUBLIC_PATHS = frozenset({"/health", "/ping", "/ready"})
"""Probes, which tell nothing but whether the server runs. The chat page adds its own files."""


def new_key() -> str:
    """A fresh key of 256 random bits."""
    return f"ek-{secrets.token_urlsafe(32)}"


@dataclass(frozen=True)
class Caller:
    """Who asks, as far as this process has to know."""

    tenant: str
    """Tells callers apart, in fairness, caches and logs; the key cannot be had from it."""
    is_first: bool = field(default=False, compare=False)
    """Whether the key is the first that the server was given: it may hold up all others."""


class Keys:
    """The keys that are good, as keyed hashes."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._pepper = secrets.token_bytes(32)
        self._known = {self._digest(key): Caller(_tenant(key), is_first=key == keys[0]) for key in keys}

    def caller(self, key: str) -> Caller | None:
        """Whose key this is; takes equally long for every key."""
        digest, found = self._digest(key), None
        for known, caller in self._known.items():
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def _digest(self, key: str) -> bytes:
        return hmac.digest(self._pepper, key.encode("utf-8", "surrogateescape"), "sha256")


def _tenant(key: str) -> str:
    """A name that logs of two runs agree on. Slow to compute, as keys that people choose could else be guessed from a log."""
    return hashlib.scrypt(key.encode(), salt=b"ernie45 tenant", n=1 << 13, r=8, p=1, dklen=8).hex()


class Gate:
    """ASGI middleware: denies by default."""

    def __init__(self, app: ASGIApp, keys: Keys, public: frozenset[str] = PUBLIC_PATHS) -> None:
        self._app, self._keys, self._public = app, keys, public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let through who is public or has a key; the caller is then in `scope["state"]["caller"]`."""
        if scope["type"] == "http" and not self._is_public(scope):
            key = _presented(scope)
            caller = None if key is None else self._keys.caller(key)
            if caller is None:
                await send_error(scope, send, _refusal(key))
                return
            scope.setdefault("state", {})["caller"] = caller
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await self._app(scope, receive, send)

    def _is_public(self, scope: Scope) -> bool:
        raw = scope.get("raw_path") or scope["path"].encode()
        return scope["method"] in ("GET", "HEAD") and raw.decode("latin-1").split("?")[0] in self._public


def _presented(scope: Scope) -> str | None:
    """The key of `Authorization: Bearer` (OpenAI) or `x-api-key` (Anthropic)."""
    authorization = header(scope, b"authorization")
    if authorization is not None:
        scheme, _, key = authorization.partition(" ")
        return key.strip() if scheme.lower() == "bearer" else ""
    return header(scope, b"x-api-key")


def _refusal(key: str | None) -> ApiError:
    if key:
        return ApiError(401, "the API key is not one of this server's", code="invalid_api_key")
    how = "send `Authorization: Bearer KEY`; the server printed a key when it started, or was given it with --api-key"
    found = "there is no API key in the request" if key is None else "the API key in the request is empty"
    return ApiError(401, f"{found}: {how}", code="missing_api_key", headers={"WWW-Authenticate": "Bearer"})
