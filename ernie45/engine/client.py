"""The engine as the server sees it: another process, watched over, with a stream of events per request. No torch here.

    client = EngineClient(Launch(model="path"))
    await client.start()
    answer = await client.submit(Submit(id="a", prompt=[5, 6], params=SamplingParams()))
    async for event in answer: ...        # PromptScores, Output, and exactly one End, or EngineDownError

If the process dies, whoever waits for it gets `EngineDownError` at once, and a new process is started: at once after the first
death, later ones with growing pauses. A process that stops answering is killed, which is the same case then.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from ernie45 import errors
from ernie45.engine import wire
from ernie45.engine.request import End, Event
from ernie45.engine.stats import EngineStats
from ernie45.errors import EngineDownError, Ernie45Error, RequestError, TransferError

_logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "restarting", "stopped"]

_WORKER = "ernie45.worker"
"""The module that the engine's process runs; it is above this one, and not imported."""
_PING_S = 2.0
_MAX_PAUSE_S = 10.0
_READ_BYTES = 1 << 18
_EXIT_S = 5.0
"""How long a process that was told to stop may take."""


@dataclass(frozen=True)
class Spawned:
    """A process that waits for its launch, and our end of the socket. Without a launch it ends when that is closed."""

    process: subprocess.Popen[bytes]
    ours: socket.socket


