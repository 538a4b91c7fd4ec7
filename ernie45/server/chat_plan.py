"""From a chat request to what the engine is asked: messages, tools, thinking, constraint, sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ernie45.engine.params import SamplingParams
from ernie45.engine.prompts import encoded
from ernie45.errors import RequestError
from ernie45.processing.constraint import Constraint
from ernie45.server.answering import Plan, Reading
from ernie45.server.errors import ApiError
from ernie45.server.schema.chat import ChatMessage, ChatRequest, FunctionDefinition, FunctionName, NamedToolChoice
from ernie45.server.schema.sampling import sampling_params
from ernie45.server.service import Service
from ernie45.server.thinking import wants_thinking

_ECHOED = ("annotations", "cache_control", "parsed", "provider_specific_fields")
"""Fields of a message that say nothing to a model: parts of answers, which clients send back, and hints at caches."""


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """What the request says about tools."""

    tools: tuple[dict[str, Any], ...] = ()
    """In OpenAI's form; empty if none may be called."""
    choice: str = "auto"
    """auto, required, or `name` for the tool `name`."""
    name: str | None = None
    parallel: bool = True

    @property
    def forced(self) -> bool:
        """Whether there must be a call."""
        return self.choice != "auto"


def chat_plan(service: Service, request: ChatRequest, *, context: int | None = None) -> Plan:
    """Check, render, encode. Takes the processor for some milliseconds: run it beside the event loop.

    Args: context: tokens that prompt and answer may have together; None where nothing is generated.
    Raises: RequestError, ApiError; ContextLengthError where the prompt alone is clearly too long.
    """
    tool_use = tools_of(request)
    thinking, budget = wants_thinking(request)
    messages = [as_message(message) for message in request.messages]
    tokenizer = service.tokenizer
    if request.prompt_token_ids is not None:
        prompt = request.prompt_token_ids
    else:
        rendered = tokenizer.render(
            messages,
            tools=tool_use.tools or None,
            thinking=thinking,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=bool(request.continue_final_message),
        )
        prompt = encoded(tokenizer, rendered, context)
    begun = text_of(request.messages[-1]) if request.continue_final_message else None
    reading = Reading(
        format=tokenizer.answer_format,
        start=tokenizer.answer_start(prompt) if begun is None else "text",
        tools=bool(tool_use.tools),
        parallel_calls=tool_use.parallel or tool_use.forced,  # where a grammar forces a call, it stops after one
    )
    return Plan(
        prompt=tuple(prompt),
        params=_params(service, request, budget),
        reading=reading,
        constraint=_constraint(request, tool_use),
        begun=begun,
        priority=request.priority or 0,
        cache_salt=request.cache_salt,
    )


def tools_of(request: ChatRequest) -> ToolUse:
    """Tools and the choice among them, in either of the two spellings. Raises: ApiError."""
    if request.functions is not None and request.tools is not None:
        raise ApiError(
            400, "functions and tools exclude each other: send tools", code="invalid_value", param="functions"
        )
    functions = request.functions if request.functions is not None else [tool.function for tool in request.tools or ()]
    choice: Any = request.function_call if request.functions is not None else request.tool_choice
    if not functions:
        if choice not in (None, "none", "auto"):
            raise ApiError(
                400, "tool_choice forces a call, but there are no tools", code="invalid_value", param="tool_choice"
            )
        return ToolUse()
    if choice == "none":
        return ToolUse()
    name = choice.function.name if isinstance(choice, NamedToolChoice) else None
    name = choice.name if isinstance(choice, FunctionName) else name
    parallel = request.functions is None and request.parallel_tool_calls is not False and name is None
    tools = tuple(_as_tool(function) for function in functions)
    return ToolUse(tools=tools, choice="named" if name else choice or "auto", name=name, parallel=parallel)


def as_message(message: ChatMessage) -> dict[str, Any]:
    """A message as the tokenizer takes it: older and other spellings replaced by OpenAI's present one."""
    plain = message.model_dump(exclude_none=True, exclude=set(_ECHOED))
    thought = plain.pop("reasoning", None)
    if thought is not None:
        plain.setdefault("reasoning_content", thought)
    called = plain.pop("function_call", None)
    if called is not None:
        plain["tool_calls"] = [*plain.get("tool_calls", []), {"type": "function", "function": called}]
    if plain["role"] == "function":
        plain["role"] = "tool"
    return plain


def text_of(message: ChatMessage) -> str:
    """The text of a message's content."""
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text or "" for part in message.content or ())


def _as_tool(function: FunctionDefinition) -> dict[str, Any]:
    return {"type": "function", "function": function.model_dump(exclude_none=True)}


def _constraint(request: ChatRequest, tool_use: ToolUse) -> Constraint | None:
    asked = request.constraint()
    if not tool_use.forced:
        if asked is not None and tool_use.tools:
            return Constraint.calls_or(tool_use.tools, asked, parallel=tool_use.parallel)
        strict = any(tool["function"].get("strict") for tool in tool_use.tools)
        if strict:
            return Constraint.tool_calls(tool_use.tools, parallel=tool_use.parallel, required=False)
        return asked
    if asked is not None:
        raise RequestError(f"tool_choice forces a call and {asked.where} the text of the answer: send one")
    return Constraint.tool_calls(tool_use.tools, tool_use.name, parallel=tool_use.parallel)


def _params(service: Service, request: ChatRequest, budget: int | None) -> SamplingParams:
    wanted = request.max_completion_tokens
    if wanted is not None and request.max_tokens not in (None, wanted):
        raise RequestError(f"max_completion_tokens {wanted} and max_tokens {request.max_tokens} differ: send one")
    if request.top_logprobs and not request.logprobs:
        raise RequestError(f"top_logprobs is {request.top_logprobs}, but logprobs is not true: set it")
    return sampling_params(
        request,
        service.sampling_defaults,
        service.tokenizer,
        max_tokens=request.max_tokens if wanted is None else wanted,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        reasoning_max_tokens=budget,
        response_max_tokens=request.response_max_tokens,
        special_tokens="keep" if request.skip_special_tokens is False else "answer_tags",
    )
