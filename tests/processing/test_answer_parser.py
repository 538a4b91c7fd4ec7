"""Answers taken apart: golden cases per format, answers that do not keep to their format, and any split of a text gives
the events of the whole."""

import json
import shutil
from itertools import count, pairwise, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.processing.answer_format import ANSWER_FORMATS, PLAIN, AnswerFormat, Start, told_answer_format
from ernie45.processing.answer_parser import (
    AnswerParser,
    ArgumentsDelta,
    ContentDelta,
    Event,
    ParsedAnswer,
    ReasoningDelta,
    ToolCallBegun,
    ToolCallEnded,
    collected,
    joined,
    random_call_id,
)
from ernie45.processing.detokenizer import Detokenizer
from ernie45.processing.tokenizer import load_tokenizer

HERMES = AnswerFormat(name="hermes", thought=("<think>", "</think>"), tool_call=("<tool_call>", "</tool_call>"))
X1, VL, VL_THINKING = (ANSWER_FORMATS[name] for name in ("ernie_thinking", "ernie_vl", "ernie_vl_thinking"))
LENT = told_answer_format("chatml", "", lends_tools=True)
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
F = [ToolCallBegun(0, "id0", "f"), ArgumentsDelta(0, '{"a": 1}'), ToolCallEnded(0)]


def events(
    text: str, answer_format: AnswerFormat, start: Start = "open", *, tools: bool = True, cuts: Any = ()
) -> list[Event]:
    numbers = count()
    parser = AnswerParser(answer_format, start=start, tools=tools, new_id=lambda: f"id{next(numbers)}")
    edges = [0, *sorted(cuts), len(text)]
    out = [event for a, b in pairwise(edges) for event in parser.push(text[a:b])]
    return joined([*out, *parser.finish()])


def second(index: int, name: str, arguments: str) -> list[Event]:
    return [ToolCallBegun(index, f"id{index}", name), ArgumentsDelta(index, arguments), ToolCallEnded(index)]


R, C = ReasoningDelta, ContentDelta

