"""`/responses`: the request, and the response object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from ernie45.server.schema.sampling import ReasoningEffort
from ernie45.server.schema.shared import MAX_MESSAGES, MAX_PARTS, Count, Length, StopString, StopStrings, TopP
from ernie45.server.schema.translated import TranslatedFields, tag_of

_NOT_STORED = "nothing is stored here, send the whole conversation as input"


class InputText(BaseModel):
    """Text, of whoever has the turn."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["input_text", "output_text"]
    text: str


class ThoughtText(BaseModel):
    """Text of a thought."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["reasoning_text", "summary_text"]
    text: str


_Thoughts = Annotated[list[ThoughtText], Field(max_length=MAX_PARTS)]


class InputRefusal(BaseModel):
    """What an assistant would not do."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["refusal"]
    refusal: str


class InputImage(BaseModel):
    """A picture."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["input_image"]
    image_url: str


InputPart = Annotated[
    Annotated[InputText, Tag("=input_text")]
    | Annotated[InputText, Tag("=output_text")]
    | Annotated[InputRefusal, Tag("=refusal")]
    | Annotated[InputImage, Tag("=input_image")],
    Discriminator(
        tag_of,
        custom_error_type="unknown_part",
        custom_error_message="Expected a part of type input_text, output_text, refusal or input_image",
    ),
]
InputParts = Annotated[list[InputPart], Field(max_length=MAX_PARTS)]


class InputMessage(BaseModel):
    """A turn; `type` may be left out."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | InputParts


class FunctionCallItem(BaseModel):
    """A call that the assistant made."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionCallOutputItem(BaseModel):
    """What a call gave."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function_call_output"]
    call_id: str
    output: str | InputParts


class ReasoningItem(BaseModel):
    """A thought of the assistant. The first that is there counts: content, summary, encrypted_content."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["reasoning"]
    summary: _Thoughts = []
    content: _Thoughts | None = None
    encrypted_content: str | None = None


InputItem = Annotated[
    Annotated[InputMessage, Tag("=message")]
    | Annotated[FunctionCallItem, Tag("=function_call")]
    | Annotated[FunctionCallOutputItem, Tag("=function_call_output")]
    | Annotated[ReasoningItem, Tag("=reasoning")],
    Discriminator(
        lambda value: tag_of(value, "message"),
        custom_error_type="unknown_item",
        custom_error_message="Expected an item of type message, function_call, function_call_output or reasoning",
    ),
]


class FunctionTool(BaseModel):
    """A function that the model may call; tools that a server runs do not exist here."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments."""
    strict: bool | None = None
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None


class NamedFunction(BaseModel):
    """A function by name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    name: str


class AllowedTools(BaseModel):
    """Those of the tools that count for this request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=128)]


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("=word")]
    | Annotated[NamedFunction, Tag("=function")]
    | Annotated[AllowedTools, Tag("=allowed_tools")],
    Discriminator(
        lambda value: "=word" if isinstance(value, str) else tag_of(value),
        custom_error_type="unknown_choice",
        custom_error_message="Expected none, auto, required, or an object of type function or allowed_tools",
    ),
]


class TextFormat(BaseModel):
    """What the text of the answer keeps to."""

    model_config = ConfigDict(extra="forbid", strict=True, serialize_by_alias=True)

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextSettings(BaseModel):
    """How the text of the answer is."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningSettings(BaseModel):
    """How the model thinks."""

    model_config = ConfigDict(extra="forbid", strict=True)

    effort: ReasoningEffort | None = None
    summary: Literal["auto", "detailed"] | None = None
    """Either gives the thought as it is, as `summary`; without, it is the item's `content`."""
    generate_summary: Literal["auto", "detailed"] | None = None
    """The older name of summary."""
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None

    @property
    def as_summary(self) -> bool:
        """Whether thoughts go out as summaries."""
        return self.summary is not None or self.generate_summary is not None


Include = Literal[
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
"""All but the first are about tools and inputs that never occur here."""


class ResponsesRequest(TranslatedFields):
    """A conversation to go on with. Nothing of it is kept."""

    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "access_programs": ((None,), "leave it out"),
        "background": ((None, False), "responses are answered while the client waits, use stream"),
        "background_options": ((None,), "leave it out"),
        "context_management": ((None, []), "shorten the input"),
        "conversation": ((None,), _NOT_STORED),
        "image": ((None,), "leave it out"),
        "moderation": ((None,), "leave it out"),
        "previous_response_id": ((None,), _NOT_STORED),
        "prompt": ((None,), "send the text itself as input and instructions"),
        "service_tier": ((None, "auto", "default"), "leave it out"),
        "top_logprobs": ((None, 0), "/chat/completions has log-probabilities"),
        "truncation": ((None, "disabled"), "nothing is cut here, shorten the input"),
    }
    harmless: ClassVar[frozenset[str]] = frozenset(
        {
            "max_tool_calls",  # of tools that the server runs, of which there are none
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "stream_options",  # padding against eavesdroppers, which is not sent
            "user",
        }
    )

    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    max_output_tokens: Length | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: TopP | None = None
    include: list[Include] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    store: bool | None = None
    """Accepted, and answered with `store: false`: nothing is kept."""
    stop: StopString | StopStrings | None = None
    reasoning_max_tokens: Count | None = None
    """Most tokens of the thought."""


class InputTokens(BaseModel):
    """How many tokens an input has."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class IncompleteDetails(BaseModel):
    """Why a response is not complete."""

    reason: Literal["max_output_tokens"]


class InputTokensDetails(BaseModel):
    """Of the input's tokens."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(BaseModel):
    """Of the output's tokens."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """What a response took, counted by the engine."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class OutputItem(BaseModel):
    """A thought, a message or a call."""

    model_config = ConfigDict(extra="allow")

    id: str
    type: Literal["reasoning", "message", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"]


class ResponseObject(BaseModel):
    """The whole response."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[OutputItem]
    usage: ResponseUsage
    incomplete_details: IncompleteDetails | None
    error: None = None
    store: Literal[False]