def spawn() -> Spawned:
    """Start a process. It takes a while to import what it needs, so that it pays to start it before anything else.

    Raises: OSError.
    """
    ours, theirs = socket.socketpair()
    try:
        # Its own session: Ctrl-C in a terminal reaches the server alone, which decides what becomes of the engine.
        process = subprocess.Popen(
            [sys.executable, "-m", _WORKER, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return Spawned(process, ours)


class Answer:
    """The events of one request. Iterate once, to the end; or `abort`, and wait until it is `over`."""

    def __init__(self, client: EngineClient, request_id: str) -> None:
        self._client, self.request_id = client, request_id
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._over = asyncio.Event()
        self.end: End | None = None
        """There as soon as it has come, whether or not somebody reads the events."""

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events up to and with the end. Raises: EngineDownError if the engine's process dies meanwhile."""
        while True:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if isinstance(event, End):
                return

    async def over(self) -> None:
        """Wait until nothing more comes, read or not: the end is there, or the engine's process is not."""
        await self._over.wait()

    def abort(self) -> None:
        """Nobody wants the rest: the engine frees what the request holds within a step. Its end still comes."""
        self._client.abort(self.request_id)

    def push(self, event: Event | Exception) -> None:
        """For the client: what has come. Behind the end nothing counts: there is exactly one."""
        if self._over.is_set():
            return
        self._events.put_nowait(event)
        if isinstance(event, End):
            self.end = event
        if isinstance(event, End | Exception):
            self._over.set()


class EngineClient:
    """Starts the engine's process, talks to it, starts it again."""

    def __init__(
        self,
        launch: wire.Launch,
        *,
        spawned: Spawned | None = None,
        stall_s: float = 120.0,
        load_timeout_s: float = 600.0,
        on_loading: Callable[[wire.Loading], None] | None = None,
    ) -> None:
        """Args: spawned: the first process, if it was started already. stall_s: silence after which a process that serves counts as
        stuck; longer than any step takes. load_timeout_s: the same for one that loads, which says how far it has come.
        """
        self._spawned = spawned
        self._launch, self._stall_s, self._load_timeout_s, self._on_loading = (
            launch,
            stall_s,
            load_timeout_s,
            on_loading,
        )
        self.state: State = "loading"
        self.facts: wire.Started | None = None
        self.stats: EngineStats | None = None
        self.loading: wire.Loading | None = None
        self.restarts = 0
        self.last_error: str | None = None
        self._why_killed: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._answers: dict[str, Answer] = {}
        self._supervisor: asyncio.Task[None] | None = None
        self._first_start: asyncio.Future[None] | None = None
        self._not_started: wire.NotStarted | None = None
        self._pings = itertools.count()
        self._heard = 0.0
        self._paused = False
        self._stop_asked = asyncio.Event()

    @property
    def in_flight(self) -> int:
        """Requests that have no end yet."""
        return len(self._answers)

    @property
    def paused(self) -> bool:
        """Whether the engine computes nothing until `resume`."""
        return self._paused

    async def start(self) -> None:
        """Start the process and wait until it serves. Raises: what loading the model raised there."""
        self._first_start = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")
        await self._first_start

    async def submit(self, submit: wire.Submit) -> Answer:
        """Hand a request over and wait until the engine has taken it.

        Raises: RequestError if it cannot be honoured; EngineDownError if there is no engine to take it.
        """
        if submit.id in self._answers:
            raise RequestError(f"request id {submit.id!r} is in use by a request that runs: choose another")
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[submit.id] = taken
        answer = self._answers[submit.id] = Answer(self, submit.id)
        try:
            self._send(submit)
            await taken
        except BaseException:  # refused, down, or the caller was cancelled: then it must not run on unseen
            self._answers.pop(submit.id, None)
            if self._waiting.pop(submit.id, None) is not None and self.state == "ready":
                self._send(wire.Abort(submit.id))
            raise
        return answer

    def abort(self, request_id: str) -> None:
        """End a request, if it runs."""
        if request_id in self._answers and self.state == "ready":
            self._send(wire.Abort(request_id))

    def pause(self) -> None:
        """Compute nothing until `resume`; holds for processes that are started later, too."""
        self._paused = True
        self._tell_if_ready(wire.Pause())

    def resume(self) -> None:
        """Go on."""
        self._paused = False
        self._tell_if_ready(wire.Resume())

    def forget_prefixes(self) -> None:
        """Empty the prefix cache."""
        self._send(wire.ForgetPrefixes())

    async def stop(self) -> None:
        """End the process; what still runs there gets `EngineDownError`."""
        serving, self.state = self.state == "ready", "stopped"
        self._stop_asked.set()
        if serving and self._writer is not None:
            with suppress(OSError):
                self._writer.write(wire.frame(wire.Stop()))
        else:
            self._kill()  # it loads, and would read the order only afterwards
        if self._supervisor is not None:
            try:
                await asyncio.wait_for(asyncio.shield(self._supervisor), _EXIT_S)
            except (TimeoutError, asyncio.TimeoutError):  # one class from Python 3.11 on
                self._kill()
                await self._supervisor

    def _tell_if_ready(self, message: wire.Pause | wire.Resume) -> None:
        """Pass on what a process that is not there yet hears when it is."""
        if self.state == "ready":
            self._send(message)

    def _send(self, message: wire.ToWorker) -> None:
        if self.state != "ready" or self._writer is None:
            raise EngineDownError(self._down_message())
        self._writer.write(wire.frame(message))

    def _down_message(self) -> str:
        if self.state == "loading":
            return "the model is being loaded: try again shortly"
        if self.state == "stopped":
            return "the server is shutting down"
        return "the engine is being restarted: try again shortly"

    async def _supervise(self) -> None:
        assert self._first_start is not None, "start() made it"
        deaths_in_a_row = 0
        while not self._stop_asked.is_set():
            served = await self._run_process()
            if not self._first_start.done():
                self._first_start.set_exception(self._why_not_started())
                self.state = "stopped"
                return
            if self._stop_asked.is_set():
                return
            self.restarts += 1
            deaths_in_a_row = 0 if served else deaths_in_a_row + 1
            pause = min(0.5 * 2**deaths_in_a_row, _MAX_PAUSE_S) if deaths_in_a_row else 0.0
            _logger.error("the engine's process ended (%s); starting it again in %.1f s", self.last_error, pause)
            with suppress(TimeoutError, asyncio.TimeoutError):  # one class from Python 3.11 on
                await asyncio.wait_for(self._stop_asked.wait(), pause)

    def _why_not_started(self) -> Ernie45Error:
        """What the first start failed with, as the class that the other process raised."""
        if self._not_started is None:
            how = "was stopped" if self._stop_asked.is_set() else f"ended ({self.last_error})"
            remedy = (
                "; raise load_timeout_s (--load-timeout) if loading takes that long here" if self._why_killed else ""
            )
            return EngineDownError(f"the engine's process {how} while it loaded the model{remedy}")
        kind = getattr(errors, self._not_started.error, None)
        known = isinstance(kind, type) and issubclass(kind, Ernie45Error)
        error: Ernie45Error = (kind if known and kind else EngineDownError)(self._not_started.message)
        return error

    async def _run_process(self) -> bool:
        """One life of the process. Returns whether it came to serve."""
        self._not_started = self._why_killed = None
        try:
            spawned, self._spawned = self._spawned or self._spawn(), None
        except OSError as error:  # no memory, no process, no file descriptor: later there may be
            self.last_error = f"it could not be started: {error.strerror}"
            return False
        self._process = spawned.process
        reader, self._writer = await asyncio.open_connection(sock=spawned.ours)
        self._writer.write(wire.frame(self._launch))
        self._heard = time.monotonic()
        watch = asyncio.create_task(self._watch(), name="engine watchdog")
        try:
            await self._listen(reader)
        except OSError:
            pass  # it has closed its end with something unread: how it ended, `_reap` finds out
        except TransferError as error:
            _logger.error("the engine's process is not understood, and killed: %s", error)
            self._kill()
        finally:
            watch.cancel()
            served = self.state == "ready"
            if not self._stop_asked.is_set():
                self.state = "restarting"
            self.stats = None
            self._writer.close()
            self._fail_all()
            await self._reap()
        return served

    def _spawn(self) -> Spawned:
        return spawn()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        frames = wire.Frames()
        while data := await reader.read(_READ_BYTES):
            self._heard = time.monotonic()
            for body in frames.push(data):
                self._hear(wire.read_from_worker(body))

    def _hear(self, message: wire.FromWorker) -> None:
        match message:
            case wire.Step():
                self._deliver(message)
            case wire.Taken():
                self._settle(message.id, None)
            case wire.Refused():
                self._settle(message.id, _refusal(message))
            case wire.Pong():
                self.stats = message.stats
            case wire.Loading():
                self.loading = message
                assert self._first_start is not None, "start() made it"
                if self._on_loading is not None and not self._first_start.done():
                    self._on_loading(message)
            case wire.Started():
                self._started(message)
            case wire.NotStarted():
                self._not_started = message
                self.last_error = message.message

    def _deliver(self, step: wire.Step) -> None:
        self.stats = step.stats
        events: list[Event] = [*step.scores, *step.outputs, *step.ends]
        for event in events:
            if (answer := self._answers.get(event.request_id)) is not None:
                answer.push(event)
        for end in step.ends:
            self._answers.pop(end.request_id, None)

    def _settle(self, request_id: str, error: Exception | None) -> None:
        """Tell the one who submitted."""
        taken = self._waiting.pop(request_id, None)
        if taken is None or taken.done():
            return
        if error is None:
            taken.set_result(None)
        else:
            taken.set_exception(error)

    def _started(self, facts: wire.Started) -> None:
        self.facts, self.loading = facts, None
        if not self._stop_asked.is_set():
            self.state = "ready"
            if self._paused:
                self._send(wire.Pause())
        assert self._first_start is not None, "start() made it"
        if not self._first_start.done():
            self._first_start.set_result(None)

    async def _watch(self) -> None:
        """Ask for a sign of life, and kill what gives none."""
        while True:
            await asyncio.sleep(_PING_S)
            serves = self.state == "ready"
            limit_s = self._stall_s if serves else self._load_timeout_s
            if time.monotonic() - self._heard > limit_s:
                self._why_killed = f"silent for {limit_s:g} s, it was killed"
                self._kill()
                return
            if serves:
                self._send(wire.Ping(next(self._pings)))

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    async def _reap(self) -> None:
        """Wait for the process, which has closed its end, and say how it ended."""
        assert self._process is not None, "it was started"
        try:
            code = await asyncio.to_thread(self._process.wait, _EXIT_S)
        except subprocess.TimeoutExpired:
            self._kill()
            code = await asyncio.to_thread(self._process.wait)
        if self._not_started is None:
            how = f"exit code {code}" if code >= 0 else f"killed by signal {-code}"
            self.last_error = self._why_killed or how

    def _fail_all(self) -> None:
        message = "the engine stopped while it worked on this request: send it again"
        for taken in self._waiting.values():
            if not taken.done():
                taken.set_exception(EngineDownError(message))
        for answer in self._answers.values():
            answer.push(EngineDownError(message))
        self._waiting.clear()
        self._answers.clear()


def _refusal(refused: wire.Refused) -> Ernie45Error:
    """The error of a refusal. What failed inside the engine is in its log, and no caller's business."""
    if refused.kind == "request":
        return RequestError(refused.message)
    if refused.kind == "aborted":
        return EngineDownError("the request was aborted before it began")
    return Ernie45Error(f"the engine failed at request {refused.id} before it began")