GOLDEN: list[tuple[str, AnswerFormat, Start, list[Any]]] = [
    # plain: nothing means anything
    ("\n <think>a</think>\n" + CALL + "\n", PLAIN, "answer", [C("\n <think>a</think>\n" + CALL + "\n")]),
    # x1, as its template writes it
    ("R\n</think>\n\n<response>\nA\nB\n</response>\n", X1, "thought", [R("R"), C("A\nB")]),
    ("\nR\n\nR2\n</think>\n<response>A</response>", X1, "thought", [R("R\n\nR2"), C("A")]),
    ("<think>\nR\n</think>\n\n<response>\n\nA\n\n</response>\n", X1, "open", [R("R"), C("A\n")]),
    (f"R\n</think>\n\n\n{CALL}\n", X1, "thought", [R("R"), *F]),
    (f"R\n</think>\n\n<response>\nA\n</response>\n\n{CALL}\n", X1, "thought", [R("R"), C("A"), *F]),
    (f"R</think><response>\nA\n{CALL}\n</response>\n", X1, "thought", [R("R"), C("A"), *F]),
    # VL: prompts close the thought or open it
    ("A\n", VL, "answer", [C("A\n")]),
    ("\nR\n</think>\nA\n", VL, "thought", [R("R"), C("A\n")]),
    (CALL, VL, "answer", [C(CALL)]),
    # VL thinking
    (f"R\n</think>\n\n{CALL}\n{CALL}\n", VL_THINKING, "thought", [R("R"), *F, *second(1, "f", '{"a": 1}')]),
    ("R\n</think>\n\nA", VL_THINKING, "thought", [R("R"), C("A")]),
    (f"A\n\n{CALL}\n", VL_THINKING, "answer", [C("A"), *F]),
    # a text that the caller began
    ("and B\n</response>\n", X1, "text", [C("and B")]),
    (f"\nB\n</response>\n\n{CALL}", X1, "text", [C("\nB"), *F]),
    (" <think> B", HERMES, "text", [C(" <think> B")]),
    (f"\n{CALL}\nB", HERMES, "text", [*F, C("\nB")]),
    # Hermes, Qwen
    ("<think>\nR\n</think>\n\nA\n", HERMES, "open", [R("R"), C("A\n")]),
    ("\n\n <think>R</think>A", HERMES, "open", [R("R"), C("A")]),
    (f"A\n{CALL}\nB", HERMES, "open", [C("A"), *F, C("\nB")]),
    (f"{CALL}\n\nB", HERMES, "open", [*F, C("B")]),
    ("A <think>R</think>", HERMES, "open", [C("A <think>R</think>")]),
    # what is inside JSON is no tag, and nesting is JSON's own
    (
        '<tool_call>{"name": "f", "arguments": {"a": [{"b": "}</tool_call>\\"<tool_call>{"}, null], "c": -1.5e3}}'
        "</tool_call>",
        HERMES,
        "open",
        second(0, "f", '{"a": [{"b": "}</tool_call>\\"<tool_call>{"}, null], "c": -1.5e3}'),
    ),
    ('<tool_call>{"arguments": {}, "x": [1], "name": "f"}</tool_call>', HERMES, "open", second(0, "f", "{}")),
    (
        '<tool_call>{"name": "天气", "arguments": {"城": "\\u5317京"}}</tool_call>',
        HERMES,
        "open",
        second(0, "天气", '{"城": "\\u5317京"}'),
    ),
    ('<tool_call>{"name": "f"}</tool_call>', HERMES, "open", second(0, "f", "{}")),
    ('<tool_call>{"name": "f", "arguments": null}</tool_call>', HERMES, "open", second(0, "f", "{}")),
    ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', HERMES, "open", F),
    # tools lent to a template without
    (f"\n{CALL}\n", LENT, "answer", F),
    (f"{CALL}\n{CALL}{CALL}", LENT, "answer", [*F, *second(1, "f", '{"a": 1}'), *second(2, "f", '{"a": 1}')]),
    (f"{CALL}\n\nB", LENT, "answer", [*F, C("B")]),
    (f"A\n{CALL}\n\nB\n", LENT, "answer", [C("A"), *F, C("\n\nB\n")]),
    ('<tool_call>\n{"name": "f", "arguments": { }}\n</tool_call>', LENT, "answer", second(0, "f", "{ }")),
    ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', LENT, "answer", second(0, "f", "{}")),
    (
        '<tool_call>\n{"name": "f", "arguments": {"a": {"b": [[], {"c": "</tool_call>\\n<tool_call>"}]}}}\n</tool_call>',
        LENT,
        "answer",
        second(0, "f", '{"a": {"b": [[], {"c": "</tool_call>\\n<tool_call>"}]}}'),
    ),
    (f'<tool_call>{{"name": "f{CALL}', LENT, "answer", [C(f'<tool_call>{{"name": "f{CALL}')]),
    ("<think>\nR\n</think>\n\nA", LENT, "answer", [C("<think>\nR\n</think>\n\nA")]),
    # unclosed
    ("R", X1, "thought", [R("R")]),
    ("R\n\n", X1, "thought", [R("R")]),
    ("R</thi", X1, "thought", [R("R</thi")]),
    ("</think>", X1, "thought", []),
    ("<response>\nA\n", X1, "answer", [C("A\n")]),
    ("<response>\nA\n</respo", X1, "answer", [C("A\n</respo")]),
    ("", X1, "open", []),
    (" <thi", HERMES, "open", [C(" <thi")]),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}}', HERMES, "open", F),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}', HERMES, "open", F),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}}\n</tool_c', HERMES, "open", F),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}}\n</tool A', HERMES, "open", [*F, C("</tool A")]),
    (
        '<tool_call>{"name": "f", "arguments": {"a": "x',
        HERMES,
        "open",
        [F[0], ArgumentsDelta(0, '{"a": "x'), ToolCallEnded(0, "the answer ends inside the arguments")],
    ),
    ('A\n<tool_call>{"name": "f', HERMES, "open", [C('A\n<tool_call>{"name": "f')]),
    (f'<tool_call>{{"name": "f", "arguments": {{"a": 1}}}}{CALL}', HERMES, "open", [*F, *second(1, "f", '{"a": 1}')]),
    # malformed
    ("A </think> B", HERMES, "open", [C("A </think> B")]),
    ("say <tool_call> or </tool_call>", HERMES, "open", [C("say <tool_call> or </tool_call>")]),
    ("A\n<tool_call>\nno\n</tool_call>\n" + CALL, HERMES, "open", [C("A\n<tool_call>\nno\n</tool_call>"), *F]),
    (
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        HERMES,
        "open",
        [C('<tool_call>{"name": 3, "arguments": {}}</tool_call>')],
    ),
    (
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        HERMES,
        "open",
        [C('<tool_call>{"name": "f", "arguments": [1]}</tool_call>')],
    ),
    ('<tool_call>{"name": "\\ud800"}</tool_call>', HERMES, "open", [C('<tool_call>{"name": "\\ud800"}</tool_call>')]),
    ('<tool_call>{"arguments": {}}</tool_call>', HERMES, "open", [C('<tool_call>{"arguments": {}}</tool_call>')]),
    (
        '<tool_call>{"name": "f", "arguments": {"a": tru}}\n</tool_call>B',
        HERMES,
        "open",
        [F[0], ArgumentsDelta(0, '{"a": tru}}'), ToolCallEnded(0, "the arguments are no JSON object"), C("B")],
    ),
    (
        '<tool_call>{"name": "f", "arguments": {}, "name": "g"}',
        HERMES,
        "open",
        [F[0], ArgumentsDelta(0, '{}: "g"}'), ToolCallEnded(0, "the arguments are no JSON object")],
    ),
    ("<response>the tag </response> ends it\n</response>\n", X1, "answer", [C("the tag </response> ends it")]),
    ("<response><response></response>", X1, "answer", [C("<response>")]),
]


