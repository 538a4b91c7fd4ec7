"""Run a server: listen, start the engine, serve, and go without losing anybody's answer."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from ernie45.engine.client import EngineClient, Spawned
from ernie45.engine.defaults import model_defaults
from ernie45.engine.wire import Launch, Loading, Started
from ernie45.errors import CapacityError, EngineDownError
from ernie45.processing.tokenizer import Tokenizer
from ernie45.processing.tokenizer import load_tokenizer as load_folder_tokenizer
from ernie45.server.app import build_app
from ernie45.server.config import ServerConfig
from ernie45.server.connection import Connection, bounded
from ernie45.server.service import Service

_IDLE_CONNECTION_S = 75
"""Longer than clients keep connections that they do not use: then it is they who close, and no request meets a closed one."""
_CLOSING_S = 2
"""For the last bytes of streams that were ended."""
_POLL_S = 0.05
_SEND_BUFFER_BYTES = 256 << 10
_OWN_FILES = 256
"""Beside connections: libraries, the engine's socket, logs."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server that takes requests."""

    url: str
    facts: Started


async def serve(
    config: ServerConfig,
    launch: Launch,
    *,
    on_ready: Callable[[Running], None] = lambda running: None,
    on_loading: Callable[[Loading], None] | None = None,
    spawned: Spawned | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; a second signal cuts the wait for running requests short.

    Args: spawned: the engine's process, if it was started ahead.
    Raises: CapacityError if the address cannot be listened on; what loading the model raises.
    """
    listener = _listen(config)
    _allow_files(config.limits.connections)
    engine = EngineClient(launch, spawned=spawned, load_timeout_s=config.load_timeout_s, on_loading=on_loading)
    starting = asyncio.create_task(engine.start())  # the other process loads while this one prepares
    stop = _Signals()
    try:
        tokenizer = await asyncio.to_thread(_load_tokenizer, launch)
        service = Service(config, tokenizer, engine, model_defaults(Path(launch.model)))
        server = _Uvicorn(_uvicorn_config(config, service))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            stopped = asyncio.create_task(stop.wait(1))
            await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                on_ready(Running(url=_url(config, listener), facts=service.facts))
                await asyncio.wait({stopped, serving}, return_when=asyncio.FIRST_COMPLETED)
                await _drain(service, stop)
                await engine.stop()  # whoever still waits for it hears so, while there is a server to tell it
        finally:
            server.should_exit = True
            await asyncio.wait({serving}, timeout=_CLOSING_S)
            server.cut_connections()
            await serving
    finally:
        stop.close()
        await engine.stop()
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):  # its error was raised above, if it was one
            await starting
        listener.close()


async def _drain(service: Service, stop: _Signals) -> None:
    """No new requests; those that run may end, and what is left after the timeout gets an error."""
    service.draining = True
    if service.engine.paused:
        service.engine.resume()  # what is held could not end
    impatient = asyncio.create_task(stop.wait(2))
    deadline = asyncio.get_running_loop().time() + service.config.drain_timeout_s
    while service.busy and not impatient.done() and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(_POLL_S)
    impatient.cancel()
    for answering in list(service.running):
        answering.fail(EngineDownError("the server is shutting down: send the request again"))


class _Signals:
    """Counts requests to stop."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._add)

    async def wait(self, count: int) -> None:
        """Return when so many have come."""
        while self._count < count:
            self._changed.clear()
            await self._changed.wait()

    def close(self) -> None:
        """Leave signals to what they do otherwise."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)

    def _add(self) -> None:
        self._count += 1
        self._changed.set()


class _Uvicorn(uvicorn.Server):
    """uvicorn, which leaves signals to us: it would stop at once, or wait without end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    def cut_connections(self) -> None:
        """Give up what clients have not read."""
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.abort()


def _uvicorn_config(config: ServerConfig, service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        build_app(service),
        http=bounded(config.limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_IDLE_CONNECTION_S,
        timeout_graceful_shutdown=2 * _CLOSING_S,
        h11_max_incomplete_event_size=config.limits.header_bytes,
    )


def _listen(config: ServerConfig) -> socket.socket:
    """The socket, bound before anything is loaded. Raises: CapacityError."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # With its protocol named: asyncio switches Nagle's algorithm off for such sockets alone, and with it every answer on a
    # connection that is kept waits 40 ms for the client's acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise CapacityError(
            f"{config.host}:{config.port} cannot be listened on ({error.strerror}): choose another --port or --host"
        ) from error
    # Inherited by every connection: what the kernel keeps for a client that does not read is bounded, too.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    return listener


def _allow_files(connections: int) -> None:
    """Let this process have a file for every connection, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OWN_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))


def _url(config: ServerConfig, listener: socket.socket) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{listener.getsockname()[1]}"


def _load_tokenizer(launch: Launch) -> Tokenizer:
    if not launch.model.endswith(".gguf"):
        return load_folder_tokenizer(launch.model, chat_format=launch.chat_format)
    from ernie45.store.api import load_tokenizer  # reads GGUF, and brings torch along

    return load_tokenizer(launch.model, chat_format=launch.chat_format)
