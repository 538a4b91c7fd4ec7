"""What is accepted as a conversation, and how precisely the rest is refused."""

from typing import Any

import pytest

from ernie45.errors import RequestError
from ernie45.processing.messages import check_messages, check_tools


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "empty"),
        ("hello", "must be a list, not str"),
        (None, "must be a list, not NoneType"),
        ({"role": "user"}, "must be a list, not dict"),
        (["x"], r"messages\[0\] must be an object"),
        ([{"role": "user", "content": "a"}, {"role": "bot", "content": "x"}], r"messages\[1\]\.role is 'bot'"),
        ([{"content": "x"}], r"messages\[0\]\.role is None"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\]\.role"),
        ([{"role": "user"}], r"messages\[0\]\.content is missing"),
        ([{"role": "assistant", "content": None}], r"messages\[0\]\.content is missing"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content must be text or a list"),
        ([{"role": "user", "content": b"x"}], r"messages\[0\]\.content must be text or a list"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\]\.content\[0\] must be an object"),
        ([{"role": "user", "content": [{"type": "audio"}]}], r"content\[0\]\.type is 'audio'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]\.text must be text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "needs a url"),
        ([{"role": "user", "content": "x", "mood": "sad"}], "unknown field 'mood'"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], "tool_calls belongs to the role assistant"),
        ([{"role": "user", "content": "x", "reasoning_content": "r"}], "reasoning_content belongs"),
        ([{"role": "user", "content": "x", "tool_call_id": "r"}], "tool_call_id belongs to the role tool"),
        ([{"role": "user", "content": "x", "name": 3}], r"messages\[0\]\.name must be text"),
        ([{"role": "assistant", "tool_calls": "x"}], "tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"tool_calls\[0\] must be an object with a function"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "needs a name"),
        ([{"role": "assistant", "tool_calls": [{"type": "x", "function": {"name": "f"}}]}], "type is 'x'"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            r"tool_calls\[0\]\.function\.arguments is no JSON",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 100_000}}]}],
            "no JSON",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
            "arguments must be an object, not list",
        ),
    ],
)
def test_malformed_messages_are_named(messages: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        check_messages(messages)


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("x", "must be a list"),
        (["x"], r"tools\[0\] must be an object"),
        ([{"type": "retrieval", "function": {"name": "f"}}], r"tools\[0\]\.type is 'retrieval'"),
        ([{"type": "function", "function": {}}], r"tools\[0\]\.function needs a name"),
        ([{"description": "x"}], r"tools\[0\]\.function needs a name"),
    ],
)
def test_malformed_tools_are_named(tools: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        check_tools(tools)


def test_fields_that_clients_fill_with_nothing_are_accepted() -> None:
    """OpenAI's client library sends these back with every assistant turn."""
    message: dict[str, object] = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "tool_calls": [],
    }
    assert check_messages([message])[0].text == "x"


def test_bare_functions_are_wrapped() -> None:
    bare = {"name": "f", "parameters": {}}
    assert check_tools([bare]) == check_tools([{"type": "function", "function": bare}])
    assert check_tools([{"function": bare}]) == check_tools([bare])
    assert check_tools(None) == []


@pytest.mark.parametrize(
    ("content", "reasoning", "answer"),
    [
        ("<think>\nR\n</think>\n\nA", "R", "A"),
        ("\n<think>R</think>A", "R", "A"),
        ("<think></think>A", "", "A"),
        ("<think>R", None, "<think>R"),
        ("A <think>R</think>", None, "A <think>R</think>"),
        ("<think>R</think>A</think>B", "R", "A</think>B"),
    ],
)
def test_thoughts_are_taken_apart(content: str, reasoning: str | None, answer: str) -> None:
    message = check_messages([{"role": "assistant", "content": content}])[0].with_thought_apart()
    assert (message.reasoning, message.text) == (reasoning, answer)


def test_only_an_assistant_thinks() -> None:
    message = check_messages([{"role": "user", "content": "<think>R</think>A"}])[0]
    assert message.with_thought_apart() == message
    given = {"role": "assistant", "content": "<think>R</think>A", "reasoning_content": "Q"}
    assert check_messages([given])[0].with_thought_apart().text == "<think>R</think>A"
