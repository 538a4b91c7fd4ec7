"""What requests ask for becomes one constraint, or an error that names the field."""

import pickle
from typing import Any

import pytest

from ernie45.errors import RequestError
from ernie45.processing.constraint import MAX_CHOICES, MAX_REGEX_CHARS, Constraint, asked_constraint, is_gbnf

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
BARE = {"name": "g"}

ASKED: list[tuple[dict[str, Any], Constraint | None]] = [
    ({}, None),
    ({"response_format": None, "guided_json": None, "structured_outputs": {}}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, Constraint.json_object()),
    ({"response_format": {"type": "json_object", "value": SCHEMA}}, Constraint.json_schema(SCHEMA)),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, Constraint.json_schema(SCHEMA)),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}},
        Constraint.json_schema(SCHEMA),
    ),
    ({"guided_json": SCHEMA, "response_format": {"type": "text"}}, Constraint.json_schema(SCHEMA)),
    ({"guided_regex": "a+"}, Constraint.regex("a+")),
    ({"guided_choice": ["a", "b", "a"]}, Constraint.choice(["a", "b"])),
    ({"guided_grammar": "start: /a/"}, Constraint.grammar("start: /a/")),
    ({"structured_outputs": {"json": SCHEMA, "regex": None}}, Constraint.json_schema(SCHEMA)),
    ({"structured_outputs": {"json_object": True}}, Constraint.json_object()),
    ({"structured_outputs": {"choice": ["a"]}}, Constraint.choice(["a"])),
]


@pytest.mark.parametrize(("request_fields", "expected"), ASKED)
def test_every_spelling_is_read(request_fields: dict[str, Any], expected: Constraint | None) -> None:
    assert asked_constraint(request_fields) == expected


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type is 'xml'"),
    ({"response_format": "json"}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "needs a schema"),
    ({"response_format": {"type": "json_object", "value": {"not": {}}}}, "response_format.value: .*'not'"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
        r"response_format.json_schema.schema: .*'not'",
    ),
    ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_json and guided_regex"),
    ({"guided_regex": ""}, "guided_regex"),
    ({"guided_regex": "a" * (MAX_REGEX_CHARS + 1)}, f"limit is {MAX_REGEX_CHARS}"),
    ({"guided_regex": "\ud800"}, "surrogate"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": "ab"}, "guided_choice"),
    ({"guided_choice": ["a", 1]}, r"guided_choice\[1\]"),
    ({"guided_choice": ["a"] * (MAX_CHOICES + 1)}, f"limit is {MAX_CHOICES}"),
    ({"guided_grammar": "start: <|im_end|>"}, r"special token <\|im_end\|>"),
    ({"guided_grammar": "start: <[3]>"}, r"special token <\[3\]>"),
    ({"guided_grammar": 'start: x\nx: %json {"not": {}}'}, "%json"),
    ({"guided_grammar": "%llguidance {}\nstart: /a/"}, "%llguidance"),
    ({"guided_grammar": "start: @other"}, "@other"),
    ({"guided_grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(3000))}, "3001 rules, the limit"),
    ({"guided_grammar": "\n".join(f"r{i} ::= r{i + 1}" for i in range(3000))}, "3000 rules, the limit"),
    ({"guided_grammar": "root ::= " + "(" * 100 + '"a"' + ")" * 100}, "nested 100 levels"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "json and regex"),
    ({"structured_outputs": []}, "structured_outputs"),
]


@pytest.mark.parametrize(("request_fields", "reason"), REFUSED)
def test_what_is_wrong_is_named(request_fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        asked_constraint(request_fields)


def test_grammars_may_write_what_looks_special() -> None:
    text = 'start: "<|im_end|>" /<[3]>/ // <x> and "\n# @y\n'
    assert Constraint.grammar(text).source == text


def test_gbnf_is_told_from_lark() -> None:
    assert is_gbnf('root ::= "a"')
    assert not is_gbnf('start: "::="')


def test_forced_calls() -> None:
    both = Constraint.tool_calls([TOOL, BARE])
    assert both != Constraint.tool_calls([TOOL])
    assert Constraint.tool_calls([TOOL, BARE], "g") == Constraint.tool_calls([BARE])
    assert both != Constraint.tool_calls([TOOL, BARE], parallel=False)
    assert pickle.loads(pickle.dumps(both)) == both
    refused: list[tuple[list[dict[str, Any]], str | None, str]] = [
        ([TOOL], "h", "names 'h'.*f"),
        ([], None, "1 to"),
        ([{"name": "f", "parameters": {"type": "array"}}], None, r"tools\[0\].function.parameters.type"),
        (
            [BARE, {"name": "f", "parameters": {"properties": {"x": {"not": {}}}}}],
            None,
            r"tools\[1\].*properties.x.*not",
        ),
    ]
    for tools, name, reason in refused:
        with pytest.raises(RequestError, match=reason):
            Constraint.tool_calls(tools, name)
