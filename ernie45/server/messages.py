"""`/messages`: Anthropic's interface. A message is a row of blocks; streamed, every block begins, grows and stops."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from pydantic_core import from_json
from starlette.responses import Response

from ernie45.engine.request import Usage
from ernie45.server.admission import admit
from ernie45.server.answering import Answering, Delta, Plan
from ernie45.server.answers import extra_headers, json_answer, service_of, streamed, unless_gone
from ernie45.server.asgi import error_bytes, json_bytes
from ernie45.server.blocks import Block, Blocks, Step
from ernie45.server.body import JsonRoute
from ernie45.server.documented import ERRORS, JSON_OR_STREAM
from ernie45.server.errors import ApiError
from ernie45.server.messages_plan import messages_plan, within_context
from ernie45.server.opaque import packed
from ernie45.server.schema.messages import CountRequest, MessageErrorBody, MessageObject, MessagesRequest, TokenCount
from ernie45.server.service import Service
from ernie45.server.stream import named

router = APIRouter(route_class=JsonRoute, tags=["messages"])

VERSIONS = ("2023-06-01", "2026-10-21")
"""They differ in what is refused, not in form. Sampling fields, which the later one has no more, are honoured under both: they
steer the models that are served here."""
UNSIGNED = "unsigned"
"""Clients insist on a signature of thoughts. Nothing here depends on one."""
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {**stated, "model": MessageErrorBody} for status, stated in ERRORS.items()
}
_PING = named("ping", {"type": "ping"})
Event = dict[str, Any]


@router.post(
    "/messages",
    response_model=MessageObject,
    responses={**_ERRORS, **JSON_OR_STREAM},
    summary="Go on with a conversation, in Anthropic's form",
)
async def create_message(request: Request, body: MessagesRequest) -> Response:
    """The assistant's next message, whole or (`stream`) as events."""
    admitted = await admit(request, body, _plans, _ignored(request))
    writer = _Writer(admitted.service, body, admitted.plan, admitted.answering)
    if body.stream:

        def failure(error: ApiError) -> bytes:
            return b"event: error\ndata: " + error_bytes(request.scope, error) + b"\n\n"

        return streamed(request, admitted.answering, writer.frames(), admitted.headers, failure, _PING)
    return json_answer(await unless_gone(request, admitted.answering, writer.whole()), admitted.headers)


@router.post("/messages/count_tokens", response_model=TokenCount, responses=_ERRORS, summary="Tokens of a conversation")
async def count_tokens(request: Request, body: CountRequest) -> Response:
    """How many tokens the model would read; nothing is generated."""
    service = service_of(request)
    ignored = _ignored(request)
    service.check_model(body.model)
    ignored += body.unknown_fields()
    plan = await service.in_thread(messages_plan, service, body)
    return json_answer({"input_tokens": len(plan.prompt)}, extra_headers(request, ignored))


def _plans(service: Service, body: MessagesRequest) -> list[Plan]:
    plan = messages_plan(service, body, context=service.facts.max_model_len)
    return [within_context(service, plan)]


def _ignored(request: Request) -> list[str]:
    """What the headers ask for in vain. Raises: ApiError for a version that nobody speaks."""
    version = request.headers.get("anthropic-version", VERSIONS[-1])
    if version not in VERSIONS:
        message = (
            f"anthropic-version is {version[:40]!r}, the server speaks {' and '.join(VERSIONS)}: send one of these"
        )
        raise ApiError(400, message, code="invalid_value", param="anthropic-version")
    return ["anthropic_beta"] if request.headers.get("anthropic-beta") else []


def called_input(arguments: str) -> dict[str, Any]:
    """A call's input: an object, whatever the model wrote; of one that was cut, what is complete."""
    try:
        found = from_json(arguments or "{}", allow_inf_nan=False, allow_partial=True)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"INVALID_JSON": arguments}  # the name that Anthropic's documents give


def valid_json(arguments: str) -> str:
    """The same as text that clients can add up: as the model wrote it, if that is an object, perhaps cut."""
    found = called_input(arguments)
    return json_bytes(found).decode() if "INVALID_JSON" in found else arguments or "{}"


