"""What an answer may be forced to: JSON, a schema, a regular expression, a choice, a grammar, tool calls.

A `Constraint` is checked as far as that goes without a vocabulary, and is a small value that travels between
processes; `grammar.py` compiles it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ernie45.errors import RequestError
from ernie45.processing.json_schema import check_schema
from ernie45.processing.messages import check_tools

Kind = Literal["json", "regex", "choice", "grammar", "tool_calls"]

MAX_REGEX_CHARS = 1 << 13
MAX_GRAMMAR_CHARS = 1 << 16
MAX_GRAMMAR_RULES = 300  # a chain of 3,000 rules overflows the compiler's stack and ends the process; 1,000 are fine
MAX_GBNF_DEPTH = 32  # the conversion to Lark recurses, and Lark takes about 50 levels
MAX_CHOICES = 1024
MAX_TOOLS = 128

# Strings, regular expressions and comments of Lark's syntax: what stands in them is text, not grammar.
_LARK_TEXT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/(?:\\.|[^/\\\n])+/')
_GBNF_TEXT = re.compile(r'"(?:\\.|[^"\\\n])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*')


@dataclass(frozen=True)
class Constraint:
    """One constraint; made by the class methods, equal when it allows the same."""

    kind: Kind
    source: str
    """JSON text, for "regex" and "grammar" the text itself."""
    where: str = field(default="", compare=False)
    """The request's field, for errors."""

    @classmethod
    def json_object(cls, where: str = "response_format") -> "Constraint":
        """Any JSON object."""
        return cls("json", json.dumps({"type": "object"}), where)

    @classmethod
    def json_schema(cls, schema: object, where: str = "json_schema") -> "Constraint":
        """JSON that satisfies a schema (an object, or JSON text). Raises: RequestError naming what is unsupported."""
        return cls("json", json.dumps(check_schema(schema, where), ensure_ascii=False), where)

    @classmethod
    def regex(cls, pattern: object, where: str = "regex") -> "Constraint":
        """Text that a regular expression (Rust's syntax: no look-around, no back-references) matches as a whole."""
        return cls("regex", _checked_text(pattern, where, MAX_REGEX_CHARS), where)

    @classmethod
    def choice(cls, choices: object, where: str = "choice") -> "Constraint":
        """One of several texts."""
        if not isinstance(choices, Sequence) or isinstance(choices, str | bytes) or not choices:
            raise RequestError(f"{where} must be a list of texts with at least one entry")
        if len(choices) > MAX_CHOICES:
            raise RequestError(f"{where} has {len(choices)} entries, the limit is {MAX_CHOICES}")
        texts = [_checked_text(text, f"{where}[{idx}]", MAX_GRAMMAR_CHARS) for idx, text in enumerate(choices)]
        if sum(map(len, texts)) > MAX_GRAMMAR_CHARS:
            raise RequestError(f"{where} has {sum(map(len, texts))} characters, the limit is {MAX_GRAMMAR_CHARS}")
        return cls("choice", json.dumps(list(dict.fromkeys(texts)), ensure_ascii=False), where)

    @classmethod
    def grammar(cls, text: object, where: str = "grammar") -> "Constraint":
        """A context-free grammar: Lark's syntax with a rule `start`, or GBNF (`root ::= ..`).

        Raises: RequestError if it is too long or refers to special tokens, which belong to templates alone.
        """
        text = _checked_text(text, where, MAX_GRAMMAR_CHARS)
        if is_gbnf(text):
            _check_gbnf(text, where)
        else:
            check_lark(text, where)
        return cls("grammar", text, where)

    @classmethod
    def tool_calls(
        cls,
        tools: Sequence[Mapping[str, Any]],
        name: str | None = None,
        *,
        parallel: bool = True,
        required: bool = True,
    ) -> "Constraint":
        """Calls of the given tools and nothing else, or, if they are not `required`, text and calls.

        Where calls are not required, arguments keep to the schemas of those tools that are `strict`; those of others are any
        object.

        Args: tools: as in the request. name: the only one to call. parallel: whether there may be several calls.
        Raises: RequestError for an unknown name, or parameters that cannot be enforced.
        """
        asked = {
            "functions": _functions(tools, name, all_strict=required),
            "parallel": parallel,
            "required": required,
        }
        return cls("tool_calls", json.dumps(asked, ensure_ascii=False), "tools")

    @classmethod
    def calls_or(
        cls, tools: Sequence[Mapping[str, Any]], otherwise: "Constraint", *, parallel: bool = True
    ) -> "Constraint":
        """Either calls of the given tools, or an answer that satisfies another constraint: agents with tools and a typed result.

        Arguments are held to schemas as `tool_calls` does where calls are not required.
        """
        assert otherwise.kind != "tool_calls", "an answer, not calls"
        asked = {
            "functions": _functions(tools, None, all_strict=False),
            "parallel": parallel,
            "required": True,
            "otherwise": [otherwise.kind, otherwise.source],
        }
        return cls("tool_calls", json.dumps(asked, ensure_ascii=False), otherwise.where)

    @property
    def leaves_text_free(self) -> bool:
        """Whether the answer may be any text, and only calls in it are constrained."""
        return self.kind == "tool_calls" and not json.loads(self.source)["required"]


