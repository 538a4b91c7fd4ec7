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

_LISTED = re.compile(r"\b(messages|tools)\[(\d+)\](?:\.function\b(\.parameters\b)?)?")


@dataclass(kw_only=True)
class Conversation:
    """Messages of a chat request while they are put together, each with the place that it comes from."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def add(self, place: str, role: str, **fields: Any) -> dict[str, Any]:
        """A message more."""
        message = {"role": role, **fields}
        self.messages.append(message)
        self.places.append(place)
        return message


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the fields of a chat request are called in the request that it was made of."""

    fields: Mapping[str, str]
    messages: Sequence[str]
    """Place of each."""
    tools: Sequence[str] = ()
    parameters: str = "parameters"
    """Where a tool has the schema of its arguments."""

    def renamed(self, text: str) -> str:
        """A message, or a path, in the client's words."""

        def place(found: re.Match[str]) -> str:
            places, idx = (self.messages if found[1] == "messages" else self.tools), int(found[2])
            if idx >= len(places):
                return found[0]
            return f"{places[idx]}.{self.parameters}" if found[3] else places[idx]

        text = _LISTED.sub(place, text)
        for ours, theirs in self.fields.items():
            text = re.sub(rf"(?<![\w.]){re.escape(ours)}(?!\w)", theirs, text)
        return text


def translated_plan(service: Service, fields: Mapping[str, Any], names: Names) -> Plan:
    """The plan of a chat request with these fields. Raises: RequestError, ApiError in the client's words."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        plan = chat_plan(service, ChatRequest.model_validate(given))
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
