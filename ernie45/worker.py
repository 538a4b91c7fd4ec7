"""The process that computes: one engine on the main thread, fed through a socket.

    python -m ernie45.worker FD

Like `llm.py` it stands above store and engine: it loads what it is told. The other end of FD belongs to `engine/client.py`. When
that end closes, this process ends: it has nothing to save, and nobody is left to compute for. Three threads: the main thread runs
the engine; one reads the socket; one compiles grammars, so that neither a schema nor a full socket makes decoding wait.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ernie45.engine import wire
from ernie45.engine.engine import Engine
from ernie45.engine.grammar_mask import grammar_masks
from ernie45.engine.request import End, Event, Output, PromptScores, Request
from ernie45.errors import Ernie45Error, RequestError, TransferError
from ernie45.kernels.choice import describe, use_kernels
from ernie45.models.text import CausalLM
from ernie45.processing.grammar import Grammars
from ernie45.processing.tokenizer import Tokenizer
from ernie45.store.api import load_model, load_tokenizer
from ernie45.store.describe import ModelDescription
from ernie45.store.describe import describe as describe_model

_logger = logging.getLogger(__name__)

_READ_BYTES = 1 << 18
_IDLE_S = 0.05
"""Longest sleep while requests wait in a paused engine: their timeouts go on."""
_REPORT_S = 0.25
"""Least time between two reports of loading."""


def main(argv: list[str]) -> int:
    """Run until the other end closes or says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C means the server, which tells us what to do
    channel = Channel(socket.socket(fileno=int(argv[1])))
    launch = channel.first()
    try:
        worker = Worker(channel, launch)
    except (Ernie45Error, OSError, MemoryError, RuntimeError, ImportError) as error:
        channel.send(wire.NotStarted(type(error).__name__, str(error) or type(error).__name__))
        return 1
    worker.run()
    return 0


class Channel:
    """Both directions of the socket. Reading happens on a thread of its own, sending on the main thread alone."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._frames = wire.Frames()
        self.inbox: queue.SimpleQueue[wire.ToWorker | Compiled] = queue.SimpleQueue()

    def first(self) -> wire.Launch:
        """Wait for the first message, then start reading. Raises: TransferError if it is no launch of this version."""
        bodies: list[bytes] = []
        while not bodies:
            bodies = self._frames.push(self._receive())
        launch = wire.read_to_worker(bodies[0])
        if not isinstance(launch, wire.Launch) or launch.version != wire.VERSION:
            raise TransferError(f"expected a launch of version {wire.VERSION}, got {launch!r:.200}")
        for body in bodies[1:]:
            self.inbox.put(wire.read_to_worker(body))
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        return launch

    def send(self, message: wire.FromWorker) -> None:
        """Send; does nothing if nobody listens any more, the reader ends the process then."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._sock.sendall(wire.frame(message))

    def _read(self) -> None:
        try:
            while True:
                for body in self._frames.push(self._receive()):
                    self.inbox.put(wire.read_to_worker(body))
        except Exception:  # without orders the process is of no use: the server starts another
            _logger.exception("the engine's process cannot read its orders")
            os._exit(1)

    def _receive(self) -> bytes:
        try:
            data = self._sock.recv(_READ_BYTES)
        except ConnectionResetError:
            data = b""
        if not data:
            # The server is gone. Kernels may run on other threads: leave without the interpreter's goodbyes.
            os._exit(0)
        return data


class Compiled:
    """A request whose grammar is ready, or is known to be refused."""

    def __init__(self, submit: wire.Submit, error: Exception | None) -> None:
        self.submit, self.error = submit, error


