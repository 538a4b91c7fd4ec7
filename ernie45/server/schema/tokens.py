"""`/tokenize`, `/detokenize`, `/render`, `/models`, `/version`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ernie45.server.schema.chat import ChatMessage, ChatTemplateKwargs, Tool
from ernie45.server.schema.sampling import ReasoningEffort
from ernie45.server.schema.shared import MAX_MESSAGES, TokenId


class ConversationFields(BaseModel):
    """The fields of a chat request that its prompt depends on."""

    model_config = ConfigDict(extra="forbid", strict=True)

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    metadata: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class TokenizeRequest(ConversationFields):
    """Text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: Literal[False] | None = None
    """Text is taken as it stands, and templates write their own."""
    return_token_strs: bool = False


class Tokenized(BaseModel):
    """The ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(BaseModel):
    """Token ids."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    tokens: list[TokenId]


class Detokenized(BaseModel):
    """Their text, special tokens included."""

    prompt: str


class Rendered(BaseModel):
    """What the template makes of a conversation."""

    prompt: str
    token_ids: list[int]
    count: int


class ModelCard(BaseModel):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None = None
    max_model_len: int
    """Tokens of prompt and answer that are served."""
    context_length: int
    """Tokens that the model's positions reach."""
    capabilities: list[str]
    thinking: Literal["never", "optional", "always"]
    """Whether requests may switch it."""
    kind: str
    weights: str
    parameters: int
    active_parameters: int


class ModelList(BaseModel):
    """The models."""

    object: Literal["list"]
    data: list[ModelCard]


class Version(BaseModel):
    """The server's version."""

    version: str


class Status(BaseModel):
    """How the server is."""

    status: str
    message: str
