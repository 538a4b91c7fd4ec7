"""From the fields of a chat request to a plan, for routes whose clients wrote another one: errors name the fields that they sent."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from ernie45.errors import RequestError
from ernie45.server.answering import Plan
from ernie45.server.body import invalid
from ernie45.server.chat_plan import chat_plan
from ernie45.server.errors import ApiError
from ernie45.server.schema.chat import ChatRequest
from ernie45.server.service import Service

_MESSAGE = re.compile(r"\bmessages\[(\d+)\](?:\.tool_calls\[(\d+)\](?:\.function\b)?)?")
_TOOL = re.compile(r"\btools\[(\d+)\](?:\.function\b(\.parameters\b)?)?")


@dataclass(kw_only=True)
class Conversation:
    """Messages of a chat request while they are put together, each with the place that it comes from."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    call_places: list[list[str]] = field(default_factory=list)
    """By message."""

    def add(self, place: str, role: str, **fields: Any) -> dict[str, Any]:
        """A message more."""
        message = {"role": role, **fields}
        self.messages.append(message)
        self.places.append(place)
        self.call_places.append([])
        return message

    def add_call(self, place: str, call_id: str, name: str, arguments: str) -> None:
        """A call more in the last message."""
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self.messages[-1].setdefault("tool_calls", []).append(call)
        self.call_places[-1].append(place)


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the fields of a chat request are called in the request that it was made of."""

    fields: Mapping[str, str]
    conversation: Conversation
    tools: Sequence[str] = ()
    """Place of each."""
    parameters: str = "parameters"
    """Where a tool has the schema of its arguments."""

    def renamed(self, text: str) -> str:
        """A message, or a path, in the client's words."""
        text = _TOOL.sub(self._tool, _MESSAGE.sub(self._message, text))
        for ours, theirs in self.fields.items():
            text = re.sub(rf"(?<![\w.]){re.escape(ours)}(?![\w\[])", theirs, text)
        return text

    def _message(self, found: re.Match[str]) -> str:
        idx = int(found[1])
        if idx >= len(self.conversation.places):
            return found[0]
        calls = self.conversation.call_places[idx]
        if found[2] is None or int(found[2]) >= len(calls):
            return self.conversation.places[idx]
        return calls[int(found[2])]

    def _tool(self, found: re.Match[str]) -> str:
        idx = int(found[1])
        if idx >= len(self.tools):
            return found[0]
        return f"{self.tools[idx]}.{self.parameters}" if found[2] else self.tools[idx]


def translated_plan(service: Service, fields: Mapping[str, Any], names: Names, context: int | None) -> Plan:
    """The plan of a chat request with these fields.

    Args: context: as for `chat_plan`. Raises: RequestError, ApiError in the client's words.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        plan = chat_plan(service, ChatRequest.model_validate(given), context=context)
    except ValidationError as error:
        raise _renamed(invalid(RequestValidationError(error.errors())), names) from error
    except ApiError as error:
        raise _renamed(error, names) from error
    except RequestError as error:
        raise type(error)(names.renamed(str(error))) from error
    if plan.constraint is None:
        return plan
    # The engine compiles it, and says where what it cannot compile stands.
    return replace(plan, constraint=replace(plan.constraint, where=names.renamed(plan.constraint.where)))


def _renamed(error: ApiError, names: Names) -> ApiError:
    param = None if error.param is None else names.renamed(error.param)
    return ApiError(error.status, names.renamed(error.message), code=error.code, param=param, headers=error.headers)
