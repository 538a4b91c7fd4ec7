"""From a request for a response to what the engine is asked, by way of a chat request."""

from __future__ import annotations

from typing import Any

from ernie45.server.answering import Plan
from ernie45.server.errors import ApiError
from ernie45.server.opaque import unpacked
from ernie45.server.schema.responses import (
    AllowedTools,
    FunctionCallItem,
    FunctionCallOutputItem,
    FunctionTool,
    InputImage,
    InputItem,
    InputMessage,
    InputPart,
    InputRefusal,
    NamedFunction,
    ReasoningItem,
    ResponsesRequest,
    TextFormat,
    ToolChoice,
)
from ernie45.server.service import Service
from ernie45.server.translation import Conversation, Names, translated_plan

_NAMES = {
    "messages": "input",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "reasoning_content": "a reasoning item",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
}


def responses_plan(service: Service, body: ResponsesRequest, *, context: int | None = None) -> Plan:
    """Check, translate, render, encode; beside the event loop and with the arguments of `chat_plan`, whose errors it raises."""
    conversation = Conversation()
    if body.instructions:
        conversation.add("instructions", "system", content=body.instructions)
    if isinstance(body.input, str):
        conversation.add("input", "user", content=body.input)
    else:
        for idx, item in enumerate(body.input):
            _add_item(conversation, f"input[{idx}]", item)
    tools = allowed_tools(body)
    choice = body.tool_choice
    fields = {
        **body.extensions,
        "messages": conversation.messages,
        "tools": [_tool(tool) for _, tool in tools] or None,
        "tool_choice": _choice(choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _response_format(body.text.format) if body.text and body.text.format else None,
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "reasoning_max_tokens": body.reasoning_max_tokens,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "stop": body.stop,
        "metadata": body.metadata,
    }
    names = Names(fields=_NAMES, conversation=conversation, tools=[f"tools[{idx}]" for idx, _ in tools])
    return translated_plan(service, fields, names, context)


def allowed_tools(body: ResponsesRequest) -> list[tuple[int, FunctionTool]]:
    """The tools that may be called, with their places in the request. Raises: ApiError for a choice among others."""
    tools = list(enumerate(body.tools or ()))
    if not isinstance(body.tool_choice, AllowedTools):
        return tools
    known = {tool.name for _, tool in tools}
    allowed = [one.name for one in body.tool_choice.tools]
    missing = next((name for name in allowed if name not in known), None)
    if missing is not None:
        raise ApiError(
            400,
            f"tool_choice.tools names {missing!r}, which is not among the tools: {', '.join(sorted(known)) or 'none'}",
            code="invalid_value",
            param="tool_choice.tools",
        )
    return [(idx, tool) for idx, tool in tools if tool.name in allowed]


def _add_item(conversation: Conversation, place: str, item: InputItem) -> None:
    """Items of the assistant that follow each other are one turn: a thought, a text, calls."""
    match item:
        case ReasoningItem():
            thought = _thought(item)
            if thought:
                _assistant(conversation, place, before=("content", "tool_calls"))["reasoning_content"] = thought
        case InputMessage(role="assistant"):
            turn = _assistant(conversation, place, before=("tool_calls",))
            turn.setdefault("content", []).extend(_parts(item.content))
        case InputMessage():
            conversation.add(place, item.role, content=_parts(item.content))
        case FunctionCallItem():
            _assistant(conversation, place, before=())
            conversation.add_call(place, item.call_id, item.name, item.arguments)
        case FunctionCallOutputItem():
            conversation.add(place, "tool", tool_call_id=item.call_id, content=_parts(item.output))


def _assistant(conversation: Conversation, place: str, before: tuple[str, ...]) -> dict[str, Any]:
    """The assistant's turn that goes on, or a new one. Args: before: what cannot stand in front of the item."""
    last = conversation.messages[-1] if conversation.messages else None
    if last is None or last["role"] != "assistant" or any(field in last for field in before):
        return conversation.add(place, "assistant")
    return last


def _thought(item: ReasoningItem) -> str:
    shown = "".join(part.text for part in item.content or item.summary)
    return shown or unpacked(item.encrypted_content) or ""


def _parts(content: str | list[InputPart]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [_part(part) for part in content]


def _part(part: InputPart) -> dict[str, Any]:
    match part:
        case InputImage():
            return {"type": "image_url", "image_url": {"url": part.image_url}}
        case InputRefusal():
            return {"type": "text", "text": part.refusal}
        case _:
            return {"type": "text", "text": part.text}


def _tool(tool: FunctionTool) -> dict[str, Any]:
    function = tool.model_dump(include={"name", "description", "parameters", "strict"}, exclude_none=True)
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice | None) -> Any:
    match choice:
        case NamedFunction():
            return {"type": "function", "function": {"name": choice.name}}
        case AllowedTools():
            return choice.mode
        case _:
            return choice


def _response_format(wanted: TextFormat) -> dict[str, Any]:
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    inner = {"name": wanted.name, "schema": wanted.json_schema, "strict": wanted.strict}
    return {"type": "json_schema", "json_schema": inner}
