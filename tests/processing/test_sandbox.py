"""Templates that mean harm: every one must end soon, in little memory, with a clear error."""

import sys
import threading
import time
import tracemalloc
from typing import Any

import jinja2
import pytest

from ernie45.processing.sandbox import (
    Guard,
    GuardedEnvironment,
    TemplateLimitError,
    TemplateRefusedError,
    render_guarded,
)


def render(source: str, deadline_s: float = 0.4, **variables: Any) -> str:
    template, _ = GuardedEnvironment().build(source)
    return render_guarded(template, variables, Guard(deadline_s))


DOUBLED = "{% set ns = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}BODY" + "{% endfor %}" * 3
KEPT = "{% set ns = namespace(l=[], s='a' * 8000000) %}{% for a in range(9999) %}{% set ns.l = STEP %}{% endfor %}"

# What makes the text or the tree in ns.x about twice as large; sixty times over.
STRING_STEPS = [
    "ns.x + ns.x",
    "ns.x ~ ns.x",
    "ns.x * 2",
    "ns.x.replace('a', 'aa')",
    "ns.x|replace('a', 'aa')",
    "ns.x.join(['', ns.x, ''])",
    "['', ns.x, '']|join(ns.x)",
    "ns.x|indent(1000000, true)",
    "'%s%s' % (ns.x, ns.x)",
    "[ns.x, ns.x]|string",
    "[ns.x, ns.x]|tojson",
]
CONTAINER_STEPS = [
    "[ns.x, ns.x]",
    "(ns.x, ns.x)",
    "{'a': ns.x, 'b': ns.x}",
    "dict(a=ns.x, b=ns.x)",
    "[ns.x] + [ns.x]",
    "[ns.x] * 2",
]

BOMBS = [
    # time
    LOOPS.replace("BODY", ""),
    LOOPS.replace("BODY", "{% set x = 1 %}"),
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "{% set ns = namespace(l=range(99999)|list) %}{% for i in range(99999) %}{% set x = ns.l|sort|list %}{% endfor %}",
    "{% for a in range(99999) if false %}{% endfor %}"
    * 400
    + "{% for a in range(9999) %}{% for b in range(99999) if 0 %}"
    "{% endfor %}{% endfor %}",
    # strings
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** 10 * 'a' }}",
    "{{ ['a'] * 10 ** 9 }}",
    *(DOUBLED.replace("STEP", step) for step in STRING_STEPS),
    DOUBLED.replace("{% set ns.x = STEP %}", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLED.replace("STEP", "f(ns.x)"),
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%.1000000000f' % 1 }}",
    "{{ 'a\nb'|indent(10 ** 10) }}",
    "{{ [[1]]|tojson(indent=10 ** 9) }}",
    "{{ strftime_now('%1000000000d') }}",
    "{{ strftime_now('%c' * 1000) }}",
    "{% for a in range(99999) %}{% for a in range(99) %}" + "x" * 10_000 + "{% endfor %}{% endfor %}",
    "{% set x %}{% for a in range(99999) %}" + "x" * 10_000 + "{% endfor %}{% endset %}",
    # values kept: each is small, all together are not
    "{% set ns = namespace(l=[]) %}{% for a in range(9999) %}{% set ns.l = ns.l + ['a' * 999999] %}{% endfor %}",
    KEPT.replace("STEP", "[ns.l, ns.s[a:]]"),
    KEPT.replace("STEP", "[ns.l, ns.s.strip()]"),
    # containers that share their parts: small in memory, exponential when written out or compared
    *(DOUBLED.replace("STEP", step) for step in CONTAINER_STEPS),
    "{% macro f() %}{{ g(varargs) }}{% endmacro %}{% macro g(x) %}{{ f(x, x) }}{% endmacro %}{{ f(1) }}",
    # numbers
    "{{ 10 ** (10 ** 10) }}",
    "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{{ ('f' * 1000000)|int(0, 16) }}",
    "{{ range(10 ** 12)|list }}",
]


@pytest.mark.parametrize("source", BOMBS)
def test_bombs_are_stopped(source: str) -> None:
    tracemalloc.start()
    started = time.monotonic()
    try:
        with pytest.raises((TemplateLimitError, RecursionError, OverflowError)):
            render(source)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Tracing memory slows Python down several times; the deadline is 0.4 s.
    assert time.monotonic() - started < 5
    assert peak < 1_500_000_000


