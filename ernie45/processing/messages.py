"""Check chat messages and tools, and bring them into one shape: what every template starts from.

Accepted is OpenAI's form: role, content (text, None beside tool calls, or a list of parts), `tool_calls`,
`tool_call_id`, `name`, and `reasoning_content` for the thoughts of an assistant turn. What is not understood is an
error, never ignored.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ernie45.errors import RequestError
from ernie45.processing.prompt import Shield

ROLES = ("system", "user", "assistant", "tool")
_ALIASES = {"developer": "system"}  # OpenAI's newer name
_FIELDS = frozenset({"role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id"})
_MEDIA = {"image_url": "image", "video_url": "video"}
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\n*(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of content: text, or a picture or video that is processed elsewhere."""

    kind: Literal["text", "image", "video"]
    text: str = ""
    source: Any = None
    """The part as the caller gave it."""


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A function call that the assistant made."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn, checked."""

    idx: int
    role: str
    parts: tuple[Part, ...] = ()
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """The texts of the content, joined."""
        return "".join(part.text for part in self.parts)

    @property
    def media(self) -> tuple[Part, ...]:
        """The parts that are no text."""
        return tuple(part for part in self.parts if part.kind != "text")

    @property
    def caller_values(self) -> list[Any]:
        """Everything that came from the caller and may reach the prompt."""
        calls = [[call.name, call.arguments, call.id] for call in self.tool_calls]
        return [[[part.text, part.source] for part in self.parts], self.reasoning, calls, self.tool_call_id, self.name]

    def with_thought_apart(self) -> "Message":
        """Return the message with a leading `<think>..</think>` of an assistant's content moved to `reasoning`."""
        if self.role != "assistant" or self.reasoning is not None or self.media:
            return self
        found = _THOUGHT.fullmatch(self.text)
        if found is None:
            return self
        thought, answer = found.groups()
        return replace(self, reasoning=thought.strip("\n"), parts=(Part(kind="text", text=answer),))

    def marked(self, mark: str) -> "Message":
        """Return the message with `mark` behind its text.

        Raises: RequestError if it is no turn that a model could go on writing: an assistant's, ending in text.
        """
        where = f"continue_final_message: messages[{self.idx}]"
        if self.role != "assistant":
            raise RequestError(f"{where} is the last one and has the role {self.role}: end with an assistant message")
        if self.tool_calls:
            raise RequestError(f"{where} has tool calls, which are whole: leave them or continue_final_message out")
        if not self.parts or not self.parts[-1].text:
            raise RequestError(f"{where} ends without text: leave it out, and a new turn is begun")
        return replace(self, parts=(*self.parts[:-1], replace(self.parts[-1], text=self.parts[-1].text + mark)))

    def shielded(self, shield: Shield) -> "Message":
        """Return the message with every string protected."""
        calls = (
            ToolCall(name=shield.text(call.name), arguments=shield.value(call.arguments), id=shield.value(call.id))
            for call in self.tool_calls
        )
        parts = (
            Part(kind=part.kind, text=shield.text(part.text), source=shield.value(part.source)) for part in self.parts
        )
        return replace(
            self,
            parts=tuple(parts),
            reasoning=shield.value(self.reasoning),
            tool_calls=tuple(calls),
            tool_call_id=shield.value(self.tool_call_id),
            name=shield.value(self.name),
        )