@pytest.mark.parametrize(("text", "answer_format", "start", "expected"), GOLDEN)
def test_golden(text: str, answer_format: AnswerFormat, start: Start, expected: list[Event]) -> None:
    assert events(text, answer_format, start) == expected
    assert events(text, answer_format, start, cuts=range(1, len(text))) == expected


@pytest.mark.parametrize(("text", "answer_format", "start", "expected"), GOLDEN)
def test_every_cut_in_two_gives_the_same(
    text: str, answer_format: AnswerFormat, start: Start, expected: list[Event]
) -> None:
    for cut in range(len(text)):
        assert events(text, answer_format, start, cuts=[cut]) == expected


PIECES = ["<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>", "\n", " ", "<", "</", "a"]
PIECES += [
    '{"name": "f", "arguments": {"a": 1}}',
    '{"name": "f"',
    ', "arguments": ',
    '{"',
    '"',
    "}",
    "{",
    "tool_call>",
    "1",
]
PIECES += ["😀", "null", '"{}"', "\\", ",", ":", '"arguments"', '"name"']
texts = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
ALL_FORMATS = [PLAIN, X1, VL, VL_THINKING, HERMES, LENT]
STARTS: list[Start] = ["open", "thought", "answer", "text"]


@given(
    text=texts,
    answer_format=st.sampled_from(ALL_FORMATS),
    start=st.sampled_from(STARTS),
    tools=st.booleans(),
    data=st.data(),
)
@settings(max_examples=600, deadline=None)
def test_any_split_gives_the_events_of_the_whole(
    text: str, answer_format: AnswerFormat, start: Start, tools: bool, data: st.DataObject
) -> None:
    whole = events(text, answer_format, start, tools=tools)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=len(text)))
    assert events(text, answer_format, start, tools=tools, cuts=cuts) == whole
    assert events(text, answer_format, start, tools=tools, cuts=range(1, len(text))) == whole
    assert_orderly(whole, text)


