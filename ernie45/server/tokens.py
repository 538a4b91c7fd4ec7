"""`/tokenize`, `/detokenize` and `/render`: what the tokenizer and the template make of an input."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from ernie45.errors import RequestError
from ernie45.server.answers import extra_headers, json_answer, service_of
from ernie45.server.body import JsonRoute
from ernie45.server.chat_plan import chat_plan
from ernie45.server.documented import ERRORS
from ernie45.server.schema.chat import ChatRequest
from ernie45.server.schema.tokens import (
    ConversationFields,
    Detokenized,
    DetokenizeRequest,
    Rendered,
    Tokenized,
    TokenizeRequest,
)
from ernie45.server.service import Service

router = APIRouter(route_class=JsonRoute, tags=["tokens"])


@router.post("/tokenize", response_model=Tokenized, responses=ERRORS, summary="Token ids of a text or conversation")
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """Token ids of a text as it stands, or of a conversation as the template writes it."""
    service = service_of(request)
    service.check_model(body.model)
    ids = await service.in_thread(_ids, service, body)
    answer = {"count": len(ids), "max_model_len": service.facts.max_model_len, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [service.tokenizer.token_str(token) for token in ids]
    return json_answer(answer)


@router.post("/detokenize", response_model=Detokenized, responses=ERRORS, summary="Text of token ids")
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """Text of token ids, special tokens included."""
    service = service_of(request)
    service.check_model(body.model)
    text = await service.in_thread(lambda: service.tokenizer.decode(body.tokens, skip_special_tokens=False))
    return json_answer({"prompt": text})


@router.post("/chat/completions/render", response_model=Rendered, responses=ERRORS, summary="What the template writes")
async def render(request: Request, body: ChatRequest) -> Response:
    """What the model would read of a chat request; nothing is generated."""
    service = service_of(request)
    service.check_model(body.model)
    headers = extra_headers(request, body.unknown_fields())
    plan = await service.in_thread(chat_plan, service, body)
    text = service.tokenizer.decode(plan.prompt, skip_special_tokens=False)
    return json_answer({"prompt": text, "token_ids": list(plan.prompt), "count": len(plan.prompt)}, headers)


def _ids(service: Service, body: TokenizeRequest) -> Sequence[int]:
    """The ids of a text, or the prompt of the chat request that the same fields make. Raises: RequestError, ApiError."""
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("prompt and messages exclude each other, and one is needed: send one")
    given = {name: value for name in ConversationFields.model_fields if (value := getattr(body, name)) is not None}
    if body.prompt is None:
        return chat_plan(service, ChatRequest(**given)).prompt
    if given:
        raise RequestError(f"{next(iter(given))} goes with messages, not with prompt: leave it out")
    return service.tokenizer.encode(body.prompt)
