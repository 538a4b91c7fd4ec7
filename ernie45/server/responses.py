"""`/responses`: OpenAI's newer interface, without its memory. A response is a row of items; streamed, every change is an event."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ernie45.engine.request import Usage
from ernie45.errors import ContextLengthError
from ernie45.server.admission import admit
from ernie45.server.answering import Answering, Delta, FinishReason, Plan
from ernie45.server.answers import json_answer, service_of, streamed, unless_gone
from ernie45.server.blocks import Block, Blocks, Step
from ernie45.server.body import JsonRoute
from ernie45.server.documented import ERRORS, JSON_OR_STREAM
from ernie45.server.errors import ApiError
from ernie45.server.opaque import packed
from ernie45.server.responses_plan import responses_plan
from ernie45.server.schema.responses import InputTokens, ResponseObject, ResponsesRequest
from ernie45.server.service import Service
from ernie45.server.stream import named

router = APIRouter(route_class=JsonRoute, tags=["responses"])
_stored = APIRouter(tags=["responses"])  # clients send no JSON there, not even an empty object

Event = dict[str, Any]
_ITEM_IDS = {"thought": "rs", "text": "msg", "call": "fc"}


@router.post(
    "/responses",
    response_model=ResponseObject,
    responses={**ERRORS, **JSON_OR_STREAM},
    summary="Respond to an input",
)
async def create_response(request: Request, body: ResponsesRequest) -> Response:
    """Respond, whole or (`stream`) as events that are numbered and end with the response itself."""
    try:
        admitted = await admit(request, body, _plans)
    except ContextLengthError as error:
        raise ContextLengthError(str(error).replace("max_tokens", "max_output_tokens")) from error
    writer = _Writer(admitted.service, body, admitted.plan, admitted.answering)
    if body.stream:
        return streamed(request, admitted.answering, writer.frames(), admitted.headers, writer.failure)
    return json_answer(await unless_gone(request, admitted.answering, writer.whole()), admitted.headers)


@router.post("/responses/input_tokens", response_model=InputTokens, responses=ERRORS, summary="Tokens of an input")
async def count_input_tokens(request: Request, body: ResponsesRequest) -> Response:
    """How many tokens the model would read; nothing is generated."""
    service = service_of(request)
    service.check_model(body.model)
    body.unknown_fields()
    plan = await service.in_thread(responses_plan, service, body)
    return json_answer({"object": "response.input_tokens", "input_tokens": len(plan.prompt)})


@_stored.get("/responses/{response_id}", responses=ERRORS, summary="There are no stored responses")
@_stored.delete("/responses/{response_id}", include_in_schema=False)
@_stored.post("/responses/{response_id}/cancel", include_in_schema=False)
@_stored.get("/responses/{response_id}/input_items", include_in_schema=False)
async def stored_response(response_id: str) -> Response:
    """404: a response is gone once it is sent."""
    raise ApiError(
        404,
        f"there is no response {response_id[:80]!r}: this server stores none, keep what POST /responses answers",
        code="response_not_found",
        param="response_id",
    )


router.include_router(_stored)


def _plans(service: Service, body: ResponsesRequest) -> list[Plan]:
    return [responses_plan(service, body, context=service.facts.max_model_len)]


class _Writer:
    """Makes a response of the deltas of one request: the events of a stream, and the object that they add up to."""

    def __init__(self, service: Service, body: ResponsesRequest, plan: Plan, answering: Answering) -> None:
        self._service, self._body, self._plan, self._answering = service, body, plan, answering
        self._id = f"resp_{secrets.token_hex(16)}"
        self._item_suffix = secrets.token_hex(12)
        self._created_at = int(time.time())
        self._blocks = Blocks()
        self._finish_reason: FinishReason | None = None
        self._sequence = 0
        self._as_summary = body.reasoning is not None and body.reasoning.as_summary
        self._packs_thoughts = "reasoning.encrypted_content" in (body.include or ())

    async def whole(self) -> dict[str, Any]:
        """The response."""
        async for delta in self._answering.deltas():
            self._write(delta)
        return self._ended()

    async def frames(self) -> AsyncIterator[bytes]:
        """The response as events."""
        for kind in ("response.created", "response.in_progress"):
            yield _frame(self._event(kind, response=self._response("in_progress")))
        async for delta in self._answering.deltas():
            for event in self._write(delta):
                yield _frame(event)
        response = self._ended()
        yield _frame(self._event(f"response.{response['status']}", response=response))

    def failure(self, error: ApiError) -> bytes:
        """The last frames of a stream that fails: the error, and the response that it leaves."""
        code = {429: "rate_limit_exceeded"}.get(
            error.status, "invalid_prompt" if error.status < 500 else "server_error"
        )
        failed = {**self._response("failed"), "error": {"code": code, "message": error.message}}
        stated = self._event("error", code=error.code, message=error.message, param=error.param)
        return _frame(stated) + _frame(self._event("response.failed", response=failed))

    def _ended(self) -> dict[str, Any]:
        assert self._finish_reason is not None, "the answer has ended"
        response = self._response("incomplete" if self._finish_reason == "length" else "completed")
        response["usage"] = _usage(self._answering.usage)
        if self._finish_reason == "length":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = int(time.time())
        return response

    def _write(self, delta: Delta) -> list[Event]:
        steps = self._blocks.push(delta.parts)
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason
            steps += self._blocks.finish(cut=delta.finish_reason == "length")
        return [event for step in steps for event in self._events(step)]

    def _events(self, step: Step) -> list[Event]:
        block = step.block
        item = {"item_id": self._item_id(block), "output_index": block.index}
        if step.what == "begin":
            added = {"output_index": block.index, "item": self._item(block, "in_progress")}
            return [self._event("response.output_item.added", **added), *self._part_events(block, "added", item)]
        name, place = self._growth(block)
        if step.what == "grow":
            return [self._event(f"{name}.delta", **item, **place, delta=step.text, **_logprobs(block))]
        done = {"arguments": block.text, "name": block.name} if block.kind == "call" else {"text": block.text}
        status = "completed" if block.complete else "incomplete"
        return [
            self._event(f"{name}.done", **item, **place, **done, **_logprobs(block)),
            *self._part_events(block, "done", item),
            self._event("response.output_item.done", output_index=block.index, item=self._item(block, status)),
        ]

    def _growth(self, block: Block) -> tuple[str, dict[str, int]]:
        """Events that tell of a block's text, and where in its item that stands."""
        if block.kind == "call":
            return "response.function_call_arguments", {}
        if block.kind == "text":
            return "response.output_text", {"content_index": 0}
        if self._as_summary:
            return "response.reasoning_summary_text", {"summary_index": 0}
        return "response.reasoning_text", {"content_index": 0}

    def _part_events(self, block: Block, what: str, item: dict[str, Any]) -> list[Event]:
        """An item of text has its text in a part of its own."""
        if block.kind == "call":
            return []
        _, place = self._growth(block)
        kind = "response.reasoning_summary_part" if "summary_index" in place else "response.content_part"
        part = self._part(block, "" if what == "added" else block.text)
        return [self._event(f"{kind}.{what}", **item, **place, part=part)]

    def _part(self, block: Block, text: str) -> dict[str, Any]:
        if block.kind == "text":
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"type": "summary_text" if self._as_summary else "reasoning_text", "text": text}

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        """An item of the output; one in progress is empty, what it holds comes in events."""
        item: dict[str, Any] = {"id": self._item_id(block), "status": status}
        if block.kind == "call":
            arguments = "" if status == "in_progress" else block.text
            return {
                **item,
                "type": "function_call",
                "call_id": block.call_id,
                "name": block.name,
                "arguments": arguments,
            }
        parts = [] if status == "in_progress" else [self._part(block, block.text)]
        if block.kind == "text":
            return {**item, "type": "message", "role": "assistant", "content": parts}
        shown = {"summary": parts} if self._as_summary else {"summary": [], "content": parts}
        kept = packed(block.text) if self._packs_thoughts and status != "in_progress" else None
        return {**item, "type": "reasoning", **shown, "encrypted_content": kept}

    def _item_id(self, block: Block) -> str:
        return f"{_ITEM_IDS[block.kind]}_{self._item_suffix}{block.index:04x}"

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event

    def _response(self, status: str) -> dict[str, Any]:
        """The response as it stands."""
        body, params = self._body, self._plan.params
        done = status != "in_progress"
        items = [self._item(one, "completed" if one.complete else "incomplete") for one in self._blocks.all if done]
        reasoning = body.reasoning
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_at,
            "completed_at": None,
            "status": status,
            "model": self._service.model_name,
            "output": items,
            "usage": None,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "tools": [_tool(tool.model_dump(exclude_none=True)) for tool in body.tools or ()],
            "tool_choice": _plain(body.tool_choice) or "auto",
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "text": {"format": {"type": "text"}, **(_plain(body.text) or {})},
            "reasoning": {
                "effort": reasoning.effort if reasoning else None,
                "summary": reasoning.summary if reasoning else None,
            },
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_logprobs": 0,
            "metadata": body.metadata or {},
            "truncation": "disabled",
            "background": False,
            "store": False,
            "previous_response_id": None,
            "service_tier": "default",
        }


def _logprobs(block: Block) -> dict[str, list[Any]]:
    """Clients insist on the field in events of text."""
    return {"logprobs": []} if block.kind == "text" else {}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {"parameters": None, "strict": None, **tool}


def _plain(value: Any) -> Any:
    return value.model_dump(exclude_none=True) if hasattr(value, "model_dump") else value


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _frame(event: Event) -> bytes:
    return named(event["type"], event)
