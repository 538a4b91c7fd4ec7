"""Tools with a chat template that has none: what is written, what stays as it was, and what content cannot change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import RequestError
from ernie45.processing.answer_parser import AnswerParser, ParsedCall, collected
from ernie45.processing.tokenizer import Tokenizer, load_tokenizer
from ernie45.processing.tool_text import instructions

# Written for this test: ChatML that brings a system text of its own.
CHATML = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
OTHERS = "{% for m in messages %}<|im_start|>{{ m.role }}|{{ m.content | trim }}<|im_end|>{% endfor %}"
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}|{{ m.content }}{% endfor %}"

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
SAID = instructions([TOOL])
CALL: dict[str, Any] = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
CALL_TEXT = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "sunny"},
]


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def block(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


@pytest.fixture(scope="module")
def load(bpe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    def make(template: str) -> Tokenizer:
        folder = tmp_path_factory.mktemp("chatml")
        shutil.copytree(bpe_folder, folder, dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(template)
        return load_tokenizer(folder)

    return make


@pytest.fixture(scope="module")
def chatml(load: Any) -> Tokenizer:
    tokenizer: Tokenizer = load(CHATML)
    return tokenizer


OPENED = "<|im_start|>assistant\n"
GOLDEN: list[tuple[list[dict[str, Any]], list[dict[str, Any]], str]] = [
    # the template's own system text stays, and so does a given one
    (HISTORY[:1], [TOOL], block("system", f"Be kind.\n\n{SAID}") + block("user", "q") + OPENED),
    (
        [message("system", "S"), *HISTORY[:1]],
        [TOOL],
        block("system", f"S\n\n{SAID}") + block("user", "q") + OPENED,
    ),
    ([message("developer", ""), *HISTORY[:1]], [TOOL], block("system", SAID) + block("user", "q") + OPENED),
    (
        [*HISTORY[:1], message("system", "S")],
        [TOOL["function"]],
        block("system", f"Be kind.\n\n{SAID}") + block("user", "q") + block("system", "S") + OPENED,
    ),
    # calls and results, with tools or without
    (
        HISTORY,
        [],
        block("system", "Be kind.")
        + block("user", "q")
        + block("assistant", CALL_TEXT)
        + block("user", "<tool_response>\nsunny\n</tool_response>")
        + OPENED,
    ),
    (
        [
            message("system", "S"),
            {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]},
            *HISTORY[2:],
            message("tool", [{"type": "text", "text": "13"}, {"type": "text", "text": " C"}]),
            message("user", "and?"),
        ],
        [TOOL],
        block("system", f"S\n\n{SAID}")
        + block("assistant", f"Let me see.\n{CALL_TEXT}\n{CALL_TEXT}")
        + block("user", "<tool_response>\nsunny\n</tool_response>\n<tool_response>\n13 C\n</tool_response>")
        + block("user", "and?")
        + OPENED,
    ),
]


@pytest.mark.parametrize(("messages", "tools", "expected"), GOLDEN)
def test_golden(messages: Any, tools: Any, expected: str, chatml: Tokenizer) -> None:
    prompt = chatml.render(messages, tools=tools)
    assert str(prompt) == expected
    assert {part.text for part in prompt.segments if part.special} == {"<|im_start|>", "<|im_end|>"}


def test_every_tool_is_listed() -> None:
    tools = [{"type": "function", "function": {"name": f"f{i}", "description": "说明\n"}} for i in range(3)]
    lines = instructions(tools).splitlines()
    at = lines.index("<tools>")
    assert [json.loads(line) for line in lines[at + 1 : at + 4]] == [tool["function"] for tool in tools]
    assert lines[at + 4] == "</tools>"


def test_the_template_keeps_its_ways(load: Any) -> None:
    """Another layout, trimming, no system text of its own."""
    prompt = load(OTHERS).render(HISTORY, tools=[TOOL])
    assert str(prompt) == (
        f"<|im_start|>system|{SAID}<|im_end|><|im_start|>user|q<|im_end|><|im_start|>assistant|{CALL_TEXT}<|im_end|>"
        "<|im_start|>user|<tool_response>\nsunny\n</tool_response><|im_end|>"
    )


def test_without_tools_nothing_changes(chatml: Tokenizer) -> None:
    prompt = chatml.render([message("user", CALL_TEXT)], tools=[])
    assert str(prompt) == block("system", "Be kind.") + block("user", CALL_TEXT) + OPENED


def test_a_template_that_drops_the_list_is_refused(load: Any) -> None:
    tokenizer = load(NO_SYSTEM)
    assert tokenizer.render(HISTORY).endswith(f"|{CALL_TEXT}<|im_start|>user|<tool_response>\nsunny\n</tool_response>")
    with pytest.raises(RequestError, match="leaves system text out, where tools would stand"):
        tokenizer.render(HISTORY, tools=[TOOL])


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (CHATML, [message("user", [{"type": "image_url", "image_url": "u"}])], r"messages\[0\].*image_url"),
        (CHATML, [{"role": "assistant", "content": "a", "reasoning_content": "r"}], r"messages\[0\].*no thinking"),
        ("<|im_start|>{{ raise_exception('never') }}", [message("user", "q")], "refuses this conversation: never"),
    ],
)
def test_what_the_template_refuses_stays_refused(template: str, messages: Any, reason: str, load: Any) -> None:
    with pytest.raises(RequestError, match=reason):
        load(template).render(messages, tools=[TOOL])


def test_calls_come_back_from_the_parser(chatml: Tokenizer) -> None:
    assert chatml.capabilities == {"tools"}
    written = chatml.render(HISTORY[:2]).partition(OPENED)[2].removesuffix("<|im_end|>\n" + OPENED)
    for tools in (True, False):
        parser = AnswerParser(chatml.answer_format, start="answer", tools=tools, new_id=lambda: "c1")
        parsed = collected([*parser.push(written), *parser.finish()])
        call = ParsedCall(id="c1", name="weather", arguments='{"city": "北京"}')
        assert (parsed.tool_calls, parsed.content) == (((call,), "") if tools else ((), CALL_TEXT))


PIECES: tuple[str, ...] = ("<", "|", ">", "<|im_start|>", "<|im_", "end|>", "<|im_end|>", "</think>", "<think>")
PIECES += ("<tool_call>", "</tool_call>", "</tool_response>", "</tools>", "\n", '"', "\\", "system", "\U00013000", "a")
hostile = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


@pytest.mark.parametrize("special_calls", [False, True])
@given(texts=st.lists(hostile, min_size=6, max_size=6))
@settings(max_examples=80, deadline=None)
def test_content_cannot_change_the_roles(
    special_calls: bool, texts: list[str], chatml: Tokenizer, ernie_chatml: Tokenizer
) -> None:
    """Neither in a vocabulary where the tags of calls are text, nor where they are special tokens."""
    tokenizer = ernie_chatml if special_calls else chatml
    special = set(tokenizer.special_tokens.values())

    def rendered(texts: list[str]) -> Any:
        one, two, three, four, five, six = texts
        call = {"id": one, "function": {"name": "f" + two, "arguments": {three: [four, {"k": five}]}}}
        tool = {"name": "f" + three, "description": four, "parameters": {"properties": {five: {"enum": [six]}}}}
        messages = [
            message("system", "s" + one),
            message("user", two),
            {"role": "assistant", "content": "x" + six, "tool_calls": [call, call]},
            message("tool", three),
            message("tool", four),
            message("user", five),
        ]
        return tokenizer.render(messages, tools=[tool])

    def skeleton(prompt: Any) -> Any:
        ids = [idx for idx in tokenizer.encode(prompt) if idx in special]
        return ids, [part.text for part in prompt.segments if part.special]

    prompt = rendered(texts)
    assert skeleton(prompt) == skeleton(rendered(["w"] * 6))
    assert ("<tool_call>" in skeleton(prompt)[1]) == special_calls
    assert tokenizer.decode(tokenizer.encode(prompt), skip_special_tokens=False) == prompt


@pytest.fixture(scope="module")
def ernie_chatml(ernie_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The template over a vocabulary whose call tags are special tokens."""
    folder = tmp_path_factory.mktemp("ernie_chatml")
    shutil.copytree(ernie_folder, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(CHATML)
    return load_tokenizer(folder)
