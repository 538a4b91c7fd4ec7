"""How the engine's ends become answers of HTTP, and how they are accounted for."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from ernie45.engine.client import Answer
from ernie45.engine.params import SamplingParams
from ernie45.engine.pieces import Piece
from ernie45.engine.request import End, Output, Usage
from ernie45.errors import EngineDownError, RequestError
from ernie45.server.answering import Answering, Plan
from ernie45.server.errors import ApiError, api_error

USAGE = Usage(prompt_tokens=3, completion_tokens=2)


class Client:
    """Takes aborts, and answers them as the engine does."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}

    def answer(self, name: str) -> Answer:
        client: Any = self
        return self.answers.setdefault(name, Answer(client, name))

    def abort(self, name: str) -> None:
        self.answers[name].push(End(request_id=name, kind="aborted", usage=USAGE))


def output(name: str, reason: Any = None) -> Output:
    return Output(request_id=name, index=0, piece=Piece(text="x", ids=(5,), finish_reason=reason))


def answering(client: Client, *names: str) -> tuple[Answering, list[Answering]]:
    ended: list[Answering] = []
    plans = [Plan(prompt=(1, 2, 3), params=SamplingParams()) for _ in names]
    return Answering(plans, [client.answer(name) for name in names], 0.0, ended.append), ended


async def closed(one: Answering, ended: list[Answering]) -> None:
    one.close()
    one.close()
    await asyncio.sleep(0.01)
    assert ended == [one], "exactly one end"


@pytest.mark.parametrize(("cause", "status"), [("internal", 500), ("timeout", 504), ("request", 400), (None, 500)])
def test_failures_have_their_statuses_and_are_counted(cause: Any, status: int) -> None:
    """Not-a-number logits end one request as `internal`: a 500 for it alone, without the engine's words."""

    async def check() -> None:
        client = Client()
        one, ended = answering(client, "a")
        reason = "secret detail" if cause in ("internal", None) else "reason"
        client.answers["a"].push(End(request_id="a", kind="failed", usage=USAGE, reason=reason, cause=cause))
        with pytest.raises((ApiError, RequestError)) as caught:
            await one.whole()
        shaped = api_error(caught.value)
        assert shaped.status == status
        assert isinstance(caught.value, RequestError) == (cause == "request")
        assert "secret" not in shaped.message
        await closed(one, ended)
        assert one.failed
        assert one.usage == USAGE

    asyncio.run(check())


def test_a_finished_answer_is_no_failure_and_has_its_usage() -> None:
    async def check() -> None:
        client = Client()
        one, ended = answering(client, "a", "b")
        for name in ("a", "b"):
            client.answers[name].push(output(name, "stop"))
            client.answers[name].push(End(request_id=name, kind="finished", usage=USAGE))
        assert len(await one.whole()) == 2
        await closed(one, ended)
        assert not one.failed
        assert one.usage == Usage(prompt_tokens=6, completion_tokens=4)

    asyncio.run(check())


@pytest.mark.parametrize("read", [0, 1, 2, 3])
@pytest.mark.parametrize("names", [("a",), ("a", "b", "c")])
def test_whoever_stops_reading_anywhere_still_ends(read: int, names: tuple[str, ...]) -> None:
    """Ends that were taken and not read on, as by the merging of several answers, count as well."""

    async def check() -> None:
        client = Client()
        one, ended = answering(client, *names)
        for name in names:
            client.answers[name].push(output(name))
            client.answers[name].push(output(name))
        client.answers[names[0]].push(End(request_id=names[0], kind="failed", usage=USAGE, cause="timeout"))
        deltas: Any = one.deltas()
        for _ in range(min(read, 2 * len(names))):
            with suppress(ApiError, StopAsyncIteration):  # the timeout may come among the events
                await anext(deltas)
            await asyncio.sleep(0)
        one.close()
        await deltas.aclose()
        await asyncio.sleep(0.01)
        assert ended == [one]
        assert one.usage.prompt_tokens == 3 * len(names)

    asyncio.run(check())


def test_a_dead_engine_that_was_noticed_while_reading_is_an_end() -> None:
    """The error was read with the last event once, and waited for a second time without end."""

    async def check() -> None:
        client = Client()
        one, ended = answering(client, "a")
        client.answers["a"].push(EngineDownError("gone"))
        with pytest.raises(Exception, match="gone") as caught:
            await one.whole()
        assert api_error(caught.value).status == 503
        await closed(one, ended)
        assert one.failed
        assert one.usage == Usage()

    asyncio.run(check())
