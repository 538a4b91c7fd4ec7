"""`POST /chat/completions`."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ernie45.processing.answer_parser import ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallBegun
from ernie45.processing.answer_parser import Event as Part
from ernie45.server.admission import admit
from ernie45.server.answering import Answering, Choice, Delta, Plan, in_chunks
from ernie45.server.answers import json_answer, streamed, unless_gone, usage_body
from ernie45.server.body import JsonRoute
from ernie45.server.chat_plan import chat_plan, text_of
from ernie45.server.documented import ERRORS, JSON_OR_STREAM
from ernie45.server.logprobs import chat_logprobs, prompt_logprobs
from ernie45.server.schema.chat import ChatCompletion, ChatRequest
from ernie45.server.service import Service
from ernie45.server.stream import DONE, data

router = APIRouter(route_class=JsonRoute, tags=["chat"])


@router.post(
    "/chat/completions",
    response_model=ChatCompletion,
    responses={**ERRORS, **JSON_OR_STREAM},
    summary="Answer a conversation",
)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation, whole or (`stream`) as server-sent events that end with `data: [DONE]`."""
    admitted = await admit(request, body, _plans)
    shaper = _Shaper(admitted.service, body, admitted.plan, admitted.answering)
    if body.stream:
        return streamed(request, admitted.answering, shaper.frames(), admitted.headers)
    choices = await unless_gone(request, admitted.answering, admitted.answering.whole())
    return json_answer(shaper.completion(choices), admitted.headers)


def _plans(service: Service, body: ChatRequest) -> list[Plan]:
    return [chat_plan(service, body, context=service.facts.max_model_len)]


class _Shaper:
    """Makes OpenAI's objects of the deltas of one request."""

    def __init__(self, service: Service, body: ChatRequest, plan: Plan, answering: Answering) -> None:
        self._service, self._body, self._plan, self._answering = service, body, plan, answering
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.model_name,
        }
        self._reasoning = body.include_reasoning is not False
        self._legacy = body.functions is not None
        self._echoed = text_of(body.messages[-1]) if body.echo and body.continue_final_message else ""

    def completion(self, choices: list[Choice]) -> dict[str, Any]:
        """The whole answer."""
        answer: dict[str, Any] = {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage_body(self._answering.usage),
        }
        self._add_prompt(answer)
        return answer

    def _choice(self, choice: Choice) -> dict[str, Any]:
        parsed = choice.parsed
        content = self._echoed + parsed.content
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if parsed.reasoning and self._reasoning:
            message["reasoning_content"] = message["reasoning"] = parsed.reasoning
        if parsed.tool_calls:
            calls = [{"name": call.name, "arguments": call.arguments} for call in parsed.tool_calls]
            message["content"] = content or None
            if self._legacy:
                message["function_call"] = calls[0]
            else:
                message["tool_calls"] = [
                    {"id": call.id, "type": "function", "function": function}
                    for call, function in zip(parsed.tool_calls, calls, strict=True)
                ]
        shown: dict[str, Any] = {
            "index": choice.index,
            "message": message,
            "logprobs": chat_logprobs(self._service.tokenizer, choice.logprobs) if self._body.logprobs else None,
            "finish_reason": self._finish_reason(choice.finish_reason),
            "stop_reason": self._body.stop_reason(choice.last.stop_reason),
        }
        if choice.last.finish_detail is not None:
            shown["finish_detail"] = choice.last.finish_detail
        if self._body.return_token_ids:
            shown["token_ids"] = choice.ids
        return shown

    async def frames(self) -> AsyncIterator[bytes]:
        """The answer as events: the role first, then what comes, an end per choice, the usage if asked for."""
        for index in range(self._plan.params.n):
            role = {"role": "assistant", "content": self._echoed}
            yield data(self._chunk([{"index": index, "delta": role, "logprobs": None, "finish_reason": None}]))
        completion_tokens = 0
        first = True
        async for deltas in in_chunks(self._answering.deltas(), self._body.chunk_tokens):
            completion_tokens += sum(len(delta.piece.ids) for delta in deltas)
            for shown in self._shown(deltas):
                chunk = self._chunk([shown])
                if first:
                    first = False
                    self._add_prompt(chunk)
                if self._body.wants_running_usage:
                    chunk["usage"] = {
                        "prompt_tokens": len(self._plan.prompt),
                        "completion_tokens": completion_tokens,
                        "total_tokens": len(self._plan.prompt) + completion_tokens,
                    }
                yield data(chunk)
        if self._body.wants_usage:
            yield data({**self._chunk([]), "usage": usage_body(self._answering.usage)})
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk: dict[str, Any] = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        if self._body.wants_usage:
            chunk["usage"] = None
        return chunk

    def _add_prompt(self, answer: dict[str, Any]) -> None:
        """What was asked for of the prompt: to the whole answer, or to the first chunk."""
        if self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(self._service.tokenizer, self._answering.scores[0])
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = list(self._plan.prompt)

    def _shown(self, deltas: list[Delta]) -> list[dict[str, Any]]:
        """A choice's parts of chunks: what is new of it, then its end; none while nothing can be shown, as for half a character.

        The end is apart, with nothing beside it, as OpenAI's is: clients may stop reading a choice where they see its reason.
        """
        last = deltas[-1]
        delta = self._delta([part for one in deltas for part in one.parts])
        shown = []
        if delta or self._body.logprobs or self._body.return_token_ids:
            news: dict[str, Any] = {"index": last.index, "delta": delta, "logprobs": None, "finish_reason": None}
            if self._body.logprobs:
                logprobs = [logprob for one in deltas for logprob in one.piece.logprobs]
                news["logprobs"] = chat_logprobs(self._service.tokenizer, logprobs)
            if self._body.return_token_ids:
                news["token_ids"] = [token for one in deltas for token in one.piece.ids]
            shown.append(news)
        if last.finish_reason is not None:
            end: dict[str, Any] = {
                "index": last.index,
                "delta": {},
                "logprobs": None,
                "finish_reason": self._finish_reason(last.finish_reason),
                "stop_reason": self._body.stop_reason(last.piece.stop_reason),
            }
            if last.finish_detail is not None:
                end["finish_detail"] = last.finish_detail
            shown.append(end)
        return shown

    def _delta(self, parts: list[Part]) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        calls: list[dict[str, Any]] = []
        for part in parts:
            match part:
                case ContentDelta():
                    delta["content"] = delta.get("content", "") + part.text
                case ReasoningDelta() if self._reasoning:
                    delta["reasoning_content"] = delta["reasoning"] = delta.get("reasoning", "") + part.text
                case ToolCallBegun():
                    function = {"name": part.name, "arguments": ""}
                    calls.append({"index": part.index, "id": part.id, "type": "function", "function": function})
                case ArgumentsDelta() if calls and calls[-1]["index"] == part.index:
                    calls[-1]["function"]["arguments"] += part.text
                case ArgumentsDelta():
                    calls.append({"index": part.index, "function": {"arguments": part.text}})
        if calls and self._legacy:
            delta["function_call"] = calls[0]["function"]
        elif calls:
            delta["tool_calls"] = calls
        return delta

    def _finish_reason(self, reason: str) -> str:
        return "function_call" if reason == "tool_calls" and self._legacy else reason
