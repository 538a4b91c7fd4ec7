"""A Jinja environment for templates that come with a checkpoint, that is, from strangers.

Jinja's immutable sandbox keeps a template away from Python's internals. This module adds limits, because a sandboxed
template can still loop for hours or ask for a string of a terabyte. The idea: no single operation is expensive, and
every loop passes a check. To that end the syntax tree is rewritten before it is compiled, so that whatever creates a
value (operators, literals, slices, calls, filters, output) hands it to a `Guard`, which bounds the size of every value,
the sum of all that was created, and the time. Nothing is global: the guard of a rendering travels in its template
context.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from ernie45.processing.prompt import STAND_INS

MAX_SOURCE_CHARS = 1 << 18  # the longest published templates have about 20,000 characters
MAX_VALUE_CHARS = 1 << 23  # one value; a prompt of 131,072 tokens has about 600,000 characters
MAX_CREATED_CHARS = 1 << 28  # all values of one rendering together
MAX_INT_BITS = 4096
DEADLINE_S = 5.0

_SCALAR_WEIGHT = 8  # characters that a number, None or an opaque object counts as
_NOT_ASCII = re.compile(rf"[^\x00-\x7f{''.join(f'{chr(first)}-{chr(last)}' for first, last in STAND_INS)}]")
_GUARD = "rendering guard"  # the blank keeps template code from naming it

# Only what chat templates use and what takes time and memory in proportion to its input.
_FILTERS = frozenset(
    [
        "abs",
        "capitalize",
        "count",
        "d",
        "default",
        "dictsort",
        "e",
        "escape",
        "first",
        "float",
        "int",
        "items",
        "last",
        "length",
        "list",
        "lower",
        "map",
        "max",
        "min",
        "reject",
        "rejectattr",
        "reverse",
        "safe",
        "select",
        "selectattr",
        "sort",
        "string",
        "title",
        "trim",
        "unique",
        "upper",
    ]
)
_METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(
        [
            "capitalize",
            "count",
            "endswith",
            "find",
            "index",
            "isalnum",
            "isalpha",
            "isascii",
            "isdecimal",
            "isdigit",
            "islower",
            "isnumeric",
            "isspace",
            "isupper",
            "join",
            "lower",
            "lstrip",
            "partition",
            "removeprefix",
            "removesuffix",
            "replace",
            "rfind",
            "rindex",
            "rpartition",
            "rsplit",
            "rstrip",
            "split",
            "splitlines",
            "startswith",
            "strip",
            "title",
            "upper",
        ]
    ),
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
}


class TemplateLimitError(Exception):
    """A template used more time or memory than a rendering may."""


class TemplateRefusedError(Exception):
    """A template called `raise_exception`: the conversation is not one it can express."""


class Guard:
    """The limits of one rendering."""

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        """Start the clock."""
        self._end = time.monotonic() + deadline_s
        self._deadline_s = deadline_s
        self._created = 0
        # Containers never change in the immutable sandbox, so a weight stays true; the reference keeps the id taken.
        self._weights: dict[int, tuple[object, int]] = {}

    def tick(self) -> None:
        """Raise TemplateLimitError once the time is up."""
        if time.monotonic() > self._end:
            raise TemplateLimitError(f"it ran for more than {self._deadline_s} s")

    def weigh(self, value: object) -> int:
        """Return the size of `value` in characters, were it written out; raise if one value may not be that large."""
        weight = self._weight(value)
        if weight > MAX_VALUE_CHARS:
            raise TemplateLimitError(f"it made a value of about {weight} characters, the limit is {MAX_VALUE_CHARS}")
        return weight

    def admit(self, value: Any) -> Any:
        """Check a new value, count it, and return it."""
        self.tick()
        self.weigh(value)
        self._created += _SCALAR_WEIGHT
        if isinstance(value, str):
            self._created += len(value)
        elif isinstance(value, list | tuple | dict):
            self._created += sum(len(item) if isinstance(item, str) else _SCALAR_WEIGHT for item in value)
        if self._created > MAX_CREATED_CHARS:
            raise TemplateLimitError(f"it made more than {MAX_CREATED_CHARS} characters of values")
        return value

    def text(self, value: object) -> str:
        """Return `str(value)`, or raise where the text would be too long."""
        if isinstance(value, str):
            return value
        self.weigh([value])
        return str(value)

    def _weight(self, value: object) -> int:
        if isinstance(value, str):
            return len(value)
        if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise TemplateLimitError(f"it made a number of {value.bit_length()} bits, the limit is {MAX_INT_BITS}")
        if not isinstance(value, list | tuple | dict):
            return _SCALAR_WEIGHT
        known = self._weights.get(id(value))
        if known is None:
            items = [*value, *value.values()] if isinstance(value, dict) else value
            known = (value, _SCALAR_WEIGHT + sum(2 + self._weight(item) for item in items))
            self._weights[id(value)] = known
        return known[1]


class GuardedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with limits. Call `build` to compile and `render_guarded` to render."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        """Configure Jinja as Hugging Face's chat templates expect it."""
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[loopcontrols, _GenerationTag],
            finalize=_finalize,
        )
        self.globals = {
            "range": self.globals["range"],
            "dict": dict,
            "namespace": _OpaqueNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self.filters = {name: _guarded_filter(FILTERS[name]) for name in _FILTERS}
        self.filters |= {"tojson": _tojson, "join": _join, "replace": _replace, "indent": _indent}

    def build(self, source: str) -> tuple[jinja2.Template, nodes.Template]:
        """Compile a template; returns it with its syntax tree as written. Raises: what Jinja and Python raise."""
        tree = self.parse(source)
        guarded = _Rewriter().visit(self.parse(source))
        guarded.set_environment(self)
        code = self.compile(guarded)
        return self.template_class.from_code(self, code, self.make_globals(None)), tree

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # as in jinja2
        """Call a function, method or macro with bounded arguments, and bound the result."""
        guard: Guard = __context[_GUARD]
        # A macro gets its arguments as one tuple. Jinja passes loop variables along in two arguments of its own.
        named = [value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")]
        _check_length(sum(map(guard.weigh, (*args, *named))))
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_growth(guard, owner, __obj.__name__, args)
        return guard.admit(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator after a look at how large the result would be."""
        guard: Guard = context[_GUARD]
        guard.tick()
        sized = (str, list, tuple)
        if operator == "%" and isinstance(left, str) and re.search(r"%[^a-zA-Z%]*[\d*]", left):
            raise TemplateLimitError("it formats text with a width")
        if operator == "+" and isinstance(left, sized) and isinstance(right, sized):
            _check_length(len(left) + len(right))
        elif operator == "*":
            times, what = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and isinstance(what, sized):
                _check_length(len(what) * max(times, 0))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_length(left.bit_length() * max(right, 0), MAX_INT_BITS)
        return guard.admit(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allow what the sandbox allows, and of the methods of plain values only those known to be cheap."""
        for kind, methods in _METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        if isinstance(obj, int | float | bytes | range | type):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Leave `str.format` to `is_safe_attribute`, which refuses it: a field width can ask for any memory."""

    @pass_context
    def guarded_tick(self, context: Context) -> str:
        """Check the time; the rewriter puts a call at the head of every loop body."""
        context[_GUARD].tick()
        return ""

    @pass_context
    def guarded_value(self, context: Context, value: Any) -> Any:
        """Return a list, tuple or dictionary display; `call` has checked it."""
        return value

    @pass_context
    def guarded_concat(self, context: Context, *parts: Any) -> str:
        """Apply the operator `~`."""
        guard: Guard = context[_GUARD]
        texts = [guard.text(part) for part in parts]
        _check_length(sum(map(len, texts)))
        return "".join(texts)

    @pass_context
    def guarded_slice(self, context: Context, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """Apply `value[start:stop:step]`."""
        return value[start:stop:step]


def render_guarded(template: jinja2.Template, variables: Mapping[str, object], guard: Guard) -> str:
    """Render within the limits of `guard`.

    Raises: TemplateLimitError, TemplateRefusedError and whatever the template causes.
    """
    parts: list[str] = []
    size = 0
    for part in template.generate({**variables, _GUARD: guard}):
        guard.tick()
        size += len(part)
        _check_length(size)
        parts.append(part)
    return "".join(parts)


class _Rewriter(NodeTransformer):
    """Routes everything that creates values through the guard."""

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        """Literal text becomes an expression, so that its output is counted: a loop can repeat it at will."""
        return nodes.Const(node.data, lineno=node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return self._call("guarded_concat", self._inner(node).nodes, node)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._call("guarded_value", [self._inner(node)], node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._call("guarded_value", [self._inner(node)], node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        inner: Any = self.generic_visit(node)
        return self._call("guarded_value", [inner], node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        inner: Any = self.generic_visit(node)
        if not isinstance(inner.arg, nodes.Slice):
            return node
        bounds = [part or nodes.Const(None) for part in (inner.arg.start, inner.arg.stop, inner.arg.step)]
        return self._call("guarded_slice", [inner.node, *bounds], node)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        inner: Any = self.generic_visit(node)
        inner.body.insert(0, nodes.ExprStmt(self._call("guarded_tick", [], node), lineno=node.lineno))
        return node

    def _inner(self, node: Any) -> Any:
        return self.generic_visit(node)

    def _call(self, name: str, args: list[nodes.Expr], origin: nodes.Node) -> nodes.Call:
        method = nodes.EnvironmentAttribute(name, lineno=origin.lineno)
        return nodes.Call(method, args, [], None, None, lineno=origin.lineno)


class _OpaqueNamespace(Namespace):
    """Jinja's `namespace`, the one object that a template can change, without its contents when written out.

    Namespaces that hold each other twice, in a chain, would otherwise take exponential time to print.
    """

    def __repr__(self) -> str:
        return "<namespace>"


class _GenerationTag(Extension):
    """`{% generation %}` marks what an assistant wrote, for training masks; it prints like any other text."""

    tags = {"generation"}  # noqa: RUF012  # declared so by Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check_length(length: int, limit: int = MAX_VALUE_CHARS) -> None:
    if length > limit:
        raise TemplateLimitError(f"it asks for a value of size {length}, the limit is {limit}")


def _check_growth(guard: Guard, text: str, method: str, args: tuple[Any, ...]) -> None:
    """Bound the two string methods whose result can be larger than the sum of their inputs."""
    if method == "replace" and len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        _check_length(len(text) + text.count(args[0]) * len(args[1]))
    if method == "join" and len(args) == 1 and isinstance(args[0], list | tuple | dict | str):
        _check_length(guard.weigh(args[0]) + len(text) * len(args[0]))


@pass_context
def _finalize(context: Context, value: object) -> str:
    guard: Guard = context[_GUARD]
    text: str = guard.admit(guard.text(value))
    return text


def _guarded_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap one of Jinja's filters: the value it returns passes the guard."""
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @pass_context
    @wraps(function)
    def guarded(context: Context, *args: Any, **kwargs: Any) -> Any:
        guard: Guard = context[_GUARD]
        guard.tick()
        lead = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        passed = (lead[wanted],) if wanted else ()
        if function is FILTERS["string"]:
            return guard.admit(guard.text(args[0]))
        return guard.admit(function(*passed, *args, **kwargs))

    return guarded


@pass_context
def _tojson(  # the parameters that Hugging Face's templates use
    context: Context,
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as Hugging Face's templates expect it: not escaped for HTML, other scripts kept readable."""
    guard: Guard = context[_GUARD]
    guard.weigh(value)
    if isinstance(indent, int) and indent > 16:
        raise TemplateLimitError(f"it indents JSON by {indent}, the limit is 16")
    encoder = json.JSONEncoder(
        ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys, check_circular=False
    )
    parts: list[str] = []
    size = 0
    for part in encoder.iterencode(value):  # piece by piece: written out at once, it could not be stopped
        guard.tick()
        size += len(part)
        _check_length(size)
        parts.append(part)
    # Stand-ins are left out: escaped, they could not be found again.
    text: str = guard.admit(_NOT_ASCII.sub(_escape, "".join(parts)) if ensure_ascii else "".join(parts))
    return text


def _escape(match: re.Match[str]) -> str:
    return json.dumps(match.group())[1:-1]


@pass_context
def _join(context: Context, value: Iterable[Any], d: object = "", attribute: str | int | None = None) -> str:
    guard: Guard = context[_GUARD]
    items = value if attribute is None else _member(context, value, attribute)
    texts = []
    size = 0
    separator = guard.text(d)
    for item in items:
        guard.tick()
        texts.append(guard.text(item))
        size += len(texts[-1]) + len(separator)
        _check_length(size)
    text: str = guard.admit(separator.join(texts))
    return text


def _member(context: Context, values: Iterable[Any], attribute: str | int) -> Iterable[Any]:
    path = [int(part) if part.isdigit() else part for part in str(attribute).split(".")]
    for value in values:
        for part in path:
            value = context.environment.getitem(value, part)  # noqa: PLW2901  # walks down the path
        yield value


@pass_context
def _replace(context: Context, value: object, old: object, new: object, count: int | None = None) -> str:
    guard: Guard = context[_GUARD]
    text, old_text, new_text = guard.text(value), guard.text(old), guard.text(new)
    _check_growth(guard, text, "replace", (old_text, new_text))
    result: str = guard.admit(text.replace(old_text, new_text, -1 if count is None else count))
    return result


@pass_context
def _indent(context: Context, value: object, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    guard: Guard = context[_GUARD]
    text = guard.text(value)
    margin = width if isinstance(width, str) else None
    lines = text.splitlines(keepends=True)
    _check_length(len(text) + (len(lines) + 1) * (int(width) if margin is None else len(margin)))
    margin = " " * int(width) if margin is None else margin
    indented = [margin + line if (first or idx) and (blank or line.strip()) else line for idx, line in enumerate(lines)]
    result: str = guard.admit("".join(indented))
    return result


def _raise_exception(message: object = "") -> None:
    raise TemplateRefusedError(str(message))


def _strftime_now(format: str) -> str:  # the name templates may use
    if len(format) > 256 or re.search(r"%[^a-zA-Z%]*\d", format):
        raise TemplateLimitError("it formats the time with a width or more than 256 characters")
    return datetime.now().strftime(format)
