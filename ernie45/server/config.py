"""How a server is set."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field

from ernie45.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client may ask for, and how long it may take. Everything beyond is refused with the limit in the message."""

    body_bytes: int = 8 << 20
    """Of a request; compressed bodies are refused."""
    header_bytes: int = 32 << 10
    headers: int = 100
    header_timeout_s: float = 10.0
    """From the first byte of a request to the end of its headers."""
    body_timeout_s: float = 30.0
    write_timeout_s: float = 30.0
    """How long a client may leave what was sent to it unread."""
    request_timeout_s: float = 3600.0
    """Waiting and computing together."""
    connections: int = 1024
    choices: int = 16
    """`n` times prompts of one request."""
    waiting: int = 128
    """Requests that may wait for the engine, beside those that run; more are refused with 429."""
    wait_s: float = 3600.0
    """Who would wait longer, as answers take now, is refused with 429 as well."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value!r}, expected a number above 0")


@dataclass(frozen=True, kw_only=True)
class RateLimits:
    """What each key may use; None = no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and answer; what an answer may take at most is set aside while it runs."""
    concurrent_requests: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}, expected a whole number above 0")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """One run of the server, the engine's settings apart (`engine.wire.Launch`)."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    api_keys: tuple[str, ...]
    """Who knows one of these may use the server; at least one. The first may also pause it, and end requests of the others."""
    served_model_names: tuple[str, ...]
    """The first is the model's id in answers; all are understood."""
    chat_page: bool = False
    """Serve the chat page at /."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names beside the loopback ones under which the server is reached; asked for while it listens on loopback alone, so that
    no web page can reach it under a name of its own (DNS rebinding)."""
    limits: Limits = field(default_factory=Limits)
    rate_limits: RateLimits = field(default_factory=RateLimits)
    keep_alive_s: float = 10.0
    """Between comments in a stream that has nothing to say."""
    load_timeout_s: float = 600.0
    """How long the engine's process may be silent while it loads; it says how far it has come about four times a second."""
    drain_timeout_s: float = 30.0
    """How long running requests may go on after SIGTERM."""

    def __post_init__(self) -> None:
        if not self.api_keys or not all(len(key) >= 8 and key.isascii() and key.isprintable() for key in self.api_keys):
            raise ConfigError("api_keys needs at least one key, each of 8 or more printable ASCII characters")
        if any(" " in key for key in self.api_keys):
            raise ConfigError("an API key holds a space: a client could not send it")
        if not self.served_model_names:
            raise ConfigError("served_model_names needs at least one name")
        if not 0 < self.load_timeout_s < math.inf:
            raise ConfigError(f"load_timeout_s is {self.load_timeout_s!r}, expected a number of seconds above 0")
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port is {self.port}, expected 0 to 65535")

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
