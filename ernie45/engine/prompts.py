"""The forms of a prompt, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ernie45.errors import ContextLengthError, RequestError
from ernie45.processing.tokenizer import Tokenizer

_QUICK_CHARS = 1 << 16
"""What is no longer is encoded in some milliseconds, and refused with its exact length."""

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text that is continued as it stands, token ids, or chat messages (rendered with the tokenizer's template)."""


def prompt_ids(
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool | None = None,
    continue_final_message: bool = False,
) -> list[int]:
    """Token ids of a prompt in any of its forms.

    Args: tools, thinking, continue_final_message: for `Tokenizer.render`; messages alone have them.
    Raises: RequestError for an empty prompt, and for what the template cannot express.
    """
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    elif all(isinstance(item, int) for item in prompt):
        ids = [item for item in prompt if isinstance(item, int)]
    else:
        messages = [item for item in prompt if not isinstance(item, int)]
        if len(messages) != len(prompt):
            raise RequestError("the prompt mixes token ids and messages: give one kind")
        rendered = tokenizer.render(
            messages, tools=tools, thinking=thinking, continue_final_message=continue_final_message
        )
        ids = tokenizer.encode(rendered)
    if not ids:
        raise RequestError("the prompt is empty: give at least one token")
    return ids


def encoded(tokenizer: Tokenizer, text: str, limit: int | None) -> list[int]:
    """Token ids of text.

    Args: limit: tokens of the context that is to hold them; None = no matter. Raises: ContextLengthError for a long text that
        does not fit however it falls into tokens, before the work of encoding it.
    """
    if limit is not None and len(text) > _QUICK_CHARS:
        least = tokenizer.least_tokens(text)
        if least >= limit:
            raise ContextLengthError(_too_long(f"at least {least}", limit))
    return tokenizer.encode(text)


def room_for_answer(num_prompt: int, max_tokens: int | None, limit: int) -> int:
    """Tokens that a context of `limit` leaves behind a prompt. Raises: ContextLengthError if the request does not fit."""
    room = limit - num_prompt
    if room < 1:
        raise ContextLengthError(_too_long(str(num_prompt), limit))
    if max_tokens is not None and max_tokens > room:
        raise ContextLengthError(
            f"prompt has {num_prompt} tokens and max_tokens is {max_tokens}, the model's context holds {limit}: "
            f"shorten the prompt, or lower max_tokens to {room}"
        )
    return room


def _too_long(tokens: str, limit: int) -> str:
    return (
        f"prompt has {tokens} tokens, the model's context holds {limit}: shorten the prompt to {limit - 1} tokens or fewer, "
        "so that an answer has room"
    )


def check_ids(prompt: Sequence[int], vocab_size: int) -> None:
    """Insist on ids that the model has an embedding for. Raises: RequestError."""
    if not prompt:
        raise RequestError("the prompt is empty: give at least one token")
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= vocab_size:
        raise RequestError(f"prompt holds token ids from {low} to {high}, the model knows 0 to {vocab_size - 1}")