def assert_orderly(whole: list[Event], text: str) -> None:
    """Calls begin, go on and end in turn; those without an error have objects for arguments; nothing is invented."""
    running: int | None = None
    ended = 0
    for event in whole:
        match event:
            case ToolCallBegun():
                assert (running, event.index) == (None, ended)
                running = event.index
            case ArgumentsDelta():
                assert event.index == running
            case ToolCallEnded():
                assert event.index == running
                running, ended = None, ended + 1
            case ReasoningDelta() | ContentDelta():
                assert running is None
                assert event.text
    assert running is None
    answer = collected(whole)
    for call in answer.tool_calls:
        if call.error is None:
            assert isinstance(json.loads(call.arguments), dict)
    if not answer.tool_calls:
        assert all(part in text for part in (answer.reasoning, answer.content))


@pytest.fixture(scope="module")
def chatml_folder(ernie_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose own template has no tools."""
    folder = tmp_path_factory.mktemp("chatml") / "copy"
    shutil.copytree(ernie_folder, folder)
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    return folder


@given(
    reasoning=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=20),
    content=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=20),
    calls=st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5),
            st.dictionaries(
                st.sampled_from([*PIECES, "k"]),
                st.recursive(
                    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False))
                    | st.sampled_from(PIECES),
                    lambda inner: (
                        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(PIECES), inner, max_size=2)
                    ),
                    max_leaves=5,
                ),
                max_size=3,
            ),
        ),
        max_size=3,
    ),
    name=st.sampled_from(["ernie_thinking", "ernie_vl_thinking", None]),
)
@settings(max_examples=120, deadline=None)
def test_what_the_template_writes_comes_back(
    reasoning: str, content: str, calls: list[tuple[str, dict[str, Any]]], name: str | None, chatml_folder: Path
) -> None:
    content = content.strip()
    tokenizer = load_tokenizer(chatml_folder, chat_format=name)
    reasoning = reasoning.strip("\n") if tokenizer.thinking != "never" else ""
    question: list[dict[str, Any]] = [{"role": "user", "content": "q"}]
    answer = {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning if tokenizer.thinking != "never" else None,
        "tool_calls": [{"function": {"name": called, "arguments": arguments}} for called, arguments in calls],
    }
    prompt = str(tokenizer.render(question))
    full = str(tokenizer.render([*question, answer], add_generation_prompt=False))
    assert full.startswith(prompt)
    written = full.removeprefix(prompt).rstrip("\n").removesuffix("<|im_end|>").removesuffix("<|end_of_sentence|>")
    parsed = collected(events(written, tokenizer.answer_format, tokenizer.answer_format.start(prompt)))
    assert (parsed.reasoning, parsed.content) == (reasoning, content)
    assert [(call.name, json.loads(call.arguments), call.error) for call in parsed.tool_calls] == [
        (called, arguments, None) for called, arguments in calls
    ]


def test_deltas_come_as_soon_as_they_are_certain() -> None:
    parser = AnswerParser(X1, start="thought", tools=True, new_id=lambda: "c")
    assert parser.push("Hm") == [R("Hm")]
    assert parser.in_thought
    assert parser.push("m.\n</thi") == [R("m.")]
    assert parser.push("nk>") == []
    assert not parser.in_thought
    assert parser.push("\n<response>\nHi <") == [C("Hi ")]
    assert parser.push("b>\n</response>") == [C("<b>")]
    assert parser.push('\n<tool_call>\n{"name": "f", "arguments"') == []
    assert parser.push(": {") == [ToolCallBegun(0, "c", "f"), ArgumentsDelta(0, "{")]
    assert parser.push('"a": "x') == [ArgumentsDelta(0, '"a": "x')]
    assert parser.push('"}}') == [ArgumentsDelta(0, '"}'), ToolCallEnded(0)]
    assert [*parser.push("</tool_call>\n"), *parser.finish()] == []


def test_a_turn_that_the_caller_began_is_pushed_first() -> None:
    parser = AnswerParser(X1, start="thought")
    parser.push("I think\n</think>\n<response>\nAn")
    assert [*parser.push("swer\n</response>"), *parser.finish()] == [C("swer")]


def test_too_deep_arguments_are_no_call() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 100 + "]" * 100 + "}}</tool_call>"
    (call,) = collected(events(text, HERMES)).tool_calls
    assert call.error is not None


def test_ids_are_unique() -> None:
    assert random_call_id() != random_call_id()
    assert random_call_id().startswith("call_")


def test_an_empty_answer_is_empty() -> None:
    assert collected(events("", HERMES)) == ParsedAnswer()


THINKS: dict[str, tuple[bool, ...]] = {
    "ernie": (),
    "ernie_vl": (False, True),
    "ernie_thinking": (True,),
    "ernie_vl_thinking": (False, True),
}


def test_the_start_comes_from_the_prompt(ernie_folder: Path) -> None:
    question = [{"role": "user", "content": "<think>"}]
    for name, modes in THINKS.items():
        tokenizer = load_tokenizer(ernie_folder, chat_format=name)
        start = tokenizer.answer_format.start
        for thinking in modes:
            prompt = tokenizer.render(question, thinking=thinking)
            assert start(prompt) == ("thought" if thinking else "answer")
            padding = tokenizer.vocab_size + 1  # a row of the network that no id of the vocabulary names
            for ids in (tokenizer.encode(prompt), [padding, *tokenizer.encode(prompt)[-3:]]):
                assert tokenizer.answer_start(ids) == start(prompt)
        if not modes:
            assert start(tokenizer.render(question)) == "answer"
    assert HERMES.start("<|im_start|>assistant\n") == "open"
    assert HERMES.start("<|im_start|>assistant\n<think>\n\n</think>\n\n") == "answer"


def test_other_templates_tell_their_tags() -> None:
    assert told_answer_format("chatml", "{{ '<|im_start|>' }}") is PLAIN
    assert told_answer_format("chatml", "<think></think><tool_call>") == HERMES
    assert told_answer_format("custom", "split('</think>')").tool_call is None
    assert told_answer_format("ernie_vl", "<tool_call>") is VL


def test_tags_that_are_special_tokens_reach_the_parser(ernie_folder: Path) -> None:
    tokenizer = load_tokenizer(ernie_folder, chat_format="ernie_thinking")
    special = tokenizer.special_tokens
    ids = [
        *(*tokenizer.encode("hm 😀\n"), special["</think>"], *tokenizer.encode("\n"), special["<response>"]),
        *(*tokenizer.encode("\n世界😀\n"), special["</response>"], special["<mask:1>"]),
    ]
    detokenizer = Detokenizer(tokenizer, keep=tokenizer.answer_tag_ids)
    parser = AnswerParser(tokenizer.answer_format, start="thought")
    found = [event for token in ids for event in parser.push(detokenizer.push(token))]
    found += [*parser.push(detokenizer.finish()), *parser.finish()]
    assert joined(found) == [R("hm 😀"), C("世界😀")]


def test_every_state_meets_every_piece() -> None:
    # Short and exhaustive where the property test draws at random.
    pieces = ["<think>", "</think>", "<response>", "</response>", CALL, "\n", "a"]
    for answer_format, start in product(ALL_FORMATS, STARTS):
        for parts in product(pieces, repeat=3):
            text = "".join(parts)
            whole = events(text, answer_format, start)
            assert events(text, answer_format, start, cuts=range(1, len(text))) == whole
            assert_orderly(whole, text)