class _Writer:
    """Makes a message of the deltas of one request: the events of a stream, and the object that they add up to."""

    def __init__(self, service: Service, body: MessagesRequest, plan: Plan, answering: Answering) -> None:
        self._service, self._plan, self._answering = service, plan, answering
        # Every message has a limit of its own; `within_context` took it away where the context is the nearer one.
        self._cut_by_context = plan.params.max_tokens is None
        self._omits_thoughts = body.thinking is not None and body.thinking.display == "omitted"
        self._eager = frozenset(tool.name for tool in body.tools or () if tool.eager_input_streaming)
        self._id = f"msg_{secrets.token_hex(12)}"
        self._blocks = Blocks()
        self._last: Delta | None = None

    async def whole(self) -> dict[str, Any]:
        """The message."""
        async for delta in self._answering.deltas():
            self._write(delta)
        content = [self._block(block) for block in self._blocks.all]
        return {**self._message(content, _usage(self._answering.usage)), **self._ended()}

    async def frames(self) -> AsyncIterator[bytes]:
        """The message as events."""
        started = self._message([], _usage(Usage(prompt_tokens=len(self._plan.prompt))))
        yield _frame({"type": "message_start", "message": started})
        yield _PING
        async for delta in self._answering.deltas():
            for event in self._write(delta):
                yield _frame(event)
        yield _frame({"type": "message_delta", "delta": self._ended(), "usage": _usage(self._answering.usage)})
        yield _frame({"type": "message_stop"})

    def _message(self, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._service.model_name,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }

    def _ended(self) -> dict[str, Any]:
        assert self._last is not None, "the answer has ended"
        reason, met = self._last.finish_reason, self._last.piece.stop_reason
        assert reason is not None, "the answer has ended"
        match reason:
            case "tool_calls":
                return {"stop_reason": "tool_use", "stop_sequence": None}
            case "length":
                limit = "model_context_window_exceeded" if self._cut_by_context else "max_tokens"
                return {"stop_reason": limit, "stop_sequence": None}
            case "stop" if isinstance(met, str):
                return {"stop_reason": "stop_sequence", "stop_sequence": met}
            case _:
                return {"stop_reason": "end_turn", "stop_sequence": None}

    def _write(self, delta: Delta) -> list[Event]:
        steps = self._blocks.push(delta.parts)
        if delta.finish_reason is not None:
            self._last = delta
            steps += self._blocks.finish(cut=delta.finish_reason == "length")
        return [event for step in steps for event in self._events(step)]

    def _events(self, step: Step) -> list[Event]:
        block = step.block
        if step.what == "begin":
            return [{"type": "content_block_start", "index": block.index, "content_block": _empty(block)}]
        if step.what == "grow":
            return [] if self._held_back(block) else [_delta(block, step.text)]
        last: list[Event] = []
        if block.kind == "thought":
            last = [_change(block, {"type": "signature_delta", "signature": self._signature(block)})]
        elif block.kind == "call" and self._held_back(block):
            last = [_delta(block, valid_json(block.text))]
        return [*last, {"type": "content_block_stop", "index": block.index}]

    def _held_back(self, block: Block) -> bool:
        """Whether a block's text does not go out as it comes: clients fail at input that turns out to be no JSON."""
        if block.kind == "thought":
            return self._omits_thoughts
        return block.kind == "call" and block.name not in self._eager

    def _block(self, block: Block) -> dict[str, Any]:
        match block.kind:
            case "thought":
                shown = "" if self._omits_thoughts else block.text
                return {"type": "thinking", "thinking": shown, "signature": self._signature(block)}
            case "text":
                return {"type": "text", "text": block.text}
            case "call":
                return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": called_input(block.text)}

    def _signature(self, block: Block) -> str:
        return packed(block.text) if self._omits_thoughts else UNSIGNED


def _empty(block: Block) -> dict[str, Any]:
    match block.kind:
        case "thought":
            return {"type": "thinking", "thinking": "", "signature": ""}
        case "text":
            return {"type": "text", "text": ""}
        case "call":
            return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}


def _delta(block: Block, text: str) -> Event:
    match block.kind:
        case "thought":
            return _change(block, {"type": "thinking_delta", "thinking": text})
        case "text":
            return _change(block, {"type": "text_delta", "text": text})
        case "call":
            return _change(block, {"type": "input_json_delta", "partial_json": text})


def _change(block: Block, delta: dict[str, Any]) -> Event:
    return {"type": "content_block_delta", "index": block.index, "delta": delta}


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic's usage, in which the counts of the input exclude each other."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def _frame(event: Event) -> bytes:
    return named(event["type"], event)
