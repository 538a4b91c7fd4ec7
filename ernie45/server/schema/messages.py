"""`/messages` and `/messages/count_tokens`: the requests, and the message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from ernie45.server.schema.shared import MAX_MESSAGES, MAX_PARTS, Length, StopStrings, TopP
from ernie45.server.schema.translated import TranslatedFields, tag_of


class TextBlock(BaseModel):
    """Text. `cache_control`, here and elsewhere, has no effect: all prompts are cached."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["text"]
    text: str


class ImageSource(BaseModel):
    """Where a picture is."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["base64", "url"]
    media_type: str | None = None
    data: str | None = None
    url: str | None = None


class ImageBlock(BaseModel):
    """A picture."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["image"]
    source: ImageSource


class ToolUseBlock(BaseModel):
    """A call that the assistant made."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


def _expected(kinds: str) -> Discriminator:
    return Discriminator(
        tag_of, custom_error_type="unknown_block", custom_error_message=f"Expected a block of type {kinds}"
    )


ResultPart = Annotated[
    Annotated[TextBlock, Tag("=text")] | Annotated[ImageBlock, Tag("=image")], _expected("text or image")
]


class ToolResultBlock(BaseModel):
    """What a call gave."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[ResultPart], Field(max_length=MAX_PARTS)] | None = None
    is_error: bool | None = None


class ThinkingBlock(BaseModel):
    """A thought of the assistant; one without text is read from its signature."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(BaseModel):
    """A thought that only its writer can read: left out."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["redacted_thinking"]
    data: str


Block = Annotated[
    Annotated[TextBlock, Tag("=text")]
    | Annotated[ImageBlock, Tag("=image")]
    | Annotated[ToolUseBlock, Tag("=tool_use")]
    | Annotated[ToolResultBlock, Tag("=tool_result")]
    | Annotated[ThinkingBlock, Tag("=thinking")]
    | Annotated[RedactedThinkingBlock, Tag("=redacted_thinking")],
    _expected("text, image, tool_use, tool_result, thinking or redacted_thinking"),
]


class Turn(BaseModel):
    """A turn. A last one of the assistant is gone on with."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(max_length=MAX_PARTS)]


class MessageTool(BaseModel):
    """A function that the model may call; tools that a server runs do not exist here."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    input_schema: dict[str, Any]
    """JSON schema of the input."""
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    """Stream the input as the model writes it, right or wrong; else it comes when it is complete."""
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None


class MessageToolChoice(BaseModel):
    """Whether there has to be a call."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingSettings(BaseModel):
    """Whether the model thinks, and how long."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Length | None = None
    display: Literal["summarized", "omitted"] | None = None
    """summarized: the thought as it is. omitted: without its text."""


class JsonFormat(BaseModel):
    """JSON that satisfies a schema."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]


class OutputSettings(BaseModel):
    """What the answer is like."""

    model_config = ConfigDict(extra="forbid", strict=True)

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class MessageMetadata(BaseModel):
    """About the request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    user_id: Annotated[str, Field(max_length=256)] | None = None
    """Of no consequence here."""


class CountRequest(TranslatedFields):
    """A conversation."""

    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "container": ((None,), "leave it out"),
        "context_management": ((None,), "shorten the messages"),
        "inference_geo": ((None,), "leave it out"),
        "mcp_servers": ((None, []), "call them yourself, and offer what they have as tools"),
        "output_format": ((None,), "send output_config.format"),
        "service_tier": ((None, "auto", "standard_only"), "leave it out"),
        "speed": ((None, "standard"), "leave it out"),
    }
    harmless: ClassVar[frozenset[str]] = frozenset(
        {"cache_control", "diagnostics", "user_profile_id", "workspace_id", "betas"}
    )

    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | Annotated[list[TextBlock], Field(max_length=MAX_PARTS)] | None = None
    tools: Annotated[list[MessageTool], Field(max_length=128)] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: ThinkingSettings | None = None
    output_config: OutputSettings | None = None


class MessagesRequest(CountRequest):
    """A conversation to go on with."""

    max_tokens: Length
    """Where the context ends earlier, so does the message, with the stop reason model_context_window_exceeded."""
    stop_sequences: StopStrings | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: TopP | None = None
    metadata: MessageMetadata | None = None


class TokenCount(BaseModel):
    """How many tokens a conversation has."""

    input_tokens: int


class ThinkingTokens(BaseModel):
    """Of the output's tokens."""

    thinking_tokens: int


class MessageUsage(BaseModel):
    """What a message took, counted by the engine; the input is the sum of the three counts of it."""

    input_tokens: int
    """Computed: neither read from the cache nor counted as written to it."""
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens


class AnswerBlock(BaseModel):
    """A thought, a text or a call."""

    model_config = ConfigDict(extra="allow")

    type: Literal["thinking", "text", "tool_use"]


class MessageObject(BaseModel):
    """The whole message."""

    model_config = ConfigDict(extra="allow")

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
    stop_sequence: str | None
    usage: MessageUsage


class MessageErrorDetail(BaseModel):
    """What is wrong."""

    type: str
    message: str


class MessageErrorBody(BaseModel):
    """Every error answer."""

    type: Literal["error"]
    error: MessageErrorDetail
    request_id: str | None = None
