"""The engine's process watched over: whatever becomes of it, everyone who waits hears the end, once, and soon."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from ernie45.engine import client as module
from ernie45.engine.client import Answer, EngineClient, Spawned
from ernie45.engine.params import SamplingParams
from ernie45.engine.request import End
from ernie45.engine.wire import Launch, Submit
from ernie45.errors import CheckpointError, EngineDownError, Ernie45Error, RequestError

FAKE = Path(__file__).parent / "fake_worker.py"


class FakedClient(EngineClient):
    """Starts fakes, each with the next behaviour; the last one again and again."""

    def __init__(self, *behaviours: str, **settings: Any) -> None:
        super().__init__(Launch(model="none"), **settings)
        self.behaviours = list(behaviours)
        self.pids: list[int] = []

    def _spawn(self) -> Spawned:
        behaviour = self.behaviours.pop(0) if len(self.behaviours) > 1 else self.behaviours[0]
        if behaviour == "cannot be started":
            raise OSError(11, "Resource temporarily unavailable")
        ours, theirs = socket.socketpair()
        process = subprocess.Popen(
            [sys.executable, str(FAKE), behaviour, str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        theirs.close()
        self.pids.append(process.pid)
        return Spawned(process, ours)


def _slow_exit(timeout: float | None = None) -> int:
    time.sleep(1)
    return 0


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PING_S", 0.1)
    monkeypatch.setattr(module, "_EXIT_S", 0.5)


def run(client: FakedClient, work: Callable[[FakedClient], Awaitable[None]]) -> None:
    """Start, do, stop; then nothing is left of it."""

    async def whole() -> None:
        await client.start()
        try:
            await asyncio.wait_for(work(client), 15)
        finally:
            await asyncio.wait_for(client.stop(), 5)
        assert client.in_flight == 0
        assert client._process is not None
        assert client._process.returncode is not None, "it was not waited for"
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not left

    asyncio.run(whole())


def submit(name: str = "a") -> Submit:
    return Submit(id=name, prompt=[5, 6], params=SamplingParams())


async def events(answer: Answer) -> list[Any]:
    return [event async for event in answer]


async def until_ready(client: EngineClient) -> None:
    while client.state != "ready":
        await asyncio.sleep(0.01)


def test_every_answer_has_one_end() -> None:
    async def work(client: FakedClient) -> None:
        answer = await client.submit(submit())
        found = await events(answer)
        assert [event.kind for event in found if isinstance(event, End)] == ["finished"]
        await answer.over()
        await asyncio.sleep(0.1)  # the fake sends a second end, which counts for nothing
        assert answer.end is found[-1]

    run(FakedClient("answers"), work)


def test_an_abort_ends_it_read_or_not() -> None:
    async def work(client: FakedClient) -> None:
        answer = await client.submit(submit())
        answer.abort()
        answer.abort()
        await answer.over()
        assert answer.end is not None
        assert answer.end.kind == "aborted"

    run(FakedClient("waits"), work)


@pytest.mark.parametrize("behaviour", ["dies", "stalls", "sends noise", "sends a length"])
def test_a_process_that_fails_ends_everything_and_is_replaced(behaviour: str) -> None:
    async def work(client: FakedClient) -> None:
        start = time.monotonic()
        with pytest.raises(EngineDownError, match="send it again"):
            await events(await client.submit(submit()))
        assert time.monotonic() - start < 3
        await until_ready(client)
        assert client.restarts == 1
        assert len(await events(await client.submit(submit()))) == 2

    run(FakedClient(behaviour, "answers", stall_s=0.5), work)


def test_nobody_waits_for_a_process_that_is_slow_to_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers hear of the end when the socket closes, not when the process is gone."""

    async def work(client: FakedClient) -> None:
        answer = await client.submit(submit())
        process = client._process
        assert process is not None
        monkeypatch.setattr(process, "wait", _slow_exit)
        process.kill()
        start = time.monotonic()
        with pytest.raises(EngineDownError):
            await events(answer)
        assert time.monotonic() - start < 0.7
        monkeypatch.undo()
        process.wait()  # which the client believes to have done

    run(FakedClient("waits"), work)


def test_requests_that_were_not_taken_hear_of_the_end_too() -> None:
    async def work(client: FakedClient) -> None:
        waiting = asyncio.create_task(client.submit(submit()))
        await asyncio.sleep(0.05)
        assert client.in_flight == 1  # once, not once as waiting and once as answered
        assert client._process is not None
        client._process.kill()
        with pytest.raises(EngineDownError):
            await waiting

    run(FakedClient("takes nothing", "answers"), work)


def test_what_failed_inside_the_engine_is_not_told_to_callers() -> None:
    async def work(client: FakedClient) -> None:
        with pytest.raises(Ernie45Error) as caught:
            await client.submit(submit())
        assert "secret" not in str(caught.value)
        assert not isinstance(caught.value, EngineDownError | RequestError)
        assert client.in_flight == 0

    run(FakedClient("refuses"), work)


def test_a_cancelled_caller_leaves_nothing_behind() -> None:
    async def work(client: FakedClient) -> None:
        waiting = asyncio.create_task(client.submit(submit()))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert client.in_flight == 0

    run(FakedClient("takes nothing"), work)


