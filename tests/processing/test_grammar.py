"""Masks are exact, whole answers satisfy their constraint, and what cannot be enforced is refused."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import ConfigError, RequestError
from ernie45.processing import grammar
from ernie45.processing.answer_format import ANSWER_FORMATS, PLAIN, AnswerFormat, Start
from ernie45.processing.answer_parser import AnswerParser, collected
from ernie45.processing.constraint import Constraint
from ernie45.processing.detokenizer import Detokenizer
from ernie45.processing.grammar import Grammars, Matcher
from ernie45.processing.tokenizer import Tokenizer, load_tokenizer
from ernie45.processing.vocabulary import Vocabulary

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

X1 = ANSWER_FORMATS["ernie_thinking"]
HERMES = AnswerFormat(name="hermes", thought=("<think>", "</think>"), tool_call=("<tool_call>", "</tool_call>"))
LENT = AnswerFormat(name="lent", tool_call=("<tool_call>", "</tool_call>"))
END, CLOSE_THOUGHT = 256, 258
EXTRA = [
    b"ab",
    b"abc",
    b"ba",
    b"\n\n",
    b'{"',
    b'":',
    b'"a',
    b"}}",
    b"",
    b"</think>",
    b">{",
    b">\n",
    "é".encode(),
    b"\xa9b",
]


@dataclass(frozen=True)
class Tiny:
    """All bytes, three special tokens, some longer tokens and a hole; `tags` says whether tags are special."""

    answer_format: AnswerFormat = PLAIN
    tags: bool = True
    stop_ids: frozenset[int] = frozenset({END})
    vocabulary: Vocabulary = field(init=False)

    def __post_init__(self) -> None:
        names = ["</s>", *(self.answer_format.tags if self.tags else ("<x>", "<y>"))]
        data = (*(bytes([i]) for i in range(256)), *(name.encode() for name in names), *EXTRA)
        special = {name: 256 + i for i, name in enumerate(names)}
        object.__setattr__(self, "vocabulary", Vocabulary(data=data, special=special))

    def ids(self, text: str) -> list[int]:
        """One id per byte, tags as their tokens where they have one."""
        pattern = "|".join(map(re.escape, self.vocabulary.special)) if self.tags else "$^"
        out: list[int] = []
        for part in re.split(f"({pattern})", text):
            out += [self.vocabulary.special[part]] if part in self.vocabulary.special else part.encode()
        return out


def bits_of(matcher: Matcher, num_ids: int) -> np.ndarray:
    bits = np.full((num_ids + 31) // 32 + 1, -1, dtype=np.int32)
    matcher.mask(bits)
    assert not np.unpackbits(bits.view(np.uint8), bitorder="little")[num_ids:].any(), "padding is not allowed"
    return np.unpackbits(bits.view(np.uint8), bitorder="little")[:num_ids].astype(bool)


def takes(tokenizer: Tiny, constraint: Constraint, text: str, start: Start = "answer") -> bool | None:
    """Whether a text is a whole answer; None if it is not even the beginning of one."""
    matcher = Grammars(tokenizer).matcher(constraint, start)
    return matcher.complete if all(map(matcher.accept, tokenizer.ids(text))) else None


ODD = ['"', "\\", "\n", "a\nb", "/", "é😀", "{}", "\x00\x7f"]
FINITE: list[tuple[Constraint, set[str]]] = [
    (Constraint.choice(["a", "ab", "abc", "ba", "bé"]), {"a", "ab", "abc", "ba", "bé"}),
    (Constraint.choice(ODD), set(ODD)),
    (
        Constraint.regex("(a|b){1,2}c?|é/|\x7f"),
        {*map("".join, product(["a", "b", "aa", "ab", "ba", "bb"], ["", "c"])), "é/", "\x7f"},
    ),
    (Constraint.regex("^(a|ba)$"), {"a", "ba"}),
    (Constraint.grammar('start: x "b"?\nx: "a" | "(" x ")" | "b"'), set()),  # endless: compared with single bytes only
    (Constraint.grammar('root ::= "a" ("b" | "c")? | [b] "a"'), {"a", "ab", "ac", "ba"}),
    (Constraint.json_schema({"enum": ["ab", 1, None]}), {'"ab"', "1", "null"}),
]


@pytest.mark.parametrize(("constraint", "language"), FINITE)
def test_masks_are_what_trying_every_token_gives(constraint: Constraint, language: set[str]) -> None:
    tokenizer = Tiny()
    data = tokenizer.vocabulary.data
    grammars = Grammars(tokenizer)
    prefixes = {text.encode()[:n] for text in language for n in range(len(text.encode()) + 1)}
    rng = random.Random(0)
    for _ in range(12):
        matcher, written = grammars.matcher(constraint), b""
        for _ in range(12):
            allowed = bits_of(matcher, len(data))
            for token, more in enumerate(data):
                if token in tokenizer.vocabulary.special_ids:
                    assert allowed[token] == (token == END and matcher.complete)
                    continue
                # Byte by byte, without the trie that masks are made with.
                probe = grammars.matcher(constraint)
                assert bool(allowed[token]) == (bool(more) and all(map(probe.accept, written + more)))
                if language:
                    assert bool(allowed[token]) == (bool(more) and written + more in prefixes)
            if language:
                assert matcher.complete == (written in {text.encode() for text in language})
            token = rng.choice(np.flatnonzero(allowed).tolist())
            if token == END:
                break
            assert matcher.accept(token)
            written += data[token]


def write(tokenizer: Tokenizer, matcher: Matcher, seed: int, *, max_tokens: int = 400) -> list[int] | None:
    """An answer by random logits that grow impatient; None if it does not come to its end."""
    data = tokenizer.vocabulary.data
    rng = np.random.default_rng(seed)
    closing = [i for i, text in enumerate(data) if text and not text.strip(b' \n"}],')] + sorted(tokenizer.stop_ids)
    closing += [i for text, i in tokenizer.special_tokens.items() if text.startswith("</")]
    ids: list[int] = []
    while len(ids) < max_tokens:
        allowed = bits_of(matcher, len(data))
        logits = rng.normal(size=len(data))
        logits[closing] += len(ids) / 15
        logits[~allowed] = -np.inf
        token = int(logits.argmax())
        if token in tokenizer.stop_ids:
            assert matcher.complete
            return ids
        assert matcher.accept(token)
        ids.append(token)
        if matcher.finished:
            assert matcher.complete
            return ids
    return None


NUMBERS: list[dict[str, Any]] = [
    {"minimum": -3},
    {"maximum": 12.5},
    {"exclusiveMinimum": 0, "exclusiveMaximum": 7},
    {"multipleOf": 0.5},
    {},
]
STRINGS: list[dict[str, Any]] = [
    *({}, {"minLength": 1, "maxLength": 4}, {"pattern": "^[a-z]+$"}, {"pattern": "[0-9]{2}"}, {"pattern": "^a|b$"}),
    *({"format": "date"}, {"format": "date-time"}, {"format": "uuid"}, {"format": "email"}),
]
VALUES = ["a", 'b"c', "é😀", "\n", 1, 2.5, None, True, {"x": 1}, [1, "z"]]
NODE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}},
    "required": ["v"],
    "additionalProperties": False,
}
leaves = st.one_of(
    st.sampled_from(STRINGS).map(lambda more: {"type": "string", **more}),
    st.tuples(st.sampled_from(["integer", "number"]), st.sampled_from(NUMBERS)).map(lambda p: {"type": p[0], **p[1]}),
    st.sampled_from(["boolean", "null"]).map(lambda name: {"type": name}),
    st.lists(st.sampled_from(VALUES), min_size=1, max_size=4).map(lambda values: {"enum": values}),
    st.sampled_from(VALUES).map(lambda value: {"const": value}),
    st.just({"$ref": "#/$defs/n"}),
    st.just({"type": ["string", "integer", "null"], "minimum": 0, "maxLength": 3}),
)


@st.composite
def objects(draw: Any, inner: Any) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(["a", "b", "c d", "é", '"q', "$ref", "type"]), unique=True, max_size=4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: draw(inner) for name in names}}
    schema["required"] = [name for name in [*names, "zz"] if draw(st.booleans())]
    more = draw(st.sampled_from([None, True, False, {"type": "integer"}]))
    if more is not None:
        schema["additionalProperties"] = more
    if draw(st.booleans()):
        schema["patternProperties"] = {"^x_": {"type": "boolean"}}
    return schema


@st.composite
def arrays(draw: Any, inner: Any) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array", "items": draw(inner)}
    if draw(st.booleans()):
        schema["minItems"] = draw(st.integers(0, 2))
        schema["maxItems"] = schema["minItems"] + draw(st.integers(0, 2))
    if draw(st.booleans()):
        schema["prefixItems"] = [draw(inner)]
    return schema


schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        objects(inner),
        arrays(inner),
        st.tuples(st.sampled_from(["anyOf", "oneOf", "allOf"]), st.lists(inner, min_size=1, max_size=2)).map(
            lambda pair: {pair[0]: pair[1]}
        ),
    ),
    max_leaves=6,
)
_grammars: dict[str, Grammars] = {}


def grammars_of(folder: Path, chat_format: str | None = None) -> tuple[Tokenizer, Grammars]:
    tokenizer = load_tokenizer(folder, chat_format=chat_format)
    return tokenizer, _grammars.setdefault(f"{folder} {chat_format}", Grammars(tokenizer))


@pytest.mark.parametrize("folder_name", ["ernie_folder", "bpe_folder"])
@given(schema=schemas, seed=st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_every_whole_answer_satisfies_its_schema(
    schema: dict[str, Any], seed: int, folder_name: str, request: pytest.FixtureRequest
) -> None:
    tokenizer, grammars = grammars_of(request.getfixturevalue(folder_name))
    schema = {**schema, "$defs": {"n": NODE}}
    try:
        matcher = grammars.matcher(Constraint.json_schema(schema))
    except RequestError as error:
        # What the generator makes and nobody could satisfy, or has not decided on.
        assert re.search("Unsatisfiable|oneOf|intersection", str(error))  # noqa: PT017  # one of two outcomes
        return
    ids = write(tokenizer, matcher, seed)
    if ids is not None:
        jsonschema.Draft202012Validator(schema).validate(json.loads(tokenizer.decode(ids)))


@given(seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_a_json_object_is_one(seed: int, ernie_folder: Path) -> None:
    tokenizer, grammars = grammars_of(ernie_folder)
    ids = write(tokenizer, grammars.matcher(Constraint.json_object()), seed)
    assert ids is None or isinstance(json.loads(tokenizer.decode(ids)), dict)


@given(
    choices=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_a_choice_is_one_of_them(choices: list[str], seed: int, bpe_folder: Path) -> None:
    tokenizer, grammars = grammars_of(bpe_folder)
    ids = write(tokenizer, grammars.matcher(Constraint.choice(choices)), seed)
    assert ids is not None
    assert tokenizer.decode(ids) in choices


REGEXES = [
    r"\d{3}-\d{4}",
    "[A-Z][a-z]+( [A-Z][a-z]+)?",
    r"(yes|no)\.",
    r"[^\n]{0,5}",
    '"[^"]*"',
    "a/b|/",
    r"\w+@\w+\.com",
    "(?i)ab+",
]


@pytest.mark.parametrize("pattern", REGEXES)
def test_an_answer_matches_its_expression_as_a_whole(pattern: str, bpe_folder: Path) -> None:
    tokenizer, grammars = grammars_of(bpe_folder)
    whole = [write(tokenizer, grammars.matcher(Constraint.regex(pattern)), seed) for seed in range(8)]
    texts = [tokenizer.decode(ids) for ids in whole if ids is not None]
    assert texts
    assert [text for text in texts if not re.fullmatch(pattern, text)] == []


TOOLS: list[dict[str, Any]] = [
    {
        "name": "weather",
        "parameters": {"properties": {"city": {"type": "string", "maxLength": 9}}, "required": ["city"]},
    },
    {"name": 'no"w'},
]


@pytest.mark.parametrize("name", ["ernie_thinking", "ernie_vl_thinking"])
@pytest.mark.parametrize("start", ["open", "thought", "answer"])
@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls_are_calls(name: str, start: Start, parallel: bool, ernie_folder: Path) -> None:
    tokenizer, grammars = grammars_of(ernie_folder, name)
    constraint = Constraint.tool_calls(TOOLS, parallel=parallel)
    num_whole = 0
    for seed in range(6):
        ids = write(tokenizer, grammars.matcher(constraint, start), seed)
        if ids is None:
            continue
        num_whole += 1
        answer = parsed(tokenizer, ids, start)
        assert answer.content == ""
        assert answer.tool_calls
        assert parallel or len(answer.tool_calls) == 1
        for call in answer.tool_calls:
            assert call.error is None
            arguments = json.loads(call.arguments)
            assert call.name in ("weather", 'no"w')
            assert "city" in arguments if call.name == "weather" else arguments == {}
    assert num_whole


STRICT = {"name": "weather", "strict": True, "parameters": TOOLS[0]["parameters"]}
LOOSE = {"name": "any", "parameters": {"properties": {"x": {"unknown keyword": 1}}}}


def auto(parallel: bool = True) -> Constraint:
    return Constraint.tool_calls([STRICT, LOOSE], parallel=parallel, required=False)


@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("answer_format", [X1, HERMES, LENT], ids=lambda one: one.name)
@pytest.mark.parametrize("parallel", [True, False])
def test_calls_in_free_text_keep_to_their_schema(answer_format: AnswerFormat, tags: bool, parallel: bool) -> None:
    """A writer that likes to spell tags and calls, right and wrong; refused, it looks for a way out of the call."""
    tokenizer = Tiny(answer_format, tags)
    grammars = Grammars(tokenizer)
    snippets = ["<tool_call>", "</tool_call>", "\n", '{"name": "', "weather", "any", '", "arguments": ', "{}", "}", "a"]
    snippets += ['{"city": "b', "<response>", "</response>", "<tool_", "call>", '{"city": 1}', " ", "<"]
    snippets += [f'<tool_call>\n{{"name": "{name}", "arguments": ' for name in ("weather", "any", "other")]
    ways_out = [*(tokenizer.ids(text) for text in ('"', "}", "\n", "</tool_call>", '{"city": "', "a"))]
    num_calls = 0
    for seed in range(40):
        rng = random.Random(seed)
        matcher, written = grammars.matcher(auto(parallel), "answer"), b""
        for _ in range(40):
            snippet = rng.choice(snippets)
            spelled = list(snippet.encode()) if rng.random() < 0.2 else tokenizer.ids(snippet)
            for ids in (spelled, *ways_out):
                taken = list(takewhile(matcher.accept, ids))
                written += b"".join(tokenizer.vocabulary.data[i] for i in taken)
                if taken == ids:
                    break
        parser = AnswerParser(answer_format, start="answer", tools=True)
        answer = collected([*parser.push(written.decode()), *parser.finish()])
        whole = [call for call in answer.tool_calls if call.error is None]
        assert len(answer.tool_calls) - len(whole) <= (0 if matcher.complete else 1)
        assert parallel or len(answer.tool_calls) <= 1
        num_calls += len(whole)
        for call in whole:
            arguments = json.loads(call.arguments)
            assert call.name in ("weather", "any")
            assert call.name == "any" or isinstance(arguments["city"], str)
    assert num_calls > 10


@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("answer_format", [X1, HERMES, LENT], ids=lambda one: one.name)
def test_what_free_text_with_calls_may_be(answer_format: AnswerFormat, tags: bool) -> None:
    tokenizer = Tiny(answer_format, tags)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "b"}}\n</tool_call>'
    response = f"<response>\nA\n</response>\n{call}\n" if answer_format.response else "A\n"
    for text in ("", "A\n\n< {", call, f"A\n\n{call}\n{call}\nB", response, "a tool_call> b <tool_call", "\n" + call):
        assert takes(tokenizer, auto(), text), text
    for text in ("<tool_call>", call.removesuffix("</tool_call>"), f"A{call[:20]}"):
        assert takes(tokenizer, auto(), text) is False, text
    wrong = call.replace('"b"', "1")
    for text in ("<tool_call>A", wrong, f"A{wrong}", f"{call}{wrong}", call.replace("weather", "other")):
        assert takes(tokenizer, auto(), text) is None, text
    assert takes(tokenizer, auto(parallel=False), f"A{call}\nB")
    assert takes(tokenizer, auto(parallel=False), f"{call}{call}") is None
    if tags:  # spelled out, the tag opens a call for the parser as well
        matcher = Grammars(tokenizer).matcher(auto())
        assert all(map(matcher.accept, b"A<tool_call"))
        assert not matcher.accept(ord(">"))


@pytest.mark.parametrize("name", ["ernie_thinking", "ernie_vl_thinking"])
@pytest.mark.parametrize("start", ["open", "thought", "answer", "text"])
def test_free_text_with_calls_comes_behind_the_thought(name: str, start: Start, ernie_folder: Path) -> None:
    tokenizer, grammars = grammars_of(ernie_folder, name)
    special = tokenizer.special_tokens
    thought = {"open": "<think>\na</think>\n\n", "thought": "a\n</think>\n"}.get(start, "")
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "b"}}\n</tool_call>'

    def ids(text: str) -> list[int]:
        parts = re.split("(</?think>|</?tool_call>)", text)
        return [i for part in parts for i in ([special[part]] if part in special else tokenizer.encode(part))]

    matcher = grammars.matcher(auto(), start)
    assert all(map(matcher.accept, ids(f"{thought}A\n{call}\n")))
    assert matcher.complete
    answer = parsed(tokenizer, ids(f"{thought}A\n{call}\n"), start)
    assert (answer.reasoning, answer.content) == ("a" if thought else "", "A")
    assert [called.name for called in answer.tool_calls] == ["weather"]
    matcher = grammars.matcher(auto(), start)
    assert not all(map(matcher.accept, ids(f"{thought}A\n{call.replace('weather', 'other')}\n")))


@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("answer_format", [X1, HERMES, LENT], ids=lambda one: one.name)
def test_either_calls_or_the_typed_answer(answer_format: AnswerFormat, tags: bool) -> None:
    tokenizer = Tiny(answer_format, tags)
    schema = {"type": "object", "properties": {"n": {"enum": [1]}}, "required": ["n"], "additionalProperties": False}
    constraint = Constraint.calls_or([STRICT, LOOSE], Constraint.json_schema(schema))
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "b"}}\n</tool_call>'
    wrapped = answer_format.response is not None and not tags
    result = '<response>\n{"n":1}\n</response>' if wrapped else '{"n":1}'
    for text in (call, f"{call}\n{call}", result):
        assert takes(tokenizer, constraint, text), text
    for text in (
        "A",
        f"{result}{call}",
        f"A{call}",
        call.replace('"b"', "1"),
        call.replace("weather", "other"),
        '{"n":2}',
    ):
        assert takes(tokenizer, constraint, text) is None, text
    once = Constraint.calls_or([STRICT], Constraint.json_schema(schema), parallel=False)
    assert takes(tokenizer, once, call)
    assert takes(tokenizer, once, f"{call}\n{call}") is None


def parsed(tokenizer: Tokenizer, ids: Sequence[int], start: Start) -> Any:
    detokenizer = Detokenizer(tokenizer, keep=tokenizer.answer_tag_ids)
    text = "".join([*map(detokenizer.push, ids), detokenizer.finish()])
    parser = AnswerParser(tokenizer.answer_format, start=start, tools=True)
    return collected([*parser.push(text), *parser.finish()])


@pytest.mark.parametrize("start", ["open", "thought", "answer"])
@pytest.mark.parametrize("name", ["ernie", "ernie_vl", "ernie_thinking"])
def test_the_constraint_begins_behind_the_thought(name: str, start: Start, ernie_folder: Path) -> None:
    tokenizer, grammars = grammars_of(ernie_folder, name)
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    num_whole = 0
    for seed in range(6):
        ids = write(tokenizer, grammars.matcher(Constraint.json_schema(schema), start), seed)
        if ids is not None:
            num_whole += 1
            jsonschema.validate(json.loads(parsed(tokenizer, ids, start).content), schema)
    assert num_whole


THOUGHTS: list[tuple[Start, str, bool | None]] = [
    ("thought", "hm {}</think>{}", True),
    ("thought", "hm\n</think>\n\n<response>\n{}\n</response>\n", True),
    ("thought", "hm\n</think>\n\n<response>\n{}", False),
    ("thought", "hm é {}", False),
    ("thought", "</think>{}", True),
    ("thought", "a</think>b", None),
    ("open", "<think>\nhm</think>\n\n{}", True),
    ("open", "<response>{}</response>", True),
    ("open", "hm</think>{}", None),
    ("answer", "<response>\n{}\n</response>\n", True),
    ("answer", "<think>", None),
    ("answer", "a", None),
]


@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize(("start", "text", "expected"), THOUGHTS)
def test_thoughts_and_responses_around_a_constraint(start: Start, text: str, expected: bool | None, tags: bool) -> None:
    if not tags and "<response>" not in text and expected is not None:
        # Tags spelled as text have to be there.
        text = re.sub(r"\{\}$", "<response>{}</response>", text)
    assert takes(Tiny(X1, tags), Constraint.json_object(), text, start) == expected


def test_a_tag_may_end_inside_a_token() -> None:
    tokenizer = Tiny(HERMES, tags=False)
    matcher = Grammars(tokenizer).matcher(Constraint.json_object(), "thought")
    assert all(map(matcher.accept, b"hm </think"))
    allowed = bits_of(matcher, len(tokenizer.vocabulary.data))
    data = tokenizer.vocabulary.data
    assert {text for i, text in enumerate(data) if allowed[i] and len(text) > 1 and text.startswith(b">")} == {
        b">{",
        b">\n",
    }
    assert matcher.accept(data.index(b">{"))
    assert matcher.accept(ord("}"))
    assert matcher.complete


def test_special_tokens_are_no_text() -> None:
    tokenizer = Tiny(HERMES)
    for constraint, start in ((Constraint.regex("(.|\n)*"), "answer"), (Constraint.json_object(), "thought")):
        matcher = Grammars(tokenizer).matcher(constraint, start)  # type: ignore[arg-type]  # literals get lost
        allowed = bits_of(matcher, len(tokenizer.vocabulary.data))
        special = {i for i in tokenizer.vocabulary.special_ids if allowed[i]}
        assert special == ({END} if start == "answer" else {CLOSE_THOUGHT})
        assert not allowed[tokenizer.vocabulary.data.index(b"")], "a hole"


@given(
    steps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 10**6)), max_size=25),
    start=st.sampled_from(["answer", "thought"]),
)
@settings(max_examples=40, deadline=None)
def test_rollback_leaves_no_trace(steps: list[tuple[int, int]], start: Start) -> None:
    tokenizer = Tiny(HERMES)
    grammars = _grammars.setdefault("tiny", Grammars(tokenizer))
    constraint = Constraint.json_schema({"type": "array", "items": {"enum": ["ab", "é", 1]}})
    matcher = grammars.matcher(constraint, start)
    written: list[int] = []
    for back, drawn in steps:
        num_back = min(back if drawn % 3 == 0 else 0, len(written))
        matcher.rollback(num_back)
        written = written[: len(written) - num_back]
        choices = np.flatnonzero(bits_of(matcher, len(tokenizer.vocabulary.data)))
        token = int(choices[drawn % len(choices)])
        assert matcher.accept(token)
        written.append(token)
        if token == END:
            assert matcher.finished
            matcher.rollback(1)
            written.pop()
    fresh = grammars.matcher(constraint, start)
    assert all(map(fresh.accept, written))
    assert (fresh.complete, fresh.finished) == (matcher.complete, matcher.finished)
    num_ids = len(tokenizer.vocabulary.data)
    assert (bits_of(fresh, num_ids) == bits_of(matcher, num_ids)).all()


def test_a_refused_token_changes_nothing() -> None:
    tokenizer = Tiny()
    matcher = Grammars(tokenizer).matcher(Constraint.choice(["ab"]))
    assert not matcher.accept(ord("x"))
    assert not matcher.accept(END)
    assert not matcher.accept(10**6)
    assert matcher.accept(ord("a"))
    assert not matcher.complete
    assert matcher.accept(ord("b"))
    assert (matcher.complete, matcher.finished) == (True, True)
    assert np.flatnonzero(bits_of(matcher, len(tokenizer.vocabulary.data))).tolist() == [END]
    assert matcher.accept(END)
    assert not matcher.accept(END)
    assert matcher.finished
    matcher.rollback(2)
    assert (matcher.complete, matcher.finished) == (False, False)
    assert matcher.accept(ord("b"))


MALFORMED: list[tuple[Constraint, str]] = [
    (Constraint.regex("("), "regex cannot be used: unclosed group"),
    (Constraint.regex("(?=a)b"), "look-around"),
    (Constraint.regex(r"(a)\1"), "backreferences"),
    (Constraint.grammar("start: nowhere"), "grammar cannot be used: .*nowhere"),
    (Constraint.grammar('x: "a"'), "start"),
    (Constraint.grammar("root ::= ("), "no GBNF grammar"),
    (Constraint.json_schema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum .5. is greater than maximum"),
    (Constraint.json_schema({"type": "string", "format": "nope"}), "Unknown format: nope"),
    (Constraint.json_schema({"$ref": "#/$defs/nope"}), "nope"),
    (Constraint.json_schema({"$ref": "https://example.com/x"}), "example.com"),
    (Constraint.json_schema({"oneOf": [{"type": "number"}, {"type": "integer"}]}), "oneOf .* use anyOf"),
    (Constraint.json_schema({"type": "string", "pattern": "(?=a)"}), "look-around"),
    (Constraint.tool_calls(TOOLS), "no tool calls"),
]


@pytest.mark.parametrize(("constraint", "reason"), MALFORMED)
def test_what_cannot_be_compiled_is_refused(constraint: Constraint, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        Grammars(Tiny()).matcher(constraint)
    assert "\n" not in str(caught.value)


HUGE = [
    Constraint.json_schema(
        {"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {"type": "string"}}} for j in range(6)]} for i in range(9)]}
    ),
    Constraint.json_schema({"type": "string", "allOf": [{"pattern": f"^(.*{char}.*)$"} for char in "abcdefghij"]}),
]


@pytest.mark.parametrize("constraint", HUGE)
def test_effort_is_limited(constraint: Constraint) -> None:
    with pytest.raises(RequestError, match="json_schema cannot be used"):
        Grammars(Tiny()).matcher(constraint)


def test_many_properties_can_be_written() -> None:
    tokenizer = Tiny()
    names = [f"p{i}" for i in range(500)]
    schema = {"type": "object", "properties": {name: {"type": "boolean"} for name in names}}
    matcher = Grammars(tokenizer).matcher(Constraint.json_schema(schema))
    assert all(map(matcher.accept, b'{"p499": true}'))
    assert matcher.complete


def test_grammars_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "CACHED_GRAMMARS", 2)
    grammars = Grammars(Tiny())
    compiled: list[str] = []
    compile_one = grammars._compile

    def count(constraint: Constraint, start: Start) -> Any:
        compiled.append(constraint.source)
        return compile_one(constraint, start)

    monkeypatch.setattr(grammars, "_compile", count)
    for pattern in ("a", "b", "a", "c", "a", "b"):
        first, second = (grammars.matcher(Constraint.regex(pattern)) for _ in range(2))
        assert first.accept(ord(pattern))
        assert not second.complete, "matchers share nothing"
    assert compiled == ["a", "b", "c", "b"]


def test_the_right_memory_is_asked_for() -> None:
    matcher = Grammars(Tiny()).matcher(Constraint.regex("a"))
    wrong: list[Any] = [
        np.zeros(3, np.int32),
        np.zeros(100, np.int64),
        np.zeros((1, 100), np.int32),
        np.zeros(100, np.int32)[::2],
    ]
    for bits in wrong:
        with pytest.raises(ValueError, match="contiguous int32"):
            matcher.mask(bits)


def test_a_vocabulary_may_lack_the_tokens() -> None:
    class Poor(Tiny):
        pass

    tokenizer = Poor()
    object.__setattr__(tokenizer, "vocabulary", Vocabulary(data=(b"a", b"</s>"), special={"</s>": 1}))
    object.__setattr__(tokenizer, "stop_ids", frozenset({1}))
    matcher = Grammars(tokenizer).matcher(Constraint.choice(["ab"]))
    assert matcher.accept(0)
    for _ in range(2):
        with pytest.raises(RequestError, match="choice: no token of the vocabulary continues the answer"):
            matcher.mask(np.zeros(1, np.int32))
    with pytest.raises(RequestError, match="choice: no token of the vocabulary"):
        _ = matcher.finished


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"ernie45\[structured\]"):
        Grammars(Tiny())


KINDS: list[tuple[Constraint, str]] = [
    (Constraint.regex("[ab]+"), "abba"),
    (Constraint.choice(["yes", "no"]), "no"),
    (Constraint.grammar('start: sum\nsum: N ("+" N)*\nN: /[0-9]+/\n%ignore " "'), "1 + 22"),
    (Constraint.grammar('root ::= [a-c]+ ("," root)?'), "ab,c"),
    (Constraint.json_schema({"type": "boolean"}), "true"),
]


@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize(("constraint", "text"), KINDS)
def test_every_kind_may_follow_a_thought(constraint: Constraint, text: str, tags: bool) -> None:
    tokenizer = Tiny(HERMES, tags)
    assert takes(tokenizer, constraint, text) is True
    assert takes(tokenizer, constraint, f"hm {text}</think>\n\n{text}", "thought") is True
    assert takes(tokenizer, constraint, f"<think>\nhm\n</think>\n{text}", "open") is True
    assert takes(tokenizer, constraint, text, "open") is True
    assert takes(tokenizer, constraint, f"hm</think>{text}#", "thought") is None
