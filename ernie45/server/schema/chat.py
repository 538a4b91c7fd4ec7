"""`/chat/completions`: the request, and the answer whole and in chunks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ernie45.engine.params import MAX_LOGPROBS
from ernie45.server.schema.sampling import ReasoningEffort, SamplingFields
from ernie45.server.schema.shared import MAX_MESSAGES, MAX_PARTS, Count, Length, TokenId


class ContentPart(BaseModel):
    """A piece of content."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["text", "image_url", "video_url"]
    text: str | None = None
    image_url: dict[str, Any] | str | None = None
    video_url: dict[str, Any] | str | None = None


class CalledFunction(BaseModel):
    """What a call calls."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    arguments: str | dict[str, Any] | None = None
    """JSON text of an object."""


class ToolCall(BaseModel):
    """A call that the assistant made."""

    model_config = ConfigDict(extra="allow", strict=True)

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """One turn. Fields that a template cannot express are refused when it is rendered."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], Field(max_length=MAX_PARTS)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=256)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """Another spelling of reasoning_content."""
    function_call: CalledFunction | None = None
    """The older form of a single call."""


class FunctionDefinition(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments."""
    strict: bool | None = None


class Tool(BaseModel):
    """A tool; functions are the only kind."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"] = "function"
    function: FunctionDefinition


class FunctionName(BaseModel):
    """A function by name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str


class NamedToolChoice(BaseModel):
    """The one tool to call."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: FunctionName


class ChatTemplateKwargs(BaseModel):
    """What reaches the template beside the messages."""

    model_config = ConfigDict(extra="forbid", strict=True)

    enable_thinking: bool | None = None
    thinking: bool | None = None
    options: dict[str, Any] | None = None
    """`thinking_mode`: open or close."""


class ChatRequest(SamplingFields):
    """A conversation to go on with."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Length | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[FunctionDefinition], Field(max_length=128)] | None = None
    """The older form of tools."""
    function_call: Literal["none", "auto"] | FunctionName | None = None
    """The older form of tool_choice."""
    enable_thinking: bool | None = None
    include_reasoning: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    reasoning_max_tokens: Count | None = None
    thinking_token_budget: Count | None = None
    """Another spelling of reasoning_max_tokens."""
    response_max_tokens: Length | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None
    """Begin the answer with the text of the last message, where that is continued."""
    prompt_token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    """Used in place of the rendered messages."""


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """Of the answer's tokens."""

    reasoning_tokens: int
    accepted_prediction_tokens: int = 0
    """Guesses of speculation that were right."""
    rejected_prediction_tokens: int = 0


class UsageModel(BaseModel):
    """What a request took, counted by the engine."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(BaseModel):
    """An alternative."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobModel(TopLogprob):
    """A token with its alternatives."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """One entry per token."""

    content: list[TokenLogprobModel] | None
    refusal: None = None


class AnswerFunction(BaseModel):
    """The call as the model wrote it."""

    name: str
    arguments: str


class AnswerToolCall(BaseModel):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: AnswerFunction


class AnswerMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[AnswerToolCall] | None = None
    function_call: AnswerFunction | None = None


class ChatChoice(BaseModel):
    """One of the answers."""

    model_config = ConfigDict(extra="allow")

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"]
    stop_reason: str | int | None = None
    """The stop string or stop id that was met."""
    finish_detail: str | None = None
    """`loop`: ended because it repeated itself."""
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """The whole answer."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageModel
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None
    request_id: str | None = None


class ErrorBody(BaseModel):
    """Every error answer."""

    error: ErrorDetail
