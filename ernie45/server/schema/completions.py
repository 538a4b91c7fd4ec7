"""`/completions`: text to go on with, as it stands."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ernie45.engine.params import MAX_LOGPROBS
from ernie45.server.schema.chat import UsageModel
from ernie45.server.schema.sampling import SamplingFields
from ernie45.server.schema.shared import Count, TokenId

Ids = Annotated[list[TokenId], Field(min_length=1)]
MAX_PROMPTS = 128


class CompletionRequest(SamplingFields):
    """A prompt, or several."""

    prompt: str | Ids | Annotated[list[str | Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    """Text, token ids, or a list of these."""
    max_tokens: Count | None = None
    """0, with `echo`, scores the prompt alone."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    """Begin the answer with the prompt."""
    add_special_tokens: Literal[False] | None = None
    """A prompt is taken as it stands."""


class CompletionLogprobs(BaseModel):
    """Lists with an entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of the answers."""

    model_config = ConfigDict(extra="allow")

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = None
    finish_detail: str | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class Completion(BaseModel):
    """The whole answer."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageModel
