"""`POST /completions`."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ernie45.engine.pieces import Piece, TokenLogprob
from ernie45.engine.prompts import encoded
from ernie45.errors import RequestError
from ernie45.processing.answer_parser import ContentDelta
from ernie45.server.admission import admit
from ernie45.server.answering import Answering, Choice, Plan, in_chunks
from ernie45.server.answers import json_answer, streamed, unless_gone, usage_body
from ernie45.server.body import JsonRoute
from ernie45.server.documented import ERRORS, JSON_OR_STREAM
from ernie45.server.logprobs import completion_logprobs, prompt_logprobs
from ernie45.server.schema.completions import Completion, CompletionRequest
from ernie45.server.schema.sampling import sampling_params
from ernie45.server.service import Service
from ernie45.server.stream import DONE, data

router = APIRouter(route_class=JsonRoute, tags=["completions"])


@router.post(
    "/completions", response_model=Completion, responses={**ERRORS, **JSON_OR_STREAM}, summary="Go on with a text"
)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Go on with a text, or with several, whole or (`stream`) as server-sent events that end with `data: [DONE]`."""
    admitted = await admit(request, body, completion_plans)
    shaper = _Shaper(admitted.service, body, admitted.plans, admitted.answering)
    if body.stream:
        return streamed(request, admitted.answering, shaper.frames(), admitted.headers)
    choices = await unless_gone(request, admitted.answering, admitted.answering.whole())
    return json_answer(shaper.completion(choices), admitted.headers)


def completion_plans(service: Service, body: CompletionRequest) -> list[Plan]:
    """One plan per prompt. Raises: RequestError."""
    tokenizer = service.tokenizer
    scoring = body.max_tokens == 0
    if scoring and not body.echo:
        raise RequestError("max_tokens is 0, expected 1 or more, or echo true to score the prompt")
    params = sampling_params(
        body,
        service.sampling_defaults,
        tokenizer,
        max_tokens=1 if scoring else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=_most(body.prompt_logprobs, body.logprobs if body.echo else None),
        special_tokens="keep" if body.skip_special_tokens is False else None,
    )
    constraint = body.constraint()
    plans = []
    for number, prompt in enumerate(_prompts(body)):
        ids = encoded(tokenizer, prompt, service.facts.max_model_len) if isinstance(prompt, str) else prompt
        if not ids:
            raise RequestError(f"prompt {number} is empty: give at least one token")
        plans.append(
            Plan(
                prompt=tuple(ids),
                params=params,
                constraint=constraint,
                priority=body.priority or 0,
                cache_salt=body.cache_salt,
            )
        )
    return plans


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    return [ids] if ids else [item for item in prompt if not isinstance(item, int)]


def _most(one: int | None, other: int | None) -> int | None:
    return max((value for value in (one, other) if value is not None), default=None)


class _Shaper:
    """Makes OpenAI's objects of the deltas of one request."""

    def __init__(self, service: Service, body: CompletionRequest, plans: Sequence[Plan], answering: Answering) -> None:
        self._service, self._body, self._plans, self._answering = service, body, plans, answering
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
        }
        self._scoring = body.max_tokens == 0

    def completion(self, choices: list[Choice]) -> dict[str, Any]:
        """The whole answer."""
        shown = [
            self._choice(choice.index, choice.parsed.content, choice.pieces, choice.finish_reason, first=True)
            for choice in choices
        ]
        return {**self._head, "choices": shown, "usage": usage_body(self._answering.usage)}

    async def frames(self) -> AsyncIterator[bytes]:
        """The answers as events, interleaved as they come."""
        begun: set[int] = set()
        async for deltas in in_chunks(self._answering.deltas(), self._body.chunk_tokens):
            delta = deltas[-1]
            text = "".join(part.text for one in deltas for part in one.parts if isinstance(part, ContentDelta))
            first = delta.index not in begun
            tells = self._body.logprobs is not None or bool(self._body.return_token_ids)
            if not text and delta.finish_reason is None and not tells and not first:
                continue
            begun.add(delta.index)
            pieces = [one.piece for one in deltas]
            shown = self._choice(delta.index, text, pieces, delta.finish_reason, first=first)
            yield data({**self._head, "choices": [shown]})
        if self._body.wants_usage:
            yield data({**self._head, "choices": [], "usage": usage_body(self._answering.usage)})
        yield DONE

    def _choice(
        self, index: int, text: str, pieces: list[Piece], finish_reason: str | None, *, first: bool
    ) -> dict[str, Any]:
        """A choice, whole or a part of it. The first part of one begins with the prompt, if that is echoed."""
        tokenizer, body = self._service.tokenizer, self._body
        plan = self._plans[index // self._plans[0].params.n]
        scores = self._answering.scores[index // self._plans[0].params.n]
        ids = [] if self._scoring else [token for piece in pieces for token in piece.ids]
        logprobs: list[TokenLogprob | None] = []
        if not self._scoring:
            logprobs += [logprob for piece in pieces for logprob in piece.logprobs]
            shown_text = text
        else:
            shown_text = ""
        if first and body.echo:
            shown_text = (
                tokenizer.decode(plan.prompt, skip_special_tokens=body.skip_special_tokens is not False) + shown_text
            )
            ids = [*plan.prompt, *ids]
            if body.logprobs is not None:
                logprobs = [None, *scores, *logprobs]
        last = pieces[-1]
        shown: dict[str, Any] = {
            "index": index,
            "text": shown_text,
            "logprobs": None if body.logprobs is None else completion_logprobs(tokenizer, logprobs, ids),
            "finish_reason": finish_reason,
        }
        if finish_reason is not None:
            shown["stop_reason"] = body.stop_reason(last.stop_reason)
            if last.finish_detail is not None:
                shown["finish_detail"] = last.finish_detail
        if first and body.prompt_logprobs is not None:
            shown["prompt_logprobs"] = prompt_logprobs(tokenizer, scores)
        if body.return_token_ids:
            shown["token_ids"] = ids
            if first:
                shown["prompt_token_ids"] = list(plan.prompt)
        return shown
