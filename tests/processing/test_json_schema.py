"""Schemas are checked: every keyword is known and sensible, or named in the error."""

from typing import Any

import pytest

from ernie45.errors import RequestError
from ernie45.processing.json_schema import MAX_PROPERTIES, MAX_SCHEMA_CHARS, MAX_SCHEMA_DEPTH, check_schema

GOOD: list[Any] = [
    {},
    True,
    {"type": ["string", "null"], "title": "t", "default": None, "x-order": 3, "examples": [{"not": 1}]},
    {"properties": {"not": {"type": "string"}, "if": True}, "required": ["not"], "additionalProperties": False},
    {"$defs": {"n": {"const": {"not": 1}}}, "anyOf": [{"$ref": "#/$defs/n"}, {"enum": [{"contains": 1}]}]},
    '{"type": "integer", "minimum": 0}',
]


@pytest.mark.parametrize("schema", GOOD)
def test_good_schemas_pass(schema: Any) -> None:
    checked = check_schema(schema, "s")
    assert checked == (
        {} if schema is True else schema if isinstance(schema, dict) else {"type": "integer", "minimum": 0}
    )


REFUSED: list[tuple[Any, str]] = [
    ({"not": {}}, r"s: the JSON schema keyword 'not'"),
    ({"properties": {"a": {"items": {"contains": {}}}}}, r"s\.properties\.a\.items: .*'contains'"),
    ({"anyOf": [{}, {"if": {}}]}, r"s\.anyOf\[1\]: .*'if'"),
    ({"$defs": {"n": {"propertyNames": {}}}}, r"s\.\$defs\.n: .*'propertyNames'"),
    ({"patternProperties": {"^a": {"unevaluatedProperties": False}}}, "unevaluatedProperties"),
    ({"additionalProperties": {"dependentRequired": {}}}, "dependentRequired"),
    ({"x-guidance": {"lenient": True}}, "x-guidance"),
    ({"uniqueItems": True}, r"s\.uniqueItems is True"),
    ({"nullable": True}, "nullable"),
    ({"type": "strin"}, r"s\.type is 'strin', expected one of string"),
    ({"type": []}, r"s\.type"),
    ({"minimum": True}, r"s\.minimum is True, expected a number"),
    ({"minLength": -1}, r"s\.minLength is -1"),
    ({"multipleOf": 0}, r"s\.multipleOf"),
    ({"required": "a"}, r"s\.required is 'a'"),
    ({"enum": []}, r"s\.enum is \[\]"),
    ({"items": [{}]}, r"s\.items"),
    ({"properties": {"a": 1}}, r"s\.properties"),
    ({"anyOf": []}, r"s\.anyOf"),
    ({3: 4}, r"3"),
    ({"const": float("nan")}, "no JSON"),
    ({"const": {1, 2}}, "no JSON"),
    ({"const": "\ud800"}, "no JSON"),
    (False, "no answer satisfies"),
    (None, "not NoneType"),
    ([], "not list"),
    ("{", "no JSON"),
    ("[" * 100_000, "no JSON"),
    ('"' + "a" * MAX_SCHEMA_CHARS + '"', f"limit is {MAX_SCHEMA_CHARS}"),
    ({"enum": list(range(20_000))}, "too large"),
    ({"const": "a" * (MAX_SCHEMA_CHARS + 1)}, "too large"),
    ({"properties": {str(i): {} for i in range(MAX_PROPERTIES + 1)}}, f"limit is {MAX_PROPERTIES}"),
]


@pytest.mark.parametrize(("schema", "reason"), REFUSED)
def test_what_cannot_be_enforced_is_named(schema: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        check_schema(schema, "s")


def test_depth_is_limited() -> None:
    schema: dict[str, Any] = {}
    for _ in range(MAX_SCHEMA_DEPTH):
        schema = {"items": schema}
    with pytest.raises(RequestError, match=f"{MAX_SCHEMA_DEPTH} levels"):
        check_schema(schema, "s")
    looped: list[Any] = []
    looped.append(looped)
    with pytest.raises(RequestError, match="levels"):
        check_schema({"const": looped}, "s")
