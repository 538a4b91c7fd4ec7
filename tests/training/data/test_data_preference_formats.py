"""Rows that compare or judge answers, and what is said about each that is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from ernie45.errors import RequestError
from ernie45.training.data.preference_formats import parse_kto, parse_preference


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[idx % 2], "content": text} for idx, text in enumerate(texts)]


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "S"}
PAIR = {"chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected", "scores"),
    [
        (
            {"system": "S", "src": ["q", "r"], "tgt": ["a"], "response": [["c"], ["d"]], "sort": [1, 0]},
            [SYSTEM, *turns("q", "a", "r")],
            [answer("c")],
            [answer("d")],
            (1.0, 0.0),
        ),
        (
            {"src": "q", "response": [["x"], ["c", "u", "e"]], "sort": [2, 7.5]},
            turns("q"),
            [answer("c"), *turns("u", "e")],
            [answer("x")],
            (7.5, 2.0),
        ),
        (
            {"src": ["S", "q"], "tgt": [""], "is_system": 1, "response": ["c", "d"], "sort": [0, 1]},
            [SYSTEM, *turns("q")],
            [answer("d")],
            [answer("c")],
            (1.0, 0.0),
        ),
        ({"question": "q", **PAIR}, turns("q"), [answer("good")], [answer("bad")], (1.0, 0.0)),
        (
            {"instruction": "r", "input": "i", "history": [["q", "a"]], "system": "S", "score_chosen": 9, **PAIR},
            [SYSTEM, *turns("q", "a", "r\ni")],
            [answer("good")],
            [answer("bad")],
            (9.0, 0.0),
        ),
        (
            {"prompt": "q", **PAIR, "score_chosen": 4.5, "score_rejected": 4},
            turns("q"),
            [answer("good")],
            [answer("bad")],
            (4.5, 4.0),
        ),
        (
            {"prompt": [SYSTEM, *turns("q")], "chosen": [answer("c")], "rejected": answer("d")},
            [SYSTEM, *turns("q")],
            [answer("c")],
            [answer("d")],
            (1.0, 0.0),
        ),
        (
            {"prompt": "q", "chosen": turns("q", "a", "r", "c"), "rejected": turns("q", "a", "r", "d")},
            turns("q", "a", "r"),
            [answer("c")],
            [answer("d")],
            (1.0, 0.0),
        ),
    ],
)
def test_pairs(row: dict[str, Any], prompt: Any, chosen: Any, rejected: Any, scores: tuple[float, float]) -> None:
    parsed = parse_preference(row, "f:3")
    assert [list(parsed.prompt), list(parsed.chosen), list(parsed.rejected)] == [prompt, chosen, rejected]
    assert (parsed.score_chosen, parsed.score_rejected) == scores
    assert parsed.origin == "f:3"


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"messages": [SYSTEM, *turns("q", "a")], "label": True}, [SYSTEM, *turns("q")], [answer("a")]),
        ({"messages": turns("q", "a", "r", "b"), "label": False}, turns("q", "a", "r"), [answer("b")]),
        ({"prompt": "q", "completion": "a", "system": "S", "label": True}, [SYSTEM, *turns("q")], [answer("a")]),
        ({"prompt": turns("q"), "completion": [answer("a")], "label": False}, turns("q"), [answer("a")]),
    ],
)
def test_judged_answers(row: dict[str, Any], prompt: Any, completion: Any) -> None:
    parsed = parse_kto(row, "f:3")
    assert [list(parsed.prompt), list(parsed.completion)] == [prompt, completion]
    assert parsed.desirable is row["label"]
    assert parsed.origin == "f:3"


ERNIE = {"src": ["q"], "response": [["c"], ["d"]], "sort": [1, 0]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "q", "chosen": "a"}, "rejected is missing"),
        ({"src": ["q"], "sort": [1, 0]}, "response must be a list of two"),
        ({**ERNIE, "response": [["c"]]}, "response must be a list of two"),
        ({**ERNIE, "response": [["c", "u"], ["d"]]}, r"response\[0\] has 2 turns, expected an odd number"),
        ({**ERNIE, "response": [["c"], []]}, r"response\[1\] has 0 turns, expected an odd number"),
        ({**ERNIE, "response": [["c"], [""]]}, r"response\[1\]\[0\] is empty"),
        ({**ERNIE, "response": [["c"], [5]]}, r"response\[1\] must be a list of texts"),
        ({**ERNIE, "response": [["c"], ["c"]]}, "chosen and rejected are equal"),
        ({**ERNIE, "sort": [1, 1]}, "equal numbers prefer neither"),
        ({**ERNIE, "sort": [1]}, "sort must be a list of two"),
        ({**ERNIE, "sort": [True, False]}, r"sort\[0\] is True, expected a number"),
        ({**ERNIE, "tgt": ["a"]}, "src has 1 turns and tgt 1: expected one question more"),
        ({**ERNIE, "src": [""]}, r"src\[0\] is empty"),
        ({**ERNIE, "src": ["S"], "is_system": 1}, "src has no question"),
        ({"question": "", **PAIR}, "question is empty"),
        ({"question": "q", "chosen": "", "rejected": "b"}, r"chosen\[0\] is an empty answer"),
        ({"question": "q", "chosen": "b", "rejected": "b"}, "chosen and rejected are equal"),
        ({"question": "q", "chosen": 5, "rejected": "b"}, "chosen must be text or a list of messages"),
        ({"prompt": turns("q"), "chosen": turns("q"), "rejected": turns("r")}, "have no beginning in common"),
        ({**PAIR}, "there is no prompt"),
        ({"prompt": "q", **PAIR, "score_chosen": 1, "score_rejected": 2}, "the chosen one's must be larger"),
        ({"prompt": "q", **PAIR, "score_chosen": "1"}, "score_chosen is '1', expected a number"),
        (
            {"prompt": "q", "chosen": [answer("c"), *turns("u")], "rejected": "d"},
            "chosen ends with a user's turn",
        ),
        (
            {"prompt": "q", "chosen": turns("r"), "rejected": "d"},
            "chosen begins with a user's turn",
        ),
    ],
)
def test_what_is_wrong_with_a_pair(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        parse_preference(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "completion": "a"}, "label is None, expected true"),
        ({"prompt": "q", "completion": "a", "label": 1}, "label is 1, expected true"),
        ({"prompt": "q", "label": True}, "expected the keys messages and label, or prompt, completion and label"),
        ({"messages": turns("q"), "label": True}, "there is no prompt"),
        ({"messages": turns("q", "a", "r"), "label": True}, "completion begins with a user's turn"),
        ({"messages": [], "label": True}, "messages must be text or a list of messages that is not empty"),
        ({"prompt": "q", "completion": "", "label": True}, r"completion\[0\] is an empty answer"),
        ({"prompt": "", "completion": "a", "label": True}, r"prompt\[0\] is an empty question"),
    ],
)
def test_what_is_wrong_with_a_judged_answer(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        parse_kto(row)
