"""The forms of a prompt, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ernie45.errors import ContextLengthError, RequestError
from ernie45.processing.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text that is continued as it stands, token ids, or chat messages (rendered with the tokenizer's template)."""


def prompt_ids(
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool | None = None,
) -> list[int]:
    """Token ids of a prompt in any of its forms. Raises: RequestError for an empty one."""
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    elif all(isinstance(item, int) for item in prompt):
        ids = [item for item in prompt if isinstance(item, int)]
    else:
        messages = [item for item in prompt if not isinstance(item, int)]
        if len(messages) != len(prompt):
            raise RequestError("the prompt mixes token ids and messages: give one kind")
        ids = tokenizer.encode(tokenizer.render(messages, tools=tools, thinking=thinking))
    if not ids:
        raise RequestError("the prompt is empty: give at least one token")
    return ids


def room_for_answer(num_prompt: int, max_tokens: int | None, limit: int) -> int:
    """Tokens that a context of `limit` leaves behind a prompt. Raises: ContextLengthError if the request does not fit."""
    room = limit - num_prompt
    if room < 1:
        raise ContextLengthError(
            f"prompt has {num_prompt} tokens, the model's context holds {limit}: shorten the prompt to {limit - 1} tokens "
            "or fewer, so that an answer has room"
        )
    if max_tokens is not None and max_tokens > room:
        raise ContextLengthError(
            f"prompt has {num_prompt} tokens and max_tokens is {max_tokens}, the model's context holds {limit}: "
            f"shorten the prompt, or lower max_tokens to {room}"
        )
    return room


def check_ids(prompt: Sequence[int], vocab_size: int) -> None:
    """Insist on ids that the model has an embedding for. Raises: RequestError."""
    if not prompt:
        raise RequestError("the prompt is empty: give at least one token")
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= vocab_size:
        raise RequestError(f"prompt holds token ids from {low} to {high}, the model knows 0 to {vocab_size - 1}")
