"""The shield, alone: what is protected comes back unchanged and is never taken for a special token."""

import copy
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import RequestError
from ernie45.processing.prompt import MAX_JSON_DEPTH, RenderedPrompt, Segment, Shield, SpecialStrings

SPECIAL = ("<|a|>", "<|a|>b", "[X]", "</t>")
fragments = st.lists(
    st.sampled_from([*SPECIAL, "<", "|a", "|>", "b", "[", "X]", "\U00013000", "\U00013001", "\n"])
).map("".join)


@given(first=fragments, second=fragments)
@settings(max_examples=200, deadline=None)
def test_only_the_template_writes_special_tokens(first: str, second: str) -> None:
    shield = Shield(SpecialStrings(SPECIAL), [first, {"k": second}])
    # No separators: strings of the caller may meet, and may meet halves of markers in the template.
    prompt = shield.reveal(
        f"<|a|>{shield.text(first)}{shield.text(second)}[X]<|{shield.text(first)}|>[{shield.text(second)}"
    )
    assert prompt == f"<|a|>{first}{second}[X]<|{first}|>[{second}"
    expected = ["<|a|>", "[X]"]
    if first == "a":
        expected.append("<|a|>")
    assert [part.text for part in prompt.segments if part.special] == expected


def test_longest_special_token_wins() -> None:
    assert Shield(SpecialStrings(SPECIAL), []).reveal("<|a|>b<|a|>c").segments == (
        Segment("<|a|>b", True),
        Segment("<|a|>", True),
        Segment("c", False),
    )


def test_stand_ins_avoid_what_occurs() -> None:
    used = "".join(map(chr, range(0x13000, 0x13010)))
    shield = Shield(SpecialStrings(["<a>"]), used, template_text="\U00013010")
    protected = shield.text("<a>")
    assert not set(protected) & {*used, "\U00013010", "<", ">"}
    assert protected.isprintable(), "or else repr would escape them"
    assert protected.upper().lower() == protected.lower()
    assert shield.restore(protected) == "<a>"


def test_values_are_protected_throughout() -> None:
    value: dict[str, Any] = {"<a>": ["<a>", 1, None, True, 0.5, {"k": "<a>"}]}
    shield = Shield(SpecialStrings(["<a>"]), value)
    protected = shield.value(value)
    assert "<" not in repr(protected)
    assert shield.restore(repr(protected)) == repr(value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({1: "x"}, "key is a string"),
        ({"x": {1, 2}}, "not set"),
        ([b"x"], "not bytes"),
        ([float("nan")], "no nan"),
        ([float("-inf")], "no -inf"),
    ],
)
def test_only_json_values(value: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        Shield(SpecialStrings(["<a>"]), value)


def test_nesting_is_bounded() -> None:
    value: Any = "x"
    for _ in range(MAX_JSON_DEPTH + 1):
        value = [value]
    with pytest.raises(RequestError, match="levels deep"):
        Shield(SpecialStrings(["<a>"]), value)
    Shield(SpecialStrings(["<a>"]), value[0])


def test_rendered_prompts_are_text_that_copies() -> None:
    prompt = RenderedPrompt([Segment("<a>", True), Segment("b", False)])
    assert prompt == "<a>b"
    for other in (copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert (other, other.segments) == (prompt, prompt.segments)
    assert type(prompt + "c") is str, "the cut does not survive string operations"
