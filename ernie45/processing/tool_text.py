"""Tools for chat templates that have none: everything about them is written into the texts of ordinary messages.

The checkpoint's template then writes those messages as always, so its roles, markers and trimming stay its own. The list
and the way to call stand in the system text, calls and results in the form that most open models were trained on:

    <tool_call>
    {"name": .., "arguments": {..}}
    </tool_call>

A result is a `<tool_response>` in a user's turn, since a template without tools need not know a role for it. All texts are
shielded before they come here: what a caller spells like a tag never becomes a special token.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ernie45.processing.messages import Message, Part, ToolCall


def instructions(tools: Sequence[dict[str, Any]]) -> str:
    """What the system text says about the tools."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        "# Tools\n\n"
        "These functions are at your service, each described by one line of JSON:\n"
        f"<tools>\n{listed}\n</tools>\n\n"
        "When one of them helps with the request, call it by writing\n"
        '<tool_call>\n{"name": "its name", "arguments": {"parameter": "value"}}\n</tool_call>\n'
        "with a block of its own for every call. What it returns comes back to you as <tool_response>.\n"
        "When none of them helps, answer in plain text."
    )


def mentions_tools(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> bool:
    """Whether the conversation needs any of this."""
    return bool(tools) or any(message.tool_calls or message.role == "tool" for message in messages)


def without_tools(messages: Sequence[Message], tools: Sequence[dict[str, Any]], default_system: str) -> list[Message]:
    """Write tools, calls and results into texts.

    Args: default_system: what the template would say in place of a missing system text; it stays.
    """
    out: list[Message] = []
    for message in messages:
        if message.role == "tool" and out and out[-1].role == "tool":
            out[-1] = replace(out[-1], parts=(*out[-1].parts, _text("\n"), *_result(message)))
        elif message.role == "tool":
            out.append(replace(message, parts=_result(message), tool_call_id=None, name=None))
        else:
            out.append(_with_calls(message))
    # Results keep their role up to here, so that only they are put together.
    out = [replace(message, role="user") if message.role == "tool" else message for message in out]
    if not tools:
        return out
    said = instructions(tools)
    if out[0].role == "system":
        head = replace(out[0], parts=(*out[0].parts, _text(f"\n\n{said}" if out[0].text else said)))
        return [head, *out[1:]]
    whole = f"{default_system}\n\n{said}" if default_system else said
    return [Message(idx=0, role="system", parts=(_text(whole),)), *out]


def call_json(call: ToolCall) -> str:
    """A call as models write it."""
    return json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)


def _result(message: Message) -> tuple[Part, ...]:
    return (_text("<tool_response>\n"), *message.parts, _text("\n</tool_response>"))


def _with_calls(message: Message) -> Message:
    if not message.tool_calls:
        return message
    calls = "\n".join(f"<tool_call>\n{call_json(call)}\n</tool_call>" for call in message.tool_calls)
    parts = (*message.parts, _text(f"\n{calls}" if message.text else calls))
    return replace(message, parts=parts, tool_calls=())


def _text(text: str) -> Part:
    return Part(kind="text", text=text)
