"""From Anthropic's request to what the engine is asked, by way of a chat request."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from ernie45.errors import RequestError
from ernie45.server.answering import Plan
from ernie45.server.errors import ApiError
from ernie45.server.opaque import unpacked
from ernie45.server.schema.messages import (
    Block,
    CountRequest,
    ImageBlock,
    ImageSource,
    MessagesRequest,
    MessageTool,
    MessageToolChoice,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from ernie45.server.service import Service
from ernie45.server.translation import Conversation, Names, translated_plan

_NAMES = {
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
    "reasoning_content": "a thinking block",
    "reasoning_max_tokens": "thinking.budget_tokens",
    "leave them or continue_final_message out": "end with a user turn",
    "leave it or continue_final_message out": "end with a user turn",
    "continue_final_message": "the last turn",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def messages_plan(service: Service, body: CountRequest, *, context: int | None = None) -> Plan:
    """Check, translate, render, encode; beside the event loop and with the arguments of `chat_plan`, whose errors it raises."""
    conversation = Conversation()
    system = body.system if isinstance(body.system, str) else "\n".join(block.text for block in body.system or ())
    if system:
        conversation.add("system", "system", content=system)
    for idx, turn in enumerate(body.messages):
        _add_turn(conversation, f"messages[{idx}]", turn)
    fields = {
        **body.extensions,
        **_thinking(service, body),
        **_tool_choice(body.tool_choice),
        "messages": conversation.messages,
        "tools": [_tool(tool) for tool in body.tools] if body.tools else None,
        "continue_final_message": body.messages[-1].role == "assistant" or None,
        "response_format": _response_format(body),
    }
    if isinstance(body, MessagesRequest):
        fields |= {
            "max_tokens": body.max_tokens,
            "stop": body.stop_sequences,
            "temperature": body.temperature,
            "top_p": body.top_p,
        }
    tools = [f"tools[{idx}]" for idx in range(len(body.tools or ()))]
    names = Names(fields=_NAMES, conversation=conversation, tools=tools, parameters="input_schema")
    return translated_plan(service, fields, names, context)


def within_context(service: Service, plan: Plan) -> Plan:
    """The plan, for as many tokens as the context holds: Anthropic's clients ask for more than they expect, as a matter of course."""
    room = service.facts.max_model_len - len(plan.prompt)
    if plan.params.max_tokens is None or plan.params.max_tokens <= room:
        return plan
    return replace(plan, params=replace(plan.params, max_tokens=None))


def _add_turn(conversation: Conversation, place: str, turn: Turn) -> None:
    blocks: list[Block] = [TextBlock(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content
    if turn.role == "assistant":
        _add_answer(conversation, place, blocks)
        return
    told: list[dict[str, Any]] = []
    for idx, block in enumerate(blocks):
        where = f"{place}.content[{idx}]"
        match block:
            case TextBlock() | ImageBlock():
                told.append(_part(block, where))
            case ToolResultBlock() if turn.role == "user":
                if told:
                    conversation.add(place, turn.role, content=told)
                    told = []
                conversation.add(where, "tool", tool_call_id=block.tool_use_id, content=_result(block, where))
            case _:
                raise RequestError(f"{where} has the type {block.type}, which no turn of the {turn.role} has")
    if told or not blocks:
        conversation.add(place, turn.role, content=told)


def _add_answer(conversation: Conversation, place: str, blocks: list[Block]) -> None:
    message = conversation.add(place, "assistant")
    texts: list[str] = []
    thoughts: list[str] = []
    for idx, block in enumerate(blocks):
        where = f"{place}.content[{idx}]"
        match block:
            case TextBlock():
                texts.append(block.text)
            case ThinkingBlock():
                thoughts.append(block.thinking or unpacked(block.signature) or "")
            case ToolUseBlock():
                conversation.add_call(where, block.id, block.name, json.dumps(block.input, ensure_ascii=False))
            case RedactedThinkingBlock():
                pass
            case _:
                raise RequestError(f"{where} has the type {block.type}, which no turn of the assistant has")
    message["content"] = "".join(texts)
    if thought := "\n".join(filter(None, thoughts)):
        message["reasoning_content"] = thought


def _result(block: ToolResultBlock, where: str) -> list[dict[str, Any]]:
    """A result's content. That it is an error has no place of its own in a chat: the text says it."""
    if isinstance(block.content, str):
        parts = [{"type": "text", "text": block.content}]
    else:
        parts = [_part(part, f"{where}.content[{idx}]") for idx, part in enumerate(block.content or ())]
    if block.is_error:
        parts.insert(0, {"type": "text", "text": "Error: "})
    return parts


def _part(block: TextBlock | ImageBlock, where: str) -> dict[str, Any]:
    if isinstance(block, TextBlock):
        return {"type": "text", "text": block.text}
    return {"type": "image_url", "image_url": {"url": _address(block.source, f"{where}.source")}}


def _address(source: ImageSource, where: str) -> str:
    if source.type == "url" and source.url is not None:
        return source.url
    if source.type == "base64" and source.data is not None and source.media_type is not None:
        return f"data:{source.media_type};base64,{source.data}"
    raise RequestError(f"{where} is {source.type} and needs {'url' if source.type == 'url' else 'media_type and data'}")


def _thinking(service: Service, body: CountRequest) -> dict[str, Any]:
    effort = body.output_config.effort if body.output_config else None
    wanted = body.thinking
    if wanted is None:
        return {"reasoning_effort": effort}
    if (wanted.type == "enabled") != (wanted.budget_tokens is not None):
        raise _invalid(
            f"thinking.budget_tokens is {wanted.budget_tokens} and thinking.type {wanted.type!r}: a budget goes with enabled",
            "thinking.budget_tokens",
        )
    if (
        isinstance(body, MessagesRequest)
        and wanted.budget_tokens is not None
        and wanted.budget_tokens >= body.max_tokens
    ):
        raise _invalid(
            f"thinking.budget_tokens is {wanted.budget_tokens} and max_tokens {body.max_tokens}, which leaves nothing for the "
            "answer: lower the budget or raise max_tokens",
            "thinking.budget_tokens",
        )
    if wanted.type == "disabled":
        return {"enable_thinking": False}
    able = wanted.type == "enabled" or "thinking" in service.tokenizer.capabilities
    return {
        "enable_thinking": True if able else None,
        "reasoning_max_tokens": wanted.budget_tokens,
        "reasoning_effort": effort,
    }


def _tool_choice(choice: MessageToolChoice | None) -> dict[str, Any]:
    if choice is None:
        return {}
    if (choice.type == "tool") != (choice.name is not None):
        raise _invalid(
            f"tool_choice.name is {choice.name!r} and tool_choice.type {choice.type!r}: a name goes with tool",
            "tool_choice.name",
        )
    named = {"type": "function", "function": {"name": choice.name}}
    return {
        "tool_choice": named if choice.type == "tool" else _CHOICES[choice.type],
        "parallel_tool_calls": False if choice.disable_parallel_tool_use else None,
    }


def _tool(tool: MessageTool) -> dict[str, Any]:
    function = tool.model_dump(include={"name", "description", "strict"}, exclude_none=True)
    return {"type": "function", "function": {**function, "parameters": tool.input_schema}}


def _response_format(body: CountRequest) -> dict[str, Any] | None:
    wanted = body.output_config.format if body.output_config else None
    if wanted is None:
        return None
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": wanted.json_schema}}


def _invalid(message: str, param: str) -> ApiError:
    return ApiError(400, message, code="invalid_value", param=param)
