"""Check JSON schemas of requests before they become grammars: known keywords with sensible values, within limits.

What is not checked here is refused by the library that compiles (`grammar.py`). A keyword that it does not enforce
must not pass in silence: an answer would then break a schema that we accepted.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from ernie45.errors import RequestError

MAX_SCHEMA_CHARS = 1 << 17
MAX_SCHEMA_DEPTH = 64  # of the JSON that the schema is written in
MAX_SCHEMA_NODES = 10_000
MAX_PROPERTIES = 500  # per object; the parser's effort per token grows with them

_TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
# They describe and restrict nothing.
_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment"}
    | {"$schema", "contentMediaType", "contentEncoding", "discriminator"}
)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_schema(value: object) -> bool:
    return isinstance(value, dict | bool)


def _is_schema_map(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_schema, value.values()))


def _is_schema_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_schema, value))


def _is_type(value: object) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(name in _TYPES for name in names)


_KEYWORDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "type": (f"one of {', '.join(_TYPES)}, or a list of those", _is_type),
    "enum": ("a list with at least one value", lambda value: isinstance(value, list) and bool(value)),
    "const": ("a JSON value", lambda _: True),
    "required": ("a list of names", lambda value: isinstance(value, list) and all(map(_is_text, value))),
    "multipleOf": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "uniqueItems": ("false: uniqueness is not supported", lambda value: value is False),
}
_KEYWORDS |= dict.fromkeys(("pattern", "format", "$ref"), ("text", _is_text))
_KEYWORDS |= dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), ("a number", _is_number))
_KEYWORDS |= dict.fromkeys(
    ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
    ("a whole number from 0 on", _is_count),
)
_KEYWORDS |= dict.fromkeys(("items", "additionalProperties"), ("a schema", _is_schema))
_KEYWORDS |= dict.fromkeys(
    ("properties", "patternProperties", "$defs", "definitions"), ("schemas by name", _is_schema_map)
)
_KEYWORDS |= dict.fromkeys(("anyOf", "oneOf", "allOf", "prefixItems"), ("a list of schemas", _is_schema_list))


def check_schema(schema: object, where: str) -> dict[str, Any]:
    """Return a schema as an object that can be compiled.

    Args: schema: an object or a boolean, or either as JSON text. where: the field it came in, for errors.
    Raises: RequestError that names the place and the keyword, the limit or the value.
    """
    if isinstance(schema, str):
        schema = _parse(schema, where)
    if not isinstance(schema, dict | bool):
        raise RequestError(f"{where} must be a JSON schema, an object, not {type(schema).__name__}")
    _check_size(schema, where)
    pending: list[tuple[Any, str]] = [(schema, where)]
    while pending:
        part, place = pending.pop()
        if isinstance(part, dict):
            _check_keywords(part, place)
            pending += _subschemas(part, place)
    if schema is False:
        raise RequestError(f"{where} is false, which no answer satisfies")
    return {} if schema is True else schema


def _parse(text: str, where: str) -> object:
    if len(text) > MAX_SCHEMA_CHARS:
        raise RequestError(f"{where} has {len(text)} characters, the limit is {MAX_SCHEMA_CHARS}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is no JSON: {error}") from error


def _check_size(schema: object, where: str) -> None:
    """Bound depth and number of values, and make sure that all of it is JSON."""
    num_nodes, num_chars = 0, 0
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value, *value.values()]
            elif isinstance(value, list | tuple):
                below += value
            elif isinstance(value, str):
                num_chars += len(value)
        num_nodes += len(level)
        level = below
        if num_nodes + len(level) > MAX_SCHEMA_NODES or num_chars > MAX_SCHEMA_CHARS:
            raise RequestError(
                f"{where} is too large: the limits are {MAX_SCHEMA_NODES} values and {MAX_SCHEMA_CHARS} characters"
            )
        if not level:
            break
    else:
        raise RequestError(f"{where} is nested more than {MAX_SCHEMA_DEPTH} levels deep: flatten it")
    try:
        json.dumps(schema, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise RequestError(f"{where} is no JSON: {error}") from error


def _check_keywords(schema: dict[Any, Any], where: str) -> None:
    for key, value in schema.items():
        if key in _KEYWORDS:
            expected, is_good = _KEYWORDS[key]
            if not is_good(value):
                raise RequestError(f"{where}.{key} is {_short(value)}, expected {expected}")
        elif key not in _ANNOTATIONS and (not isinstance(key, str) or not key.startswith("x-") or key == "x-guidance"):
            raise RequestError(f"{where}: the JSON schema keyword {key!r} is not supported: leave it out")
    if len(schema.get("properties", ())) > MAX_PROPERTIES:
        raise RequestError(f"{where} has {len(schema['properties'])} properties, the limit is {MAX_PROPERTIES}")


def _subschemas(schema: dict[str, Any], where: str) -> Iterator[tuple[Any, str]]:
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions"):
            yield from ((part, f"{where}.{key}.{name}") for name, part in value.items())
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            yield from ((part, f"{where}.{key}[{idx}]") for idx, part in enumerate(value))
        elif key in ("items", "additionalProperties"):
            yield value, f"{where}.{key}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
