"""`/abort_requests`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class AbortRequests(BaseModel):
    """Which requests to end."""

    model_config = ConfigDict(extra="forbid", strict=True)

    request_ids: Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(max_length=1024)]
    """Values of `x-request-id`. One that no request of this key has, or no longer, is no error."""


class Aborted(BaseModel):
    """What became of it."""

    aborted: int
    """Requests that ran, and are being ended."""
