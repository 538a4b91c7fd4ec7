"""Log-probabilities in the forms of the interfaces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ernie45.engine.pieces import TokenLogprob
from ernie45.processing.tokenizer import Tokenizer

_LEAST = -9999.0
"""JSON has no minus infinity; OpenAI writes this."""


def chat_logprobs(tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` of a chat choice: an entry per token of the answer, thoughts and tags included."""
    entries = []
    for one in logprobs:
        top = [_token(tokenizer, token, value) for token, value in one.top]
        entries.append({**_token(tokenizer, one.id, one.logprob), "top_logprobs": top})
    return {"content": entries, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob | None], ids: Sequence[int]
) -> dict[str, Any]:
    """The `logprobs` of a completion choice.

    Args: logprobs: one per id; None for the first token of a prompt, which nothing predicts. `text_offset` counts from the
        first of them.
    """
    tokens, offsets, position = [], [], 0
    for token in ids:
        text = tokenizer.token_str(token)
        tokens.append(text)
        offsets.append(position)
        position += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": [None if one is None else _finite(one.logprob) for one in logprobs],
        "top_logprobs": [
            None if one is None else {tokenizer.token_str(token): _finite(value) for token, value in one.top}
            for one in logprobs
        ],
        "text_offset": offsets,
    }


def prompt_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any] | None]:
    """`prompt_logprobs` in vLLM's form: per token its own entry and those of the most probable ones, by id."""
    entries: list[dict[str, Any] | None] = [None]
    for one in logprobs:
        ranked = {token: rank for rank, (token, _) in enumerate(one.top, 1)}
        values = dict(one.top) | {one.id: one.logprob}
        entries.append(
            {
                str(token): {
                    "logprob": _finite(value),
                    "rank": ranked.get(token),
                    "decoded_token": tokenizer.token_str(token),
                }
                for token, value in values.items()
            }
        )
    return entries


def _token(tokenizer: Tokenizer, token: int, value: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_str(token),
        "logprob": _finite(value),
        "bytes": list(tokenizer.token_bytes(token)),
    }


def _finite(value: float) -> float:
    return max(value, _LEAST)
