"""Kinds of values that fields of several interfaces hold, and the fields that mean the same in all: the one place for their ranges."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_MESSAGES = 4096
MAX_PARTS = 1024
"""Of the content of one message, or of one item of it."""
_MAX_STRINGS = 64

Count = Annotated[int, Field(ge=0, lt=2**31)]
Length = Annotated[int, Field(ge=1, lt=2**31)]
"""Tokens that something may take at most."""
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TopP = Annotated[float, Field(gt=0, le=1)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
StopStrings = Annotated[list[StopString], Field(max_length=_MAX_STRINGS)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]


class SharedFields(BaseModel):
    """What every request for an answer may have. Fields that are absent or null take the model's defaults."""

    model_config = ConfigDict(extra="allow", strict=True)

    seed: Annotated[int, Field(ge=-1, lt=2**63)] | None = None
    """-1, as some programs write it, draws one."""
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_tokens: Count | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=100)] | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
