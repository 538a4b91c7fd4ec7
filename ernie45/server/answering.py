"""One request on its way through the engine: what to ask for, and what comes back, taken apart.

Every interface (chat, completions, responses, messages) makes `Plan`s, hands them to `Service.answer` and shapes the `Delta`s; none of
them sees the engine. Streamed and whole answers are made of the same deltas, so they cannot differ.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from ernie45.engine.client import Answer
from ernie45.engine.params import SamplingParams
from ernie45.engine.pieces import FinishDetail, Piece, TokenLogprob
from ernie45.engine.request import End, Event, Output, PromptScores, Usage
from ernie45.errors import EngineDownError, RequestError
from ernie45.processing.answer_format import AnswerFormat, Start
from ernie45.processing.answer_parser import (
    AnswerParser,
    ArgumentsDelta,
    ContentDelta,
    ParsedAnswer,
    ToolCallBegun,
    ToolCallEnded,
    collected,
)
from ernie45.processing.answer_parser import Event as Part
from ernie45.processing.constraint import Constraint
from ernie45.server.errors import ApiError

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the text of an answer is taken apart."""

    format: AnswerFormat
    start: Start
    tools: bool = False
    """Whether calls are looked for."""
    parallel_calls: bool = True
    """False: an answer ends with its first call."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A prompt with all that the engine has to know of it."""

    prompt: tuple[int, ...]
    params: SamplingParams
    reading: Reading | None = None
    """None: the text passes as it stands."""
    constraint: Constraint | None = None
    begun: str | None = None
    """Text that the prompt ends with and the answer continues: it counts as part of what is constrained."""
    priority: int = 0
    cache_salt: str | None = None


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What a piece of the engine adds to one choice."""

    index: int
    """Of the choice: number of the plan times `n`, plus number within it."""
    parts: list[Part]
    """For a plan without reading: content alone."""
    piece: Piece
    finish_reason: FinishReason | None = None

    @property
    def finish_detail(self) -> FinishDetail | None:
        """Why it ended, where the reason alone does not tell."""
        return self.piece.finish_detail


@dataclass(kw_only=True)
class Choice:
    """A whole choice."""

    index: int
    parsed: ParsedAnswer
    finish_reason: FinishReason
    pieces: list[Piece] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        """All of its tokens."""
        return [token for piece in self.pieces for token in piece.ids]

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """One per token, if asked for."""
        return [logprob for piece in self.pieces for logprob in piece.logprobs]

    @property
    def last(self) -> Piece:
        """The piece that ended it."""
        return self.pieces[-1]


@dataclass(kw_only=True)
class Timings:
    """Seconds on the monotonic clock."""

    arrived: float
    first: float | None = None
    """When the first token came."""
    ended: float | None = None


class Answering:
    """The answers to the plans of one request. Iterate `deltas` once, or take `whole`; then `usage` is known."""

    def __init__(
        self, plans: Sequence[Plan], answers: Sequence[Answer], arrived: float, on_end: Callable[[Answering], None]
    ) -> None:
        """Args: on_end: called once, when the engine has ended all of it, however that came."""
        self.plans, self._answers, self._on_end = plans, answers, on_end
        self._closing: asyncio.Task[None] | None = None
        self.scores: list[tuple[TokenLogprob, ...]] = [()] * len(plans)
        """Of each plan's prompt, if asked for; there before the plan's first delta."""
        self.timings = Timings(arrived=arrived)
        self._open: list[set[int]] = [set(range(plan.params.n)) for plan in plans]
        self._readers: dict[int, _Reader] = {}
        self.finish_reasons: list[FinishReason] = []
        """Of the choices that have ended, in their order."""

    @property
    def usage(self) -> Usage:
        """What the plans took that have ended."""
        return _sum([answer.end.usage for answer in self._answers if answer.end is not None])

    @property
    def failed(self) -> bool:
        """Whether a choice has no finish reason: it was aborted, it failed, or nobody read on."""
        return any(self._open)

    @property
    def queue_times(self) -> list[float]:
        """Seconds that plans waited for their first step; of those that have ended and had one."""
        ends = [answer.end for answer in self._answers if answer.end is not None]
        return [end.queue_s for end in ends if end.queue_s is not None]

    async def deltas(self) -> AsyncIterator[Delta]:
        """What comes, as it comes; choices interleave.

        Raises: ApiError, RequestError if the engine fails at the request; EngineDownError if it dies meanwhile. Whoever iterates
        calls `close` in the end.
        """
        async for number, event in self._events():
            if isinstance(event, Output):
                delta = self._read(number, event)
                if delta is not None:
                    if self.timings.first is None:
                        self.timings.first = time.monotonic()
                    yield delta
            elif isinstance(event, PromptScores):
                self.scores[number] = event.logprobs
            else:
                self._close(number, event)
        self.timings.ended = time.monotonic()

    async def whole(self) -> list[Choice]:
        """All choices, when the last has ended. Raises: what `deltas` raises."""
        parts: dict[int, list[Part]] = {}
        choices: dict[int, Choice] = {}
        pieces: dict[int, list[Piece]] = {}
        async for delta in self.deltas():
            parts.setdefault(delta.index, []).extend(delta.parts)
            pieces.setdefault(delta.index, []).append(delta.piece)
            if delta.finish_reason is not None:
                choices[delta.index] = Choice(
                    index=delta.index,
                    parsed=collected(parts[delta.index]),
                    finish_reason=delta.finish_reason,
                    pieces=pieces[delta.index],
                )
        return [choices[index] for index in sorted(choices)]

    def fail(self, error: EngineDownError) -> None:
        """End it from outside: whoever waits for more gets the error."""
        for answer in self._answers:
            answer.push(error)

    def abort(self) -> None:
        """End it before its time; whoever waits for more gets an error."""
        for answer in self._answers:
            answer.abort()

    def close(self) -> None:
        """Nobody reads on. What still runs is aborted; the engine frees it within a step and says what it took."""
        if self._closing is None:
            self.abort()
            self._closing = asyncio.create_task(self._wait_for_ends(), name="ends of a request")

    async def _wait_for_ends(self) -> None:
        for answer in self._answers:
            await answer.over()
        if self.timings.ended is None:
            self.timings.ended = time.monotonic()
        self._on_end(self)

    async def _events(self) -> AsyncIterator[tuple[int, Event]]:
        """Events with the number of their plan."""
        if len(self._answers) == 1:
            async for event in self._answers[0]:
                yield 0, event
            return
        async for item in _merged(self._answers):
            yield item

    def _read(self, number: int, output: Output) -> Delta | None:
        plan = self.plans[number]
        index = number * plan.params.n + output.index
        reader = self._readers.get(index)
        if reader is None:
            reader = self._readers[index] = _Reader(plan.reading)
        if reader.done:
            return None
        parts = reader.push(output.piece)
        finish: FinishReason | None = output.piece.finish_reason
        if reader.done:
            finish = "tool_calls"
            self._end_early(number, output.index)
        elif finish is not None:
            self._open[number].discard(output.index)
            finish = "tool_calls" if finish == "stop" and reader.has_calls else finish
        if finish is not None:
            self.finish_reasons.append(finish)
        return Delta(index=index, parts=parts, piece=output.piece, finish_reason=finish)

    def _end_early(self, number: int, choice: int) -> None:
        """The choice has its one call: what the model would go on with, nobody wants."""
        self._open[number].discard(choice)
        if not self._open[number]:
            self._answers[number].abort()

    def _close(self, number: int, end: End) -> None:
        if end.kind == "finished" or not self._open[number]:
            return
        if end.kind == "aborted":
            raise ApiError(499, "the request was aborted", code="aborted")
        if end.cause == "request":
            raise RequestError(end.reason or "the request cannot be honoured")
        if end.cause == "timeout":
            raise ApiError(504, end.reason or "the request took too long", code="timeout")
        raise ApiError(500, "the model failed at this request; the server's log says why", code="model_failed")


async def in_chunks(deltas: AsyncIterator[Delta], chunk_tokens: int) -> AsyncIterator[list[Delta]]:
    """Deltas of one choice at a time, as many as make so many tokens; fewer at its end."""
    held: dict[int, list[Delta]] = {}
    async for delta in deltas:
        waiting = held.setdefault(delta.index, [])
        waiting.append(delta)
        if delta.finish_reason is not None or sum(len(one.piece.ids) for one in waiting) >= chunk_tokens:
            yield held.pop(delta.index)


class _Reader:
    """Takes one choice apart."""

    def __init__(self, reading: Reading | None) -> None:
        self._reading = reading
        self.done = False
        """It has had its one call."""
        self.has_calls = False
        self._parser: AnswerParser | None = None
        if reading is not None:
            self._parser = AnswerParser(reading.format, start=reading.start, tools=reading.tools)

    def push(self, piece: Piece) -> list[Part]:
        if self._parser is None:
            return [ContentDelta(piece.text)] if piece.text else []
        parts = self._parser.push(piece.text)
        assert self._reading is not None, "there is a parser"
        if not self._reading.parallel_calls:
            parts = self._up_to_first_call(parts)
        if piece.finish_reason is not None and not self.done:
            # This closes a call that was cut, too: the answer's reason stays `length`.
            parts = [*parts, *self._parser.finish()]
        self.has_calls = self.has_calls or any(isinstance(part, ToolCallBegun) for part in parts)
        return parts

    def _up_to_first_call(self, parts: list[Part]) -> list[Part]:
        for at, part in enumerate(parts):
            if isinstance(part, ToolCallEnded):
                self.done = self.has_calls = True
                return parts[: at + 1]
            assert not isinstance(part, ArgumentsDelta) or part.index == 0, "nothing is read behind the first call"
        return parts


async def _merged(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, Event]]:
    """The events of several answers as they come. Raises what the first failing one raises."""
    queue: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()

    async def pump(number: int, answer: Answer) -> None:
        try:
            async for event in answer:
                queue.put_nowait((number, event))
            queue.put_nowait((number, None))
        except EngineDownError as error:
            queue.put_nowait((number, error))

    pumps = [asyncio.create_task(pump(number, answer)) for number, answer in enumerate(answers)]
    try:
        running = len(pumps)
        while running:
            number, item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield number, item
    finally:
        for task in pumps:
            task.cancel()


def _sum(usages: Sequence[Usage]) -> Usage:
    return Usage(**{item.name: sum(getattr(usage, item.name) for usage in usages) for item in fields(Usage)})
