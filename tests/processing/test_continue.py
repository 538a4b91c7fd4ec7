"""`continue_final_message`: the prompt ends right behind the text of the last message, as transformers has it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ernie45.errors import RequestError
from ernie45.processing.tokenizer import Tokenizer, load_tokenizer

# Written for this test.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "strips": (
        "{% for m in messages %}{{ '[' + m.role + '] ' + m.content | trim + '  \n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    ),
    "ends the last turn in its own way": (
        "{% for m in messages %}{% if loop.last and m.role == 'assistant' %}"
        "{{ '<think>\n\n</think>\n\n' + m.content.split('</think>')[-1].lstrip('\n') + ' ~ bye <|im_end|>' }}"
        "{% else %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endif %}{% endfor %}"
    ),
    "takes parts": (
        "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
    ),
}


def user(text: str = "q") -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


@pytest.fixture(scope="module")
def load(bpe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    made: dict[str, Tokenizer] = {}

    def make(template: str) -> Tokenizer:
        if template not in made:
            folder = tmp_path_factory.mktemp("continued")
            shutil.copytree(bpe_folder, folder, dirs_exist_ok=True)
            (folder / "chat_template.jinja").write_text(template)
            made[template] = load_tokenizer(folder)
        return made[template]

    return make


PIECES = ("a", "b c", " ", "\n", "<|im_end|>", "[assistant] ", " ~ bye ", "<think>", "\U00013000", "\U00013005", "b")


@pytest.mark.parametrize("name", TEMPLATES)
@given(
    text=st.lists(st.sampled_from(PIECES), max_size=5).map(lambda parts: "".join(parts) + "."),
    before=st.sampled_from([[user()], [assistant("b."), user("b.")], [{"role": "system", "content": "S"}, user()]]),
)
@settings(max_examples=40, deadline=None)
def test_the_prompt_is_what_transformers_renders(
    name: str, text: str, before: list[dict[str, Any]], load: Any, bpe_folder: Path
) -> None:
    oracle = PreTrainedTokenizerFast(
        tokenizer_file=str(bpe_folder / "tokenizer.json"), chat_template=TEMPLATES[name], eos_token="<|im_end|>"
    )
    messages = [*before, assistant(text)]
    expected = oracle.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    prompt = load(TEMPLATES[name]).render(messages, continue_final_message=True)
    assert str(prompt) == expected
    assert prompt.endswith(text.lstrip())


@pytest.mark.parametrize("name", TEMPLATES)
def test_space_at_the_end_stays(name: str, load: Any) -> None:
    """Other than with transformers where the template strips: a model that writes ` 4` goes on differently behind one."""
    prompt = load(TEMPLATES[name]).render([user(), assistant("2 + 2 = \n ")], continue_final_message=True)
    assert prompt.endswith("2 + 2 = \n ")


BEHIND = {
    "ernie": "User: q\nAssistant: The",
    "ernie_vl": "User: q\nAssistant: The",
    "ernie_thinking": "<|im_start|>assistant\n<response>\nThe",
    "ernie_vl_thinking": "User: q\nAssistant: The",
}


@pytest.mark.parametrize("name", BEHIND)
def test_built_in_formats(name: str, ernie_folder: Path) -> None:
    tokenizer = load_tokenizer(ernie_folder, chat_format=name)
    prompt = tokenizer.render([user(), assistant("The")], continue_final_message=True)
    assert prompt.endswith(BEHIND[name])
    if tokenizer.thinking != "never":
        thought = assistant("The", reasoning_content="R")
        prompt = tokenizer.render([user(), thought], continue_final_message=True)
        inside = tokenizer.render([user(), assistant("<think>\nR\n</think>\n\nThe")], continue_final_message=True)
        assert prompt == inside
        assert "R\n</think>" in prompt
        assert prompt.endswith("The")


def test_parts_are_continued_behind_the_last(load: Any) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b "}]
    assert load(TEMPLATES["chatml"]).render([user(), assistant(parts)], continue_final_message=True).endswith("\na b ")


def test_tools_in_the_history_change_nothing(load: Any) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    call = {"function": {"name": "f", "arguments": {}}}
    messages = [user(), assistant("", tool_calls=[call]), {"role": "tool", "content": "r"}, assistant("It ")]
    prompt = load(TEMPLATES["chatml"]).render(messages, tools=[tool], continue_final_message=True)
    assert prompt.endswith("</tool_response><|im_end|>\n<|im_start|>assistant\nIt ")


def test_content_still_makes_no_special_tokens(load: Any) -> None:
    prompt = load(TEMPLATES["chatml"]).render([user(), assistant("<|im_end|>")], continue_final_message=True)
    assert [part.text for part in prompt.segments if part.special] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]


CALL = {"function": {"name": "f", "arguments": {}}}
IMAGE = {"type": "image_url", "image_url": "u"}


@pytest.mark.parametrize(
    ("template", "messages", "options", "reason"),
    [
        ("chatml", [user()], {}, r"messages\[0\] is the last one and has the role user"),
        ("chatml", [user(), assistant("a", tool_calls=[CALL])], {}, r"messages\[1\] has tool calls"),
        ("chatml", [user(), assistant("")], {}, r"messages\[1\] ends without text"),
        ("chatml", [user(), assistant([])], {}, r"messages\[1\] ends without text"),
        ("chatml", [user(), assistant([{"type": "text", "text": "a"}, IMAGE])], {}, r"messages\[1\] ends without text"),
        ("strips", [user(), assistant("a")], {"add_generation_prompt": True}, "exclude each other"),
        ("{{ messages[0].content }}", [user(), assistant("a")], {}, "writes the last message 0 times"),
        ("{{ messages }}{{ messages }}", [user(), assistant("a")], {}, "writes the last message 2 times"),
    ],
)
def test_refusals(template: str, messages: Any, options: dict[str, Any], reason: str, load: Any) -> None:
    tokenizer = load(TEMPLATES.get(template, template))
    with pytest.raises(RequestError, match=reason):
        tokenizer.render(messages, continue_final_message=True, **options)


def test_a_turn_is_opened_unless_one_is_continued(load: Any) -> None:
    tokenizer = load(TEMPLATES["chatml"])
    opened = tokenizer.render([user()])
    assert opened == tokenizer.render([user()], add_generation_prompt=True)
    assert opened == tokenizer.render([user()], add_generation_prompt=False) + "<|im_start|>assistant\n"
