"""Rows to tune on in every form, and what is said about each that is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from ernie45.errors import RequestError
from ernie45.training.data.row_formats import parse_conversation, parse_text

TOOL = {"name": "weather", "parameters": {"type": "object"}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[idx % 2], "content": text} for idx, text in enumerate(texts)]


SYSTEM = {"role": "system", "content": "S"}


@pytest.mark.parametrize(
    ("row", "messages", "learnt"),
    [
        ({"src": "q", "tgt": "a"}, turns("q", "a"), [0, 1]),
        ({"src": ["q"], "tgt": "a", "system": "S"}, [SYSTEM, *turns("q", "a")], [0, 0, 1]),
        ({"src": ["q", "r"], "tgt": ["a", "b"], "label": [0, 1]}, turns("q", "a", "r", "b"), [0, 0, 0, 1]),
        (
            {"src": ["S", "q", "r"], "tgt": ["", "a", "b"], "label": [1, 0, 1], "is_system": 1},
            [SYSTEM, *turns("q", "a", "r", "b")],
            [0, 0, 0, 0, 1],
        ),
        ({"src": ["q"], "tgt": ["a"], "is_system": 0, "id": 7}, turns("q", "a"), [0, 1]),
        ({"instruction": "q", "output": "a"}, turns("q", "a"), [0, 1]),
        ({"instruction": "q", "input": "more", "output": "a"}, turns("q\nmore", "a"), [0, 1]),
        ({"instruction": "", "input": "more", "output": "a"}, turns("more", "a"), [0, 1]),
        (
            {"instruction": "r", "input": "", "output": "b", "history": [["q", "a"]], "system": "S"},
            [SYSTEM, *turns("q", "a", "r", "b")],
            [0, 0, 1, 0, 1],
        ),
        ({"messages": [SYSTEM, *turns("q", "a")]}, [SYSTEM, *turns("q", "a")], [0, 0, 1]),
        ({"messages": turns("q", "a", "r", "b"), "label": [1, 0]}, turns("q", "a", "r", "b"), [0, 1, 0, 0]),
    ],
)
def test_forms(row: dict[str, Any], messages: list[Any], learnt: list[int]) -> None:
    parsed = parse_conversation(row, "f:1")
    assert list(parsed.messages) == messages
    assert list(parsed.learnt) == [bool(mark) for mark in learnt]
    assert parsed.origin == "f:1"


def test_tools_calls_and_results() -> None:
    dialogue = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "<think>t</think>a"},
    ]
    parsed = parse_conversation({"messages": dialogue, "tools": [TOOL]})
    assert parsed.tools == ({"type": "function", "function": TOOL},)
    assert list(parsed.messages) == dialogue
    assert parsed.learnt == (False, True, False, True)


def test_text() -> None:
    assert parse_text({"text": "some\ntext", "id": 1}) == "some\ntext"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, r"expected the keys messages, or src\+tgt, or instruction\+output, found none"),
        ({"txt": "a"}, "found 'txt'"),
        ({"src": "q"}, "found 'src'"),
        ({"src": "q", "tgt": "a", "messages": turns("q", "a")}, "two forms, messages and erniekit"),
        ({"src": ["q", "r"], "tgt": ["a"]}, "src has 2 turns and tgt 1"),
        ({"src": [], "tgt": []}, "no turn to learn"),
        ({"src": ["q", ""], "tgt": ["a", "b"]}, r"src\[1\] is empty"),
        ({"src": ["q"], "tgt": [" \n"]}, r"tgt\[0\] is empty"),
        ({"src": 5, "tgt": "a"}, "src must be text or a list of texts, not int"),
        ({"src": ["q"], "tgt": [None]}, "tgt must be text or a list of texts"),
        ({"src": ["q"], "tgt": ["a"], "label": [1, 0]}, "label has 2 entries for 1 answers"),
        ({"src": ["q"], "tgt": ["a"], "label": ["yes"]}, r"label\[0\] is 'yes', expected 0 or 1"),
        ({"src": ["q"], "tgt": ["a"], "system": ["S"]}, "system must be text, not list"),
        ({"src": ["S", "q"], "tgt": ["", "a"], "is_system": 1, "system": "S"}, "two system texts"),
        ({"src": ["S"], "tgt": [""], "is_system": 1}, "no turn to learn"),
        ({"src": ["", "q"], "tgt": ["", "a"], "is_system": 1}, r"src\[0\] is empty"),
        ({"src": ["q"], "tgt": ["a"], "is_system": 2}, "is_system is 2, expected 0 or 1"),
        ({"instruction": "q", "output": ""}, "output must be text and not empty"),
        ({"instruction": "q", "output": 3}, "output must be text and not empty"),
        ({"instruction": " ", "output": "a"}, "instruction is empty"),
        ({"instruction": ["q"], "output": "a"}, "instruction and input must be text"),
        ({"instruction": "q", "output": "a", "history": "x"}, "history must be a list"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, r"history\[0\] must be \[question, answer\]"),
        ({"instruction": "q", "output": "a", "history": [["q", ""]]}, r"history\[0\] must be"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "q"}, "messages must be a list, not str"),
        ({"messages": turns("q")}, "the last turn is a user's: end with an assistant's"),
        ({"messages": [*turns("q", "")]}, r"messages\[1\] is an empty answer"),
        ({"messages": [*turns("q", "<think>only</think>\n")]}, r"messages\[1\] is an empty answer"),
        ({"messages": [{"role": "bot", "content": "x"}]}, r"messages\[0\].role is 'bot'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content is missing"),
        (
            {"messages": [{"role": "user", "content": "q", "weight": 1}]},
            r"messages\[0\] has the unknown field 'weight'",
        ),
        ({"messages": turns("q", "a"), "label": [1, 1]}, "label has 2 entries for 1 answers"),
        ({"messages": turns("q", "a"), "tools": "weather"}, "tools must be a list"),
        ({"messages": turns("q", "a"), "tools": [{"description": "d"}]}, r"tools\[0\].function needs a name"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
                    *turns("q", "a")[1:],
                ]
            },
            r"messages\[0\] has a image: only text",
        ),
        (
            {
                "messages": [
                    *turns("q"),
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
                ]
            },
            r"messages\[1\].tool_calls\[0\].function.arguments is no JSON",
        ),
    ],
)
def test_what_is_wrong_is_said(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        parse_conversation(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"txt": "a"}, "expected a key 'text' with text, found 'txt'"),
        ({"text": 1}, "found 'text'"),
        ({"text": " "}, "empty"),
    ],
)
def test_text_that_is_none(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        parse_text(row)