def test_chains_of_namespaces_print_at_once() -> None:
    chain = "{% set n0 = namespace() %}"
    chain += "".join(f"{{% set n{i + 1} = namespace(a=n{i}, b=n{i}) %}}" for i in range(60))
    assert render(chain + "{{ n60 }}{{ n60|upper }}{{ [n60] }}") == "<namespace><NAMESPACE>[<namespace>]"


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ x.__init__.__globals__ }}",
    "{{ [].__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ namespace.__init__ }}",
    "{{ self.__class__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__ }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{0.__class__}'.format_map({}) }}",
    "{{ ['x']|map(attribute='__class__')|list|first }}",
    "{{ x.append(1) }}",
    "{{ d.update({'a': 1}) }}",
    "{{ d.pop('k') }}",
    "{{ dict.fromkeys('ab') }}",
    "{{ dict.mro() }}",
    "{{ ''.encode() }}",
    "{{ (1).to_bytes(10, 'big') }}",
    "{{ ''.center(5) }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% extends 'x' %}",
    "{{ lipsum() }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_nothing_beyond_the_template_is_reached(source: str) -> None:
    variables: dict[str, Any] = {"x": [1], "d": {"k": 1}}
    try:
        text = render(source, **variables)
    except (jinja2.TemplateError, TypeError):
        text = ""
    assert text == "", "an undefined value prints nothing"
    assert variables == {"x": [1], "d": {"k": 1}}


@pytest.mark.parametrize("name", ["center", "attr", "batch", "format", "pprint", "wordwrap", "xmlattr", "urlize"])
def test_filters_without_a_bound_do_not_exist(name: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=name):
        GuardedEnvironment().build(f"{{{{ x|{name} }}}}")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ x|tojson }}", '[{"a": "<é>"}]'),
        ("{{ x|tojson(ensure_ascii=True) }}", '[{"a": "<\\u00e9>"}]'),
        ("{{ x|tojson(indent=2) }}", '[\n  {\n    "a": "<é>"\n  }\n]'),
        ("{{ x|tojson(separators=(',', ':')) }}", '[{"a":"<é>"}]'),
        ("{{ {'b': 1, 'a': 2}|tojson(sort_keys=true) }}", '{"a": 2, "b": 1}'),
        ("{{ x }}", "[{'a': '<é>'}]"),
        ("{% for k, v in x[0].items() %}{{ k ~ v ~ 1 }}{% endfor %}", "a<é>1"),
        ("{% for k, v in x[0]|items %}{{ k + v }}{% endfor %}", "a<é>"),
        ("{{ x[0].a[1:] }}{{ x[::-1]|length }}{{ x[0:][0].get('zz', 'none') }}", "é>1none"),
        ("{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "10"),
        ("{{ 'a,b'.split(',')|join('-') }}{{ 'ab'.replace('a', 'c') }}{{ 'x'.join(['1', '2']) }}", "a-bcb1x2"),
        ("{{ ' a '|trim }}|{{ ' a '.strip() }}|{{ 'a\nb\n\nc'|indent(2) }}", "a|a|a\n  b\n\n  c"),
        ("{{ 'a\nb'|indent(2, first=true) }}", "  a\n  b"),
        ("{{ x|map(attribute='a')|join(', ') }}{{ x|join('', attribute='a') }}", "<é><é>"),
        ("{{ x|selectattr('a', 'equalto', '<é>')|list|length }}", "1"),
        (
            "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}{{ i }}"
            "{% endfor %}",
            "013",
        ),
        ("{% generation %}a{{ 1 }}{% endgeneration %}b", "a1b"),
        ("{% macro f(a, b='z') %}{{ a }}{{ b }}{{ caller() if caller else '' }}{% endmacro %}{{ f(1) }}", "1z"),
        ("{% set x %}a{{ 2 ** 3 }}{% endset %}{{ x }}{{ undefined_name }}{{ none }}", "a8None"),
        ("{{ '%s-%d' % ('a', 3) }}{{ 7 % 4 }}{{ 'a' * 3 }}{{ [1] + [2] }}", "a-33aaa[1, 2]"),
        ("{%- if x is iterable and x is not string and 'a' in x[0] -%} yes {%- endif -%}", "yes"),
        ("{{ strftime_now('%Y')|length }}", "4"),
        (
            "{% for x in [3, 1, 2]|sort(reverse=true) %}{{ loop.index }}{{ x }}{{ ',' if not loop.last }}{% endfor %}",
            "13,22,31",
        ),
        ("  {% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
    ],
)
def test_what_templates_need_works(source: str, expected: str) -> None:
    assert render(source, x=[{"a": "<é>"}]) == expected


def test_refusal_carries_its_message() -> None:
    with pytest.raises(TemplateRefusedError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_deadline_holds_in_any_thread_and_leaves_tracing_alone() -> None:
    before = sys.gettrace()
    outcome: list[str] = []

    def work() -> None:
        try:
            render(LOOPS.replace("BODY", ""), deadline_s=0.1)
        except TemplateLimitError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(5)
    assert outcome == ["it ran for more than 0.1 s"]
    assert sys.gettrace() is before


def test_long_conversations_are_no_bomb() -> None:
    source = "{% for m in messages %}{% set last = messages[1:]|length %}{{ m.role ~ m.content|trim }}{% endfor %}"
    messages = [{"role": "user", "content": "x" * 1000}] * 1000
    assert len(render(source, messages=messages, deadline_s=5.0)) == 1_004_000