class Worker:
    """The engine and what it is told."""

    def __init__(self, channel: Channel, launch: wire.Launch) -> None:
        """Load the model and say so. Raises: what loading and the engine's settings raise."""
        start = time.monotonic()
        self._channel = channel
        if launch.kernels is not None:
            use_kernels(launch.kernels, why=f"--kernels {launch.kernels}")
        described = describe_model(launch.model, Path(launch.model))
        self._tokenizer, model = _load(launch, channel)
        self._engine = Engine(model, self._tokenizer, launch.engine_config())
        self._grammars: Grammars | None = None
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._compiling: set[str] = set()
        self._stopping = False
        channel.send(_facts(described, model, self._engine, time.monotonic() - start))

    def run(self) -> None:
        """Orders, a step, news; until `Stop`."""
        while not self._stopping:
            for message in self._orders():
                self._obey(message)
            self._publish(self._engine.step())
        self._compiler.shutdown(cancel_futures=True)

    def _orders(self) -> Iterator[wire.ToWorker | Compiled]:
        """What has come; waits for something if there is nothing to compute."""
        inbox, engine = self._channel.inbox, self._engine
        with suppress(queue.Empty):
            if not engine.has_work:
                waiting = engine.stats().waiting + engine.stats().running
                yield inbox.get(timeout=_IDLE_S if waiting else None)
            while True:
                yield inbox.get_nowait()

    def _obey(self, message: wire.ToWorker | Compiled) -> None:
        match message:
            case wire.Submit():
                self._submit(message)
            case Compiled():
                self._add_compiled(message)
            case wire.Abort():
                if message.id in self._compiling:
                    self._compiling.discard(message.id)
                    self._channel.send(wire.Refused(message.id, "aborted", "aborted before it began"))
                self._engine.abort(message.id)
            case wire.Ping():
                self._channel.send(wire.Pong(message.number, self._engine.stats()))
            case wire.Pause():
                self._engine.pause()
            case wire.Resume():
                self._engine.resume()
            case wire.ForgetPrefixes():
                self._engine.forget_prefixes()
            case wire.Stop():
                self._stopping = True
            case wire.Launch():
                raise TransferError("a second launch arrived")

    def _submit(self, submit: wire.Submit) -> None:
        if submit.constraint is None:
            self._add(submit)
            return
        self._compiling.add(submit.id)
        self._compiler.submit(self._compile, submit)

    def _compile(self, submit: wire.Submit) -> None:
        """On the compiler's thread: what is compiled stays in the cache of `Grammars`, where the engine finds it."""
        error: Exception | None = None
        try:
            assert submit.constraint is not None, "asked for with one"
            if self._grammars is None:
                self._grammars = Grammars(self._tokenizer)
            start = self._tokenizer.answer_start(submit.prompt) if submit.begun is None else "text"
            self._grammars.matcher(submit.constraint, start)
        except Exception as raised:  # whatever the library raises: it is told to the one who asked
            error = raised
        self._channel.inbox.put(Compiled(submit, error))

    def _add_compiled(self, compiled: Compiled) -> None:
        submit, error = compiled.submit, compiled.error
        if submit.id not in self._compiling:  # aborted meanwhile
            return
        self._compiling.discard(submit.id)
        if error is None:
            self._add(submit)
        else:
            self._refuse(submit.id, error)

    def _add(self, submit: wire.Submit) -> None:
        try:
            new_mask = None
            if submit.constraint is not None:
                assert self._grammars is not None, "made by the compiler"
                new_mask = grammar_masks(
                    self._grammars, self._tokenizer, submit.constraint, submit.prompt, begun=submit.begun
                )
            self._engine.add(
                Request(
                    id=submit.id,
                    prompt=tuple(submit.prompt),
                    params=submit.params,
                    priority=submit.priority,
                    tenant=submit.tenant,
                    cache_salt=submit.cache_salt,
                    timeout_s=submit.timeout_s,
                    new_mask=new_mask,
                )
            )
        except Exception as error:  # one request must not end the process
            self._refuse(submit.id, error)
            return
        self._channel.send(wire.Taken(submit.id))

    def _refuse(self, request_id: str, error: Exception) -> None:
        if isinstance(error, Ernie45Error):
            kind: wire.RefusalKind = "request" if isinstance(error, RequestError) else "internal"
        else:
            _logger.error("request %s failed before it began", request_id, exc_info=error)
            kind = "internal"
        self._channel.send(wire.Refused(request_id, kind, str(error) or type(error).__name__))

    def _publish(self, events: list[Event]) -> None:
        if not events:
            return
        self._channel.send(
            wire.Step(
                scores=[event for event in events if isinstance(event, PromptScores)],
                outputs=[event for event in events if isinstance(event, Output)],
                ends=[event for event in events if isinstance(event, End)],
                stats=self._engine.stats(),
            )
        )


def _load(launch: wire.Launch, channel: Channel) -> tuple[Tokenizer, CausalLM]:
    """The tokenizer and the network, in float32 or as packed."""
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _REPORT_S:
            last = time.monotonic()
            channel.send(wire.Loading("loading", done, total))

    tokenizer = load_tokenizer(launch.model, chat_format=launch.chat_format)
    return tokenizer, load_model(launch.model, progress=report)


def _facts(described: ModelDescription, model: CausalLM, engine: Engine, load_s: float) -> wire.Started:
    config, stats = engine.config, engine.stats()
    assert config.max_model_len is not None, "filled in by resolve"
    assert config.kv_dtype is not None, "filled in by resolve"
    kv_tokens = stats.pages.total * stats.page_size
    return wire.Started(
        pid=os.getpid(),
        max_model_len=config.max_model_len,
        context=model.config.max_position_embeddings,
        vocab_size=model.config.vocab_size,
        kind=described.kind,
        weights=described.dtype or "",
        weight_bytes=described.size_bytes or 0,
        parameters=described.parameters,
        active_parameters=described.active_parameters,
        kv_dtype=config.kv_dtype,
        kv_bytes=kv_tokens * engine.kv_bytes_per_token,
        kv_tokens=kv_tokens,
        max_num_seqs=config.max_num_seqs,
        kernels=describe(),
        load_s=load_s,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
