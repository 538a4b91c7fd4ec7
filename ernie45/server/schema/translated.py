"""What the interfaces share whose requests are translated into chat requests: Responses and Anthropic's messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ernie45.server.errors import ApiError
from ernie45.server.schema.chat import ChatRequest
from ernie45.server.schema.shared import SharedFields


class TranslatedFields(SharedFields):
    """Fields of chat that the published interfaces lack, and the account of those that nobody knows."""

    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}
    """By name: values that ask for nothing, and what to do instead of sending others."""
    harmless: ClassVar[frozenset[str]] = frozenset()
    """Known, and of no consequence here."""

    model: str | None = None
    stream: bool | None = None

    @property
    def extensions(self) -> dict[str, Any]:
        """The fields that mean what they mean in chat, and pass as they are."""
        return {name: getattr(self, name) for name in SharedFields.model_fields}

    def unknown_fields(self) -> list[str]:
        """Fields that are ignored, to be named in a warning header. Raises: ApiError for those that cannot be honoured."""
        unknown = []
        for name, value in (self.model_extra or {}).items():
            if name in self.harmless:
                continue
            if name in self.refused:
                nothing, remedy = self.refused[name]
                if value not in nothing:
                    raise _unsupported(f"{name} is not supported: {remedy}", name)
            elif name in ChatRequest.model_fields:
                if value is not None:
                    raise _unsupported(f"{name} is a field of /chat/completions, not of this route: leave it out", name)
            else:
                unknown.append(name)
        return unknown


def tag_of(value: Any, default: str = "") -> str:
    """Tells the members of a union by their `type`; the sign in front keeps the tag out of the paths that errors show."""
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return f"={kind or default}"


def _unsupported(message: str, name: str) -> ApiError:
    return ApiError(400, message, code="unsupported_parameter", param=name)
