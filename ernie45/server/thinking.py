"""Whether a model shall think, and how long: five spellings, one answer."""

from __future__ import annotations

from typing import Any

from ernie45.server.errors import ApiError
from ernie45.server.schema.chat import ChatRequest

EFFORT_TOKENS: dict[str, int | None] = {"low": 1024, "medium": 4096, "high": None, "xhigh": None, "max": None}
"""Most tokens of a thought by `reasoning_effort`; None = no limit. `none` and `minimal` switch thinking off."""
_MODES = {"open": True, "close": False}


def wants_thinking(request: ChatRequest) -> tuple[bool | None, int | None]:
    """Whether to think (None: the model's default), and most tokens of the thought (None: no limit).

    Raises: ApiError for wishes that contradict each other.
    """
    stated = {name: value for name, value in _stated(request) if value is not None}
    if len(set(stated.values())) > 1:
        shown = ", ".join(f"{name} {str(value).lower()}" for name, value in stated.items())
        raise ApiError(400, f"{shown} contradict each other: send one", code="invalid_value", param=next(iter(stated)))
    thinking = next(iter(stated.values()), None)
    effort = request.reasoning_effort
    if effort in ("none", "minimal") and thinking:
        raise ApiError(
            400, f"reasoning_effort {effort} contradicts {next(iter(stated))} true", param="reasoning_effort"
        )
    budget = _budget(request)
    if effort is not None:
        if effort in EFFORT_TOKENS:
            budget = EFFORT_TOKENS[effort] if budget is None else budget
        elif thinking is None:
            thinking = False
    return thinking, budget


def _stated(request: ChatRequest) -> list[tuple[str, bool | None]]:
    kwargs = request.chat_template_kwargs
    found = [("enable_thinking", request.enable_thinking)]
    if kwargs is not None:
        found += [
            ("chat_template_kwargs.enable_thinking", kwargs.enable_thinking),
            ("chat_template_kwargs.thinking", kwargs.thinking),
            ("chat_template_kwargs.options.thinking_mode", _mode(kwargs.options)),
        ]
    in_metadata = (request.metadata or {}).get("enable_thinking")
    # OpenAI's metadata holds text alone.
    in_metadata = (
        {"true": True, "false": False}.get(in_metadata, in_metadata) if isinstance(in_metadata, str) else in_metadata
    )
    if in_metadata is not None and not isinstance(in_metadata, bool):
        raise ApiError(
            400,
            f"metadata.enable_thinking is {in_metadata!r}, expected true or false",
            code="invalid_value",
            param="metadata.enable_thinking",
        )
    return [*found, ("metadata.enable_thinking", in_metadata)]


def _mode(options: dict[str, Any] | None) -> bool | None:
    if not options:
        return None
    where = "chat_template_kwargs.options"
    unknown = next((name for name in options if name != "thinking_mode"), None)
    if unknown is not None:
        raise ApiError(
            400, f"{where} has the unknown field {unknown!r}, known is thinking_mode", param=f"{where}.{unknown}"
        )
    mode = options["thinking_mode"]
    if mode not in _MODES:
        raise ApiError(
            400, f"{where}.thinking_mode is {mode!r}, expected open or close", param=f"{where}.thinking_mode"
        )
    return _MODES[mode]


def _budget(request: ChatRequest) -> int | None:
    ours, theirs = request.reasoning_max_tokens, request.thinking_token_budget
    if ours is not None and theirs is not None and ours != theirs:
        raise ApiError(
            400,
            f"reasoning_max_tokens {ours} and thinking_token_budget {theirs} contradict each other: send one",
            code="invalid_value",
            param="reasoning_max_tokens",
        )
    return theirs if ours is None else ours
