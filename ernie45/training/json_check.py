"""Whether a JSON value conforms to a JSON schema: the keywords that rewards need, and a refusal of all others.

A keyword that is not checked must not pass in silence: answers would then be rewarded for what nobody looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any

from ernie45.config.nearest import nearest
from ernie45.errors import ConfigError

Schema = Mapping[str, Any] | bool


def check_schema(schema: Any, path: str = "schema") -> None:
    """Refuse what `conforms` does not know. Raises: ConfigError that names the place."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise ConfigError(f"{path} is {schema!r}, expected an object, true or false")
    for keyword, value in schema.items():
        if keyword in _ANNOTATIONS:
            continue
        if keyword not in _CHECKS:
            raise ConfigError(f"{path}: keyword {keyword!r} is not known, the nearest is {nearest(keyword, _CHECKS)}")
        if keyword == "type":
            _check_types(value, path)
        for name, inner in _inner_schemas(keyword, value):
            check_schema(inner, f"{path}.{keyword}{name}")


def conforms(value: Any, schema: Schema) -> bool:
    """Whether a value, as `json.loads` gives it, conforms to a schema that `check_schema` took."""
    if isinstance(schema, bool):
        return schema
    return all(_CHECKS[keyword](value, wanted, schema) for keyword, wanted in schema.items() if keyword in _CHECKS)


def same(one: Any, other: Any) -> bool:
    """Equality of JSON values: 1 and 1.0 are one number, true is none."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "number": _is_number,
    "integer": lambda value: _is_number(value) and (isinstance(value, int) or value.is_integer()),
    "boolean": lambda value: isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "null": lambda value: value is None,
}

Check = Callable[[Any, Any, Mapping[str, Any]], bool]


def _of(kind: Callable[[Any], bool], test: Callable[[Any, Any], bool]) -> Check:
    """A check of values of one kind; others pass, as the specification wants it."""
    return lambda value, wanted, schema: not kind(value) or test(value, wanted)


def _properties(value: Any, wanted: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    return not isinstance(value, dict) or all(
        conforms(value[name], inner) for name, inner in wanted.items() if name in value
    )


def _additional(value: Any, wanted: Schema, schema: Mapping[str, Any]) -> bool:
    known = schema.get("properties", {})
    return not isinstance(value, dict) or all(conforms(value[name], wanted) for name in value if name not in known)


def _is_multiple(value: float, step: float) -> bool:
    return math.isfinite(value) and (Fraction(str(value)) / Fraction(str(step))).denominator == 1


def _all_differ(value: list[Any], wanted: bool) -> bool:
    return not wanted or not any(same(one, other) for one, other in combinations(value, 2))


_CHECKS: dict[str, Check] = {
    "type": lambda value, wanted, _: any(_TYPES[one](value) for one in _listed(wanted)),
    "enum": lambda value, wanted, _: any(same(value, one) for one in wanted),
    "const": lambda value, wanted, _: same(value, wanted),
    "anyOf": lambda value, wanted, _: any(conforms(value, one) for one in wanted),
    "oneOf": lambda value, wanted, _: sum(conforms(value, one) for one in wanted) == 1,
    "allOf": lambda value, wanted, _: all(conforms(value, one) for one in wanted),
    "not": lambda value, wanted, _: not conforms(value, wanted),
    "properties": _properties,
    "additionalProperties": _additional,
    "required": _of(_TYPES["object"], lambda value, wanted: all(name in value for name in wanted)),
    "minProperties": _of(_TYPES["object"], lambda value, wanted: len(value) >= wanted),
    "maxProperties": _of(_TYPES["object"], lambda value, wanted: len(value) <= wanted),
    "items": _of(_TYPES["array"], lambda value, wanted: all(conforms(one, wanted) for one in value)),
    "minItems": _of(_TYPES["array"], lambda value, wanted: len(value) >= wanted),
    "maxItems": _of(_TYPES["array"], lambda value, wanted: len(value) <= wanted),
    "uniqueItems": _of(_TYPES["array"], _all_differ),
    "minLength": _of(_TYPES["string"], lambda value, wanted: len(value) >= wanted),
    "maxLength": _of(_TYPES["string"], lambda value, wanted: len(value) <= wanted),
    "pattern": _of(_TYPES["string"], lambda value, wanted: re.search(wanted, value) is not None),
    "minimum": _of(_is_number, lambda value, wanted: value >= wanted),
    "maximum": _of(_is_number, lambda value, wanted: value <= wanted),
    "exclusiveMinimum": _of(_is_number, lambda value, wanted: value > wanted),
    "exclusiveMaximum": _of(_is_number, lambda value, wanted: value < wanted),
    "multipleOf": _of(_is_number, _is_multiple),
}
_ANNOTATIONS = frozenset({"$schema", "$comment", "title", "description", "default", "examples"})


def _listed(value: Any) -> Sequence[Any]:
    return [value] if isinstance(value, str) else value


def _check_types(value: Any, path: str) -> None:
    for name in _listed(value):
        if name not in _TYPES:
            raise ConfigError(f"{path}: type {name!r} is not known, expected {', '.join(_TYPES)}")


def _inner_schemas(keyword: str, value: Any) -> list[tuple[str, Any]]:
    """Schemas inside a keyword's value, each with its place."""
    if keyword in ("anyOf", "oneOf", "allOf"):
        return [(f"[{at}]", inner) for at, inner in enumerate(value)]
    if keyword == "properties":
        return [(f".{name}", inner) for name, inner in value.items()]
    return [("", value)] if keyword in ("items", "not", "additionalProperties") else []