def check_messages(messages: object) -> list[Message]:
    """Check a conversation. Raises: RequestError with the index of the message at fault."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise RequestError(f"messages must be a list, not {type(messages).__name__}")
    if not messages:
        raise RequestError("messages is empty: send at least one message")
    return [_check_message(message, idx) for idx, message in enumerate(messages)]


def check_tools(tools: object) -> list[dict[str, Any]]:
    """Check tool definitions and wrap bare functions; None counts as no tools. Raises: RequestError with the index."""
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise RequestError(f"tools must be a list, not {type(tools).__name__}")
    return [_check_tool(tool, idx) for idx, tool in enumerate(tools)]


def _check_tool(tool: object, idx: int) -> dict[str, Any]:
    where = f"tools[{idx}]"
    if not isinstance(tool, Mapping):
        raise RequestError(f"{where} must be an object, not {type(tool).__name__}")
    if "function" not in tool:
        tool = {"type": "function", "function": dict(tool)}
    function = tool["function"]
    if tool.get("type", "function") != "function":
        raise RequestError(f"{where}.type is {tool['type']!r}, expected 'function'")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RequestError(f"{where}.function needs a name")
    return {"type": "function", **tool}


def _check_message(message: object, idx: int) -> Message:
    where = f"messages[{idx}]"
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object, not {type(message).__name__}")
    given = {key: value for key, value in message.items() if value is not None and value != []}
    unknown = sorted(str(key) for key in given.keys() - _FIELDS)
    if unknown:
        raise RequestError(f"{where} has the unknown field {unknown[0]!r}, known are {', '.join(sorted(_FIELDS))}")
    role = given.get("role")
    role = _ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise RequestError(f"{where}.role is {given.get('role')!r}, expected one of {', '.join(ROLES)}")
    for field, owners in (
        ("reasoning_content", ("assistant",)),
        ("tool_calls", ("assistant",)),
        ("tool_call_id", ("tool",)),
    ):
        if field in given and role not in owners:
            raise RequestError(f"{where}.{field} belongs to the role {owners[0]}, not to {role}")
    checked = Message(
        idx=idx,
        role=role,
        parts=_check_content(message.get("content"), f"{where}.content"),
        reasoning=_optional_text(given, "reasoning_content", where),
        tool_calls=_check_calls(given.get("tool_calls", []), f"{where}.tool_calls"),
        tool_call_id=_optional_text(given, "tool_call_id", where),
        name=_optional_text(given, "name", where),
    )
    if message.get("content") is None and not checked.tool_calls and checked.reasoning is None:
        raise RequestError(f"{where}.content is missing")
    return checked


def _optional_text(message: Mapping[str, Any], field: str, where: str) -> str | None:
    value = message.get(field)
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{where}.{field} must be text, not {type(value).__name__}")
    return value


def _check_content(content: object, where: str) -> tuple[Part, ...]:
    if content is None:
        return ()
    if isinstance(content, str):
        return (Part(kind="text", text=content),)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RequestError(f"{where} must be text or a list of parts, not {type(content).__name__}")
    return tuple(_check_part(part, f"{where}[{idx}]") for idx, part in enumerate(content))


def _check_part(part: object, where: str) -> Part:
    if not isinstance(part, Mapping):
        raise RequestError(f"{where} must be an object, not {type(part).__name__}")
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{where}.text must be text, not {type(part.get('text')).__name__}")
        return Part(kind="text", text=part["text"])
    if kind not in _MEDIA:
        raise RequestError(f"{where}.type is {kind!r}, expected text, {' or '.join(_MEDIA)}")
    link = part.get(kind)
    address = link.get("url") if isinstance(link, Mapping) else link
    if not isinstance(address, str):
        raise RequestError(f"{where}.{kind} needs a url")
    return Part(kind="image" if kind == "image_url" else "video", source=dict(part))


def _check_calls(calls: object, where: str) -> tuple[ToolCall, ...]:
    if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
        raise RequestError(f"{where} must be a list, not {type(calls).__name__}")
    return tuple(_check_call(call, f"{where}[{idx}]") for idx, call in enumerate(calls))


def _check_call(call: object, where: str) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise RequestError(f"{where} must be an object with a function")
    if call.get("type", "function") != "function":
        raise RequestError(f"{where}.type is {call['type']!r}, expected 'function'")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{where}.function needs a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where}.function.arguments is no JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise RequestError(f"{where}.function.arguments must be an object, not {type(arguments).__name__}")
    return ToolCall(name=name, arguments=dict(arguments), id=_optional_text(call, "id", where))
