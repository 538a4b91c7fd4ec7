"""`/tokenize` and `/render`: what they say is what the model would read, whatever spelling asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.served import Served

TURNS = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ANSWERS_AT_ONCE: list[dict[str, Any]] = [
    {"enable_thinking": False},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"chat_template_kwargs": {"thinking": False}},
    {"chat_template_kwargs": {"options": {"thinking_mode": "close"}}},
    {"metadata": {"enable_thinking": "false"}},
    {"reasoning_effort": "none"},
]


@pytest.fixture(scope="module")
def either(start: Callable[..., Served]) -> Served:
    """One that thinks unless it is told not to."""
    return start("ernie_vl_thinking", "--max-model-len", "256")


def ids(served: Served, **fields: Any) -> list[int]:
    response = served.post("/v1/tokenize", {"messages": TURNS, **fields})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["count"] == len(answer["tokens"])
    found: list[int] = answer["tokens"]
    return found


def rendered(served: Served, **fields: Any) -> list[int]:
    found: list[int] = served.post("/v1/chat/completions/render", {"messages": TURNS, **fields}).json()["token_ids"]
    return found


@pytest.mark.parametrize("fields", ANSWERS_AT_ONCE)
def test_every_spelling_of_thinking_is_heard(either: Served, fields: dict[str, Any]) -> None:
    assert ids(either, **fields) == rendered(either, **fields) != ids(either)


def test_a_conversation_is_tokenized_as_it_is_rendered(server: Served, plain_server: Served) -> None:
    begun = [*TURNS, {"role": "assistant", "content": "He"}]
    for served, fields in (
        (server, {"tools": [TOOL]}),
        (server, {"add_generation_prompt": False}),
        (plain_server, {"messages": begun, "continue_final_message": True}),
        (plain_server, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}),
    ):  # fmt: skip
        assert ids(served, **fields) == rendered(served, **fields) != ids(served)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"chat_template_kwargs": {"thinking": False}}, None, "always thinks"),
        ({"chat_template_kwargs": {"options": {"thinking_mode": "shut"}}}, "chat_template_kwargs.options.thinking_mode", "shut"),
        ({"chat_template_kwargs": {"other": 1}}, "chat_template_kwargs.other", "not permitted"),
        ({"enable_thinking": True, "chat_template_kwargs": {"thinking": False}}, "enable_thinking", "contradict"),
        ({"tool_choice": "none"}, "tool_choice", "not permitted"),
        ({"add_special_tokens": True}, "add_special_tokens", "add_special_tokens is True"),
        ({"prompt": "x"}, "prompt", "exclude each other"),
        ({"messages": None}, None, "one is needed"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_named(
    server: Served, fields: dict[str, Any], param: str | None, message: str
) -> None:
    response = server.post("/v1/tokenize", {"messages": TURNS, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert message in error["message"]
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        *ANSWERS_AT_ONCE,
        {"tools": [TOOL]},
        {"add_generation_prompt": True},
        {"continue_final_message": False},
    ],
)
def test_a_text_has_none_of_a_conversations_fields(server: Served, fields: dict[str, Any]) -> None:
    assert server.post("/v1/tokenize", {"prompt": "x"}).status_code == 200
    error = server.post("/v1/tokenize", {"prompt": "x", **fields}).json()["error"]
    (name,) = fields
    assert (error["param"], error["code"]) == (name, "invalid_value")
    assert "goes with messages" in error["message"]