def test_an_id_that_runs_is_not_taken_twice() -> None:
    async def work(client: FakedClient) -> None:
        answer = await client.submit(submit())
        with pytest.raises(RequestError, match="'a' is in use"):
            await client.submit(submit())
        answer.abort()
        await answer.over()

    run(FakedClient("waits"), work)


@pytest.mark.parametrize(
    ("behaviour", "error", "message"),
    [
        ("exits", EngineDownError, "exit code 3"),
        ("refuses to start", CheckpointError, "config.json is damaged"),
        ("sends noise first", EngineDownError, "ended"),
        ("cannot be started", EngineDownError, "Resource temporarily unavailable"),
    ],
)
def test_a_first_start_that_fails_is_told_at_once(behaviour: str, error: type[Exception], message: str) -> None:
    async def whole() -> None:
        client = FakedClient(behaviour)
        with pytest.raises(error, match=message):
            await asyncio.wait_for(client.start(), 5)
        assert client.state == "stopped"
        await client.stop()

    asyncio.run(whole())


def test_later_starts_that_fail_are_tried_again() -> None:
    async def work(client: FakedClient) -> None:
        with pytest.raises(EngineDownError):
            await events(await client.submit(submit()))
        with pytest.raises(EngineDownError, match="restarted"):
            await client.submit(submit("b"))
        await until_ready(client)
        assert client.restarts == 2
        assert client.stats is None or client.stats.running == 0

    run(FakedClient("dies", "cannot be started", "answers"), work)


def test_stopping_waits_neither_for_loading_nor_for_a_pause() -> None:
    async def loading() -> None:
        client = FakedClient("loads for ever")
        starting = asyncio.create_task(client.start())
        await asyncio.sleep(0.2)
        start = time.monotonic()
        await client.stop()
        assert time.monotonic() - start < 1
        with pytest.raises(EngineDownError, match="was stopped"):
            await starting

    asyncio.run(loading())

    async def pausing(client: FakedClient) -> None:
        with pytest.raises(EngineDownError):
            await events(await client.submit(submit()))
        await asyncio.sleep(0.3)  # it is between two starts now
        start = time.monotonic()
        await client.stop()
        assert time.monotonic() - start < 1

    run(FakedClient("dies", "cannot be started"), pausing)


def test_a_process_that_does_not_stop_is_killed() -> None:
    async def work(client: FakedClient) -> None:
        answer = await client.submit(submit())
        reading = asyncio.create_task(events(answer))
        start = time.monotonic()
        await client.stop()
        assert time.monotonic() - start < 2
        with pytest.raises(EngineDownError):
            await reading

    run(FakedClient("does not stop"), work)


async def holds(client: FakedClient) -> None:
    """Insist on an engine that computes nothing until it is told to go on."""
    answer = await client.submit(submit("held"))
    reading = asyncio.create_task(events(answer))
    await asyncio.sleep(0.2)
    assert client.paused
    assert not reading.done()
    client.resume()
    assert not client.paused
    assert len(await reading) == 2


def test_a_pause_outlives_the_process() -> None:
    async def work(client: FakedClient) -> None:
        client.pause()
        assert client._process is not None
        client._process.kill()
        await asyncio.sleep(0.05)
        await until_ready(client)
        await holds(client)

    run(FakedClient("answers"), work)


def test_a_pause_while_there_is_no_process_is_for_the_next_one() -> None:
    async def work(client: FakedClient) -> None:
        assert client._process is not None
        client._process.kill()
        while client.state == "ready":
            await asyncio.sleep(0.01)
        client.resume()
        client.pause()
        await until_ready(client)
        await holds(client)

    run(FakedClient("answers"), work)


@pytest.mark.parametrize("behaviour", ["loads for ever", "stops while it loads"])
def test_a_process_that_hangs_while_it_loads_is_given_up(behaviour: str) -> None:
    async def whole() -> None:
        client = FakedClient(behaviour, load_timeout_s=0.5)
        start = time.monotonic()
        with pytest.raises(EngineDownError, match=r"silent for 0.5 s, it was killed.*raise load_timeout_s"):
            await asyncio.wait_for(client.start(), 5)
        assert time.monotonic() - start < 3
        assert client._process is not None
        assert client._process.returncode is not None
        await client.stop()

    asyncio.run(whole())


def test_a_later_process_that_hangs_while_it_loads_is_replaced() -> None:
    async def work(client: FakedClient) -> None:
        with pytest.raises(EngineDownError):
            await events(await client.submit(submit()))
        await until_ready(client)
        assert client.restarts == 2
        assert len(await events(await client.submit(submit()))) == 2

    run(FakedClient("dies", "loads for ever", "answers", load_timeout_s=2.0), work)


def test_loading_may_take_longer_if_it_goes_on() -> None:
    seen: list[int] = []

    async def work(client: FakedClient) -> None:
        assert len(seen) == 8
        assert len(await events(await client.submit(submit()))) == 2

    settings: dict[str, Any] = {"load_timeout_s": 2.0, "on_loading": lambda loading: seen.append(loading.done)}
    run(FakedClient("loads slowly", **settings), work)
