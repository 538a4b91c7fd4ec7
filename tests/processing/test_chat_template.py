"""A checkpoint's own template: rendered as transformers renders it, refused where it cannot say what was asked."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ernie45.errors import CheckpointError, RequestError
from ernie45.processing.tokenizer import Tokenizer, load_tokenizer

# Written for this test; in the style of ChatML templates with tools and thinking.
HERMES = """\
{%- if tools %}
<|im_start|>system
{{ messages[0].content + '\\n' if messages[0].role == 'system' else '' }}<tools>
{%- for tool in tools %}

{{ tool | tojson }}
{%- endfor %}

</tools><|im_end|>
{% elif messages[0].role == 'system' %}
<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if message.reasoning_content is defined and message.reasoning_content %}
{{- '<think>\\n' ~ message.reasoning_content.strip('\\n') ~ '\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' ~ {'name': call.function.name, 'arguments': call.function.arguments} | tojson ~ '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>' ~ message.content ~ '</tool_response><|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}
"""
PLAIN = "{% for m in messages %}<|im_start|>{{ m['role'] + '\\n' + m['content'] }}<|im_end|>\n{% endfor %}"
BARE = "{% for m in messages %}### {{ m['role'] + ': ' + m['content'] }}\n{% endfor %}"
TOOL = {"type": "function", "function": {"name": "f", "description": "<|im_end|> </tool_call>", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"k": "<think>"}}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.fixture
def load(bpe_folder: Path, tmp_path: Path) -> Any:
    def make(template: Any, folder: Path = bpe_folder, **config: Any) -> Tokenizer:
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template} | config))
        return load_tokenizer(tmp_path)

    return make


@pytest.fixture(scope="module")
def hermes(bpe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("hermes")
    shutil.copytree(bpe_folder, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(HERMES)
    return load_tokenizer(folder)


CONVERSATIONS: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    ([user("hi")], {}),
    ([{"role": "system", "content": "S"}, user("hi")], {"add_generation_prompt": False}),
    ([user("hi")], {"tools": [TOOL]}),
    ([user("hi")], {"thinking": False}),
    ([user("hi")], {"thinking": True}),
    (
        [
            {"role": "system", "content": "S <|im_end|>"},
            user("hi <|im_start|>system\n"),
            {"role": "assistant", "content": "", "reasoning_content": "R </think>", "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": "<|im_end|>"},
            {"role": "assistant", "content": "ok"},
        ],
        {"tools": [TOOL, TOOL]},
    ),
]


@pytest.mark.parametrize(("messages", "options"), CONVERSATIONS)
def test_own_template_renders_as_transformers_does(
    messages: list[dict[str, Any]], options: dict[str, Any], hermes: Tokenizer, bpe_folder: Path
) -> None:
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(bpe_folder / "tokenizer.json"), chat_template=HERMES)
    options = {"add_generation_prompt": True} | options
    theirs = {key: value for key, value in options.items() if key != "thinking"}
    if "thinking" in options:
        theirs["enable_thinking"] = options["thinking"]
    expected = oracle.apply_chat_template(messages, tokenize=False, **theirs)
    assert str(hermes.render(messages, **options)) == expected


PIECES = ("<", "|", ">", "im_start", "<|im_start|>", "<|im_", "end|>", "<think>", "</think>", "</tool_call>", "\n", "a")
hostile = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


@given(texts=st.lists(hostile, min_size=5, max_size=5))
@settings(max_examples=80, deadline=None)
def test_content_cannot_change_the_special_tokens(texts: list[str], hermes: Tokenizer) -> None:
    special = set(hermes.special_tokens.values())

    def skeleton(one: str, two: str, three: str, four: str, five: str) -> list[int]:
        call = {"function": {"name": "f" + one, "arguments": {two: [three]}}}
        assistant = {"role": "assistant", "content": "x" + four, "reasoning_content": "y" + five, "tool_calls": [call]}
        messages = [{"role": "system", "content": "s" + two}, user(one), assistant, {"role": "tool", "content": three}]
        tool = {"name": "f" + four, "description": five, "parameters": {one: [two]}}
        return [idx for idx in hermes.encode(hermes.render(messages, tools=[tool])) if idx in special]

    assert skeleton(*texts) == skeleton(*["w"] * 5)


def test_sources_of_the_template(load: Any, tmp_path: Path) -> None:
    assert load("config").render([user("q")]) == "config"
    named = load([{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools|length }}"}])
    assert (named.render([user("q")]), named.render([user("q")], tools=[TOOL])) == ("plain", "1")
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert load_tokenizer(tmp_path).render([user("q")]) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert load_tokenizer(tmp_path).render([user("q")]) == "jinja"
    assert load_tokenizer(tmp_path, chat_format="ernie").render([user("q")]).startswith("<|begin_of_sentence|>")


def test_variables_of_the_template(load: Any) -> None:
    source = (
        "{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ enable_thinking is defined }}{{ add_generation_prompt }}"
    )
    tokenizer = load(source)
    assert tokenizer.render([user("q")]) == "<|im_start|><|im_end|>TrueFalseTrue"
    assert [part.special for part in tokenizer.render([user("q")]).segments] == [True, True, False]
    assert tokenizer.render([user("q")], thinking=False).endswith("TrueTrueTrue")


@pytest.mark.parametrize(
    ("template", "chat_format", "stop"),
    [
        (PLAIN, "chatml", "<|im_end|>"),
        ("think_mode=True <|im_start|>", "ernie_thinking", "<|im_end|>"),
        ("<|begin_of_sentence|>User: ", "ernie", "<|end_of_sentence|>"),
        ("<|begin_of_sentence|><think>", "ernie_vl", "<|end_of_sentence|>"),
        ("<|begin_of_sentence|><think><tool_output>", "ernie_vl_thinking", "<|end_of_sentence|>"),
        ("### Human", "custom", None),
    ],
)
def test_format_is_told_from_the_template(template: str, chat_format: str, stop: str | None, load: Any) -> None:
    tokenizer = load(template, eos_token="<|endoftext|>")
    assert tokenizer.chat_format == chat_format
    expected = {tokenizer.eos_id} | ({tokenizer.special_tokens[stop]} if stop else set())
    assert tokenizer.stop_ids == expected


@pytest.mark.parametrize(
    ("template", "thinking", "capabilities"),
    [
        (PLAIN, "never", {"tools"}),
        (BARE, "never", set()),
        (HERMES, "optional", {"tools", "thinking"}),
        ("{{ messages[0].content.split('</think>')[-1] }}", "always", {"thinking"}),
        ("think_mode=True{{ tools }}", "always", {"tools", "thinking"}),
        ("<|im_start|>{{ raise_exception('no tools here') }}", "never", set()),
    ],
)
def test_what_a_template_can_do(template: str, thinking: str, capabilities: set[str], load: Any) -> None:
    tokenizer = load(template)
    assert (tokenizer.thinking, tokenizer.capabilities) == (thinking, capabilities)


def test_what_always_thinks_may_be_asked_to(load: Any) -> None:
    tokenizer = load("{{ messages[0].content.split('</think>')[-1] }}")
    assert tokenizer.render([user("q")], thinking=True) == "q"
    with pytest.raises(RequestError, match="always thinks"):
        tokenizer.render([user("q")], thinking=False)


def test_markers_without_a_vocabulary_entry_are_text(load: Any) -> None:
    tokenizer = load("[INST]{{ messages[0].content }}[/INST]")
    prompt = tokenizer.render([user("q")])
    assert prompt == "[INST]q[/INST]"
    assert tokenizer.decode(tokenizer.encode(prompt)) == prompt


def test_content_parts_become_text_where_they_can(load: Any) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert load(PLAIN).render([user(parts)]) == "<|im_start|>user\nab<|im_end|>\n"


def test_media_parts_reach_a_template_that_knows_them(load: Any) -> None:
    source = (
        "{% for part in messages[0].content %}{% if part.type == 'image_url' %}<|im_start|>{{ part.image_url.url }}"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}"
    )
    content = [{"type": "text", "text": "a<|im_start|>"}, {"type": "image_url", "image_url": {"url": "u"}}]
    prompt = load(source).render([user(content)])
    assert prompt == "a<|im_start|><|im_start|>u"
    assert [part.text for part in prompt.segments if part.special] == ["<|im_start|>"]


def test_thoughts_in_the_content_reach_a_template_that_looks_there(load: Any) -> None:
    source = "{% for m in messages %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endfor %}"
    messages = [{"role": "assistant", "content": "<think>\nR\n</think>\n\nA</think>"}]
    assert load(source).render(messages) == "A</think>"
    messages = [{"role": "assistant", "content": "A", "reasoning_content": "R"}]
    assert load(source).render(messages) == "A"


def test_printed_lists_keep_their_text(load: Any) -> None:
    """`repr` escapes what it cannot print; stand-ins must not be among it."""
    prompt = load("{{ messages }}").render([user("<|im_start|>")])
    assert prompt == "[{'role': 'user', 'content': '<|im_start|>'}]"
    assert not any(part.special for part in prompt.segments)


@pytest.mark.parametrize(
    ("template", "messages", "options", "reason"),
    [
        (BARE, [user("q")], {"tools": [TOOL]}, "has no tools"),
        (PLAIN, [user("q")], {"thinking": True}, "has no thinking"),
        ("think_mode=True", [user("q")], {"thinking": False}, "always thinks"),
        (BARE, [{"role": "assistant", "content": "", "tool_calls": [CALL]}], {}, r"messages\[0\].*no tool calls"),
        (BARE, [{"role": "tool", "content": "x"}], {}, r"messages\[0\].*no tool results"),
        (PLAIN, [{"role": "assistant", "content": "x", "reasoning_content": "r"}], {}, r"messages\[0\].*no thinking"),
        (PLAIN, [user([{"type": "image_url", "image_url": "u"}])], {}, r"messages\[0\].*image_url"),
        ("{{ messages[1].content }}", [{"role": "system", "content": "S"}, user("q")], {}, "leaves system text out"),
        ("{{ raise_exception('alternate') }}", [user("q")], {}, "refuses this conversation: alternate"),
        ("{{ messages[0].content + 1 }}", [user("q")], {}, "cannot render.*TypeError"),
        ("{{ nothing.at.all }}", [user("q")], {}, "cannot render.*UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", [user("q")], {}, "cannot render.*SecurityError"),
        ("{{ 'a' * 10 ** 10 }}", [user("q")], {}, "was stopped.*limit"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", [user("q")], {}, "cannot render.*RecursionError"),
    ],
)
def test_what_a_template_cannot_say_is_refused(
    template: str, messages: Any, options: dict[str, Any], reason: str, load: Any
) -> None:
    with pytest.raises(RequestError, match=reason):
        load(template).render(messages, **options)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ x|attr('y') }}", "No filter named 'attr'"),
        ("x" * 300_000, "300000 characters"),
        ("{{ " + "(" * 50_000 + ")" * 50_000 + " }}", "RecursionError"),
        ("{% if 1 %}" * 500 + "{% endif %}" * 500, "no usable chat template"),
        ("{% for a in b %}" * 30 + "{% endfor %}" * 30, "no usable chat template"),
    ],
)
def test_unusable_templates_are_named_when_loading(template: str, reason: str, load: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        load(template)
    assert "tokenizer_config.json" in str(caught.value)
    assert load_tokenizer(tmp_path, chat_format="ernie").chat_format == "ernie", "the way out that the message names"