def asked_constraint(request: Mapping[str, Any]) -> Constraint | None:
    """Read the constraint of a request in any of its spellings; None if there is none.

    Understood are `response_format` (OpenAI), `guided_json`, `guided_regex`, `guided_choice`, `guided_grammar`
    (FastDeploy, older vLLM) and `structured_outputs` (vLLM).
    Raises: RequestError for more than one, and for what is malformed or not supported.
    """
    found = [_response_format(request["response_format"])] if request.get("response_format") is not None else []
    for spelling in ("json", "regex", "choice", "grammar"):
        if request.get(f"guided_{spelling}") is not None:
            found.append(_make(spelling, request[f"guided_{spelling}"], f"guided_{spelling}"))
    if request.get("structured_outputs") is not None:
        found.append(_structured_outputs(request["structured_outputs"]))
    asked = [constraint for constraint in found if constraint is not None]
    if len(asked) > 1:
        raise RequestError(f"{' and '.join(one.where for one in asked)} exclude each other: send one")
    return asked[0] if asked else None


def is_gbnf(text: str) -> bool:
    """Whether a grammar is written as `root ::= ..` and not in Lark's syntax."""
    return "::=" in _GBNF_TEXT.sub("", text)


def check_lark(text: str, where: str) -> None:
    """Refuse what would let a grammar out of its own text: special tokens, directives, other grammars."""
    grammar = _LARK_TEXT.sub('""', text)
    special = re.search(r"<[^>\n]*>", grammar)
    if special:
        raise RequestError(f"{where} refers to the special token {special.group()}: answers cannot hold those")
    _check_rules(grammar.count(":"), where)
    directive = re.search(r"%(?!ignore\b|import\b)\w*|@\w+", grammar)
    if directive:
        raise RequestError(f"{where} uses {directive.group()}, which is not supported: write it as rules")


def _check_gbnf(text: str, where: str) -> None:
    grammar = _GBNF_TEXT.sub("", text)
    _check_rules(grammar.count("::="), where)
    depth = deepest = 0
    for bracket in re.findall(r"[()]", grammar):
        depth += 1 if bracket == "(" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_GBNF_DEPTH:
        raise RequestError(f"{where} is nested {deepest} levels deep, the limit is {MAX_GBNF_DEPTH}: add rules")


def _check_rules(num_rules: int, where: str) -> None:
    if num_rules > MAX_GRAMMAR_RULES:
        raise RequestError(f"{where} has {num_rules} rules, the limit is {MAX_GRAMMAR_RULES}")


def _functions(tools: Sequence[Mapping[str, Any]], name: str | None, *, all_strict: bool) -> dict[str, Any]:
    """The schemas of arguments by function; those of tools that need not be kept to are any object."""
    checked = check_tools(tools)
    if not checked or len(checked) > MAX_TOOLS:
        raise RequestError(f"tools has {len(checked)} entries, a forced call needs 1 to {MAX_TOOLS}")
    names = [tool["function"]["name"] for tool in checked]
    if name is not None and name not in names:
        raise RequestError(f"tool_choice names {name!r}, which is not among the tools: {', '.join(names)}")
    return {
        tool["function"]["name"]: _parameters(tool["function"], f"tools[{idx}].function.parameters")
        if all_strict or tool["function"].get("strict")
        else {"type": "object"}
        for idx, tool in enumerate(checked)
        if name in (None, tool["function"]["name"])
    }


def _response_format(asked: object) -> Constraint | None:
    kind = asked.get("type") if isinstance(asked, Mapping) else None
    if not isinstance(asked, Mapping) or kind not in ("text", "json_object", "json_schema"):
        raise RequestError(f"response_format.type is {kind!r}, expected text, json_object or json_schema")
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint.json_object()
    inner = asked.get("json_schema")
    if not isinstance(inner, Mapping) or inner.get("schema") is None:
        raise RequestError("response_format.json_schema needs a schema")
    return Constraint.json_schema(inner["schema"], "response_format.json_schema.schema")


def _structured_outputs(asked: object) -> Constraint | None:
    if not isinstance(asked, Mapping):
        raise RequestError(f"structured_outputs must be an object, not {type(asked).__name__}")
    given = {key: value for key, value in asked.items() if value is not None and value is not False}
    known = ("json", "regex", "choice", "grammar", "json_object")
    for key in given:
        if key not in known:
            raise RequestError(f"structured_outputs.{key} is not supported, known are {', '.join(known)}")
    if len(given) > 1:
        raise RequestError(f"structured_outputs has {' and '.join(given)}, which exclude each other: send one")
    return next((_make(key, value, f"structured_outputs.{key}") for key, value in given.items()), None)


def _make(spelling: str, value: Any, where: str) -> Constraint:
    if spelling == "json_object":
        return Constraint.json_object(where)
    make = {
        "json": Constraint.json_schema,
        "regex": Constraint.regex,
        "choice": Constraint.choice,
        "grammar": Constraint.grammar,
    }
    return make[spelling](value, where)


def _checked_text(text: object, where: str, max_chars: int) -> str:
    if not isinstance(text, str) or not text:
        raise RequestError(f"{where} must be text, and not empty")
    if len(text) > max_chars:
        raise RequestError(f"{where} has {len(text)} characters, the limit is {max_chars}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where} holds half of a surrogate pair at character {error.start}") from error
    return text


def _parameters(function: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the schema of a function's arguments; one without parameters takes none."""
    if function.get("parameters") is None:
        return {"type": "object", "additionalProperties": False}
    schema = check_schema(function["parameters"], where)
    if schema.get("type", "object") != "object":
        raise RequestError(f"{where}.type is {schema['type']!r}, expected 'object'")
    return {**schema, "type": "object"}
