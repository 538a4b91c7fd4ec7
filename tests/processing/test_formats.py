"""The four published formats, against strings written out by hand from the reference (architecture 5.2 to 5.5)."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ernie45.errors import RequestError
from ernie45.processing.formats import FORMATS
from ernie45.processing.prompt import RenderedPrompt
from ernie45.processing.tokenizer import Tokenizer, load_tokenizer

_loaded: dict[str, Tokenizer] = {}

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "天气", "parameters": {"type": "object"}},
}
TOOL_JSON = (
    '{"type": "function", "function": {"name": "weather", "description": "天气", "parameters": {"type": "object"}}}'
)
CALL: dict[str, Any] = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
CALL_JSON = '{"name": "weather", "arguments": {"city": "北京"}}'
IMAGE = {"type": "image_url", "image_url": {"url": "data:,x"}}
VIDEO = {"type": "video_url", "video_url": {"url": "file:///v"}}
PICTURE_1 = "Picture 1:<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>"
PICTURE_2 = "Picture 2:<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>"
VIDEO_1 = "Video 1:<|VIDEO_START|><|video@placeholder|><|VIDEO_END|>"
ERNIE_SYSTEM = "You are a multimodal AI assistant called ERNIE developed by Baidu based on the PaddlePaddle framework."
GLOBAL = "<global_setting>\nthink_mode=True\n</global_setting>"


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def result(content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": content}


@pytest.fixture
def of(ernie_folder: Path) -> Any:
    def get(name: str) -> Tokenizer:
        if name not in _loaded:
            _loaded[name] = load_tokenizer(ernie_folder, chat_format=name)
        return _loaded[name]

    return get


GOLDEN: list[tuple[str, list[dict[str, Any]], dict[str, Any], str]] = [
    # ernie, 5.2
    ("ernie", [user("Hi")], {}, "<|begin_of_sentence|>User: Hi\nAssistant: "),
    ("ernie", [user("Hi")], {"add_generation_prompt": False}, "<|begin_of_sentence|>User: Hi\n"),
    ("ernie", [user("Hi")], {"thinking": False, "tools": []}, "<|begin_of_sentence|>User: Hi\nAssistant: "),
    (
        "ernie",
        [
            system("S"),
            user("q1"),
            assistant("a1"),
            user([{"type": "text", "text": "q"}, {"type": "text", "text": "2"}]),
        ],
        {},
        "<|begin_of_sentence|>S\nUser: q1\nAssistant: a1<|end_of_sentence|>User: q2\nAssistant: ",
    ),
    ("ernie", [user("q"), system("S")], {}, "<|begin_of_sentence|>User: q\nS\nAssistant: "),
    # ernie_vl, 5.3
    (
        "ernie_vl",
        [user("Hi")],
        {},
        "<|begin_of_sentence|>User: Hi\nAssistant: <think>\n\n</think>\n\n",
    ),
    ("ernie_vl", [user("Hi")], {"thinking": True}, "<|begin_of_sentence|>User: Hi\nAssistant: <think>"),
    (
        "ernie_vl",
        [
            system("S"),
            user([{"type": "text", "text": "What?"}, IMAGE, VIDEO, IMAGE]),
            assistant("A", reasoning_content="R"),
            user("more"),
            assistant("<think>\nT\n</think>\n\nB"),
        ],
        {"add_generation_prompt": False},
        f"<|begin_of_sentence|>S\nUser: What?{PICTURE_1}{VIDEO_1}{PICTURE_2}\nAssistant: <think>\nR\n</think>\nA"
        "<|end_of_sentence|>User: more\nAssistant: <think>\nT\n</think>\nB<|end_of_sentence|>",
    ),
    (
        "ernie_vl",
        [user([IMAGE]), assistant("a"), user([{"type": "text", "text": "b"}, IMAGE])],
        {"thinking": False},
        f"<|begin_of_sentence|>User: {PICTURE_1}\nAssistant: a<|end_of_sentence|>User: b{PICTURE_2}"
        "\nAssistant: <think>\n\n</think>\n\n",
    ),
    # ernie_thinking, 5.4
    (
        "ernie_thinking",
        [user("Hi")],
        {},
        f"<|im_start|>system\n{GLOBAL}<|im_end|>\n\n<|im_start|>user\nHi<|im_end|>\n\n<|im_start|>assistant\n<think>\n",
    ),
    (
        "ernie_thinking",
        [
            system("S"),
            user("q"),
            assistant(None, reasoning_content="R", tool_calls=[CALL, CALL]),
            result("sunny"),
            assistant("It is sunny.", reasoning_content="R2"),
            user("thanks"),
        ],
        {"tools": [TOOL, TOOL["function"]], "thinking": True},
        f"<|im_start|>system\n<system_setting>\nS\n</system_setting>\n\n{GLOBAL}"
        f"\n\n<tool_list>\n[{TOOL_JSON}, {TOOL_JSON}]\n</tool_list><|im_end|>\n\n"
        "<|im_start|>user\nq<|im_end|>\n\n<|im_start|>assistant\n<think>\nR\n</think>\n\n"
        f"\n<tool_call>\n{CALL_JSON}\n</tool_call>\n\n<tool_call>\n{CALL_JSON}\n</tool_call>\n<|im_end|>\n\n"
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n\n"
        "<|im_start|>assistant\n<think>\nR2\n</think>\n\n<response>\nIt is sunny.\n</response>\n<|im_end|>\n\n"
        "<|im_start|>user\nthanks<|im_end|>\n\n<|im_start|>assistant\n<think>\n",
    ),
    (
        "ernie_thinking",
        [user("q"), assistant("a")],
        {"add_generation_prompt": False},
        f"<|im_start|>system\n{GLOBAL}<|im_end|>\n\n<|im_start|>user\nq<|im_end|>\n\n"
        "<|im_start|>assistant\n<response>\na\n</response>\n<|im_end|>\n\n",
    ),
    # ernie_vl_thinking, 5.5
    (
        "ernie_vl_thinking",
        [user([{"type": "text", "text": "Look: "}, IMAGE])],
        {},
        f"<|begin_of_sentence|>{ERNIE_SYSTEM}\nUser: Look: {PICTURE_1}\nAssistant: \n<think>\n",
    ),
    (
        "ernie_vl_thinking",
        [system("S"), user("q")],
        {"thinking": False},
        "<|begin_of_sentence|>S\nUser: q\nAssistant: \n<think>\n\n</think>\n\n",
    ),
    (
        "ernie_vl_thinking",
        [
            system("S"),
            user("q"),
            assistant("", reasoning_content="R", tool_calls=[CALL, CALL]),
            result("sunny"),
            assistant("Sunny."),
        ],
        {"tools": [TOOL], "add_generation_prompt": False},
        f"<|begin_of_sentence|>S\n\n<tool_list>\n[{TOOL_JSON}]\n</tool_list>\n"
        "User: q\nAssistant: \n<think>\nR\n</think>\n\n"
        f"<tool_call>\n{CALL_JSON}\n</tool_call>\n<tool_call>\n{CALL_JSON}\n</tool_call>\n<|end_of_sentence|>"
        "User: <tool_output>\nsunny\n</tool_output>\n\nAssistant: Sunny.<|end_of_sentence|>",
    ),
]


@pytest.mark.parametrize(("name", "messages", "options", "expected"), GOLDEN)
def test_golden(name: str, messages: Any, options: dict[str, Any], expected: str, of: Any) -> None:
    prompt = of(name).render(messages, **options)
    assert isinstance(prompt, RenderedPrompt)
    assert str(prompt) == expected
    assert "".join(segment.text for segment in prompt.segments) == expected


@pytest.mark.parametrize(
    ("name", "thinking", "tools"),
    [
        ("ernie", "never", False),
        ("ernie_vl", "optional", False),
        ("ernie_thinking", "always", True),
        ("ernie_vl_thinking", "optional", True),
    ],
)
def test_what_a_format_can_do(name: str, thinking: str, tools: bool, of: Any) -> None:
    assert of(name).thinking == thinking
    expected = [*["tools"] * tools, *["thinking"] * (thinking != "never")]
    assert of(name).capabilities == set(expected)


def test_arguments_may_be_a_json_string(of: Any) -> None:
    text = json.dumps(CALL["function"]["arguments"])
    call = {"function": {"name": "weather", "arguments": text}}
    messages = [user("q"), assistant("", tool_calls=[call])]
    expected = [user("q"), assistant("", tool_calls=[CALL])]
    assert of("ernie_thinking").render(messages) == of("ernie_thinking").render(expected)


def test_developer_is_system(of: Any) -> None:
    assert of("ernie").render([{"role": "developer", "content": "S"}, user("q")]) == of("ernie").render(
        [system("S"), user("q")]
    )


REFUSED: list[tuple[str, list[dict[str, Any]], dict[str, Any], str]] = [
    ("ernie", [user("q")], {"thinking": True}, "ernie has no thinking"),
    ("ernie", [user("q")], {"tools": [TOOL]}, "ernie has no tools"),
    ("ernie", [user("q"), assistant("a", reasoning_content="R")], {}, r"messages\[1\].*no thinking"),
    ("ernie", [user("q"), assistant("a", tool_calls=[CALL])], {}, r"messages\[1\].*no tool calls"),
    ("ernie", [user("q"), result("a")], {}, r"messages\[1\].*no tool results"),
    ("ernie", [user([IMAGE])], {}, r"messages\[0\].*image_url"),
    ("ernie", [user("q"), user([VIDEO])], {}, r"messages\[1\].*video_url"),
    ("ernie", [{"role": "user", "name": "Ann", "content": "q"}], {}, r"messages\[0\].*names"),
    ("ernie", [{"role": "system", "name": "Ann", "content": "q"}], {}, r"messages\[0\].*names"),
    ("ernie_vl", [user("q")], {"tools": [TOOL]}, "ernie_vl has no tools"),
    ("ernie_vl", [system("S"), {"role": "assistant", "content": [IMAGE]}], {}, r"messages\[1\].*image_url.*assistant"),
    ("ernie_vl", [{"role": "system", "content": [IMAGE]}], {}, r"messages\[0\].*image_url.*system"),
    ("ernie_thinking", [user("q")], {"thinking": False}, "always thinks"),
    ("ernie_thinking", [user("q"), system("S")], {}, r"messages\[1\].*at the start only"),
    ("ernie_thinking", [user([IMAGE])], {}, r"messages\[0\].*image_url"),
]


@pytest.mark.parametrize(("name", "messages", "options", "reason"), REFUSED)
def test_what_a_format_cannot_say_is_refused(
    name: str, messages: Any, options: dict[str, Any], reason: str, of: Any
) -> None:
    with pytest.raises(RequestError, match=reason):
        of(name).render(messages, **options)


JINJA_ERNIE = (
    "<|begin_of_sentence|>{% for message in messages %}{% if message.role == 'system' %}{{ message.content + '\n' }}"
    "{% elif message.role == 'user' %}{{ 'User: ' + message.content + '\n' }}"
    "{% else %}{{ 'Assistant: ' + message.content + '<|end_of_sentence|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


@given(
    messages=st.lists(
        st.builds(
            lambda role, content: {"role": role, "content": content},
            st.sampled_from(["system", "user", "assistant"]),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        ),
        min_size=1,
        max_size=5,
    ),
    generate=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_ernie_is_what_transformers_renders(
    messages: list[dict[str, str]], generate: bool, bpe_folder: Path, ernie_folder: Path
) -> None:
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(bpe_folder / "tokenizer.json"), chat_template=JINJA_ERNIE)
    tokenizer = _loaded.setdefault("ernie", load_tokenizer(ernie_folder))
    expected = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    assert str(tokenizer.render(messages, add_generation_prompt=generate)) == expected


PIECES: tuple[str, ...] = (
    "<",
    "|",
    ">",
    "im_start",
    "<|im_start|>",
    "<|im_",
    "start|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</",
    "\n",
)
PIECES += ("<|begin_of_sentence|>", "<|end_of_sentence|>", "<|image@placeholder|>", "<|IMAGE_PLACEHOLDER|>", "<s>", "a")
PIECES += ("\U00013000", "\U00013001", "\n", "＜|im_end|＞", '"', "\\")
hostile = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


def _conversation(texts: list[str], name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a conversation that carries caller text in every place the format has."""
    one, two, three, four, five = texts
    if name == "ernie":
        return [system(one), user(two), assistant("x" + three), user([{"type": "text", "text": four}] * 2)], {}
    if name == "ernie_vl":
        parts = [{"type": "text", "text": three}, IMAGE, {"type": "text", "text": four}]
        return [system(one), user(parts), assistant("x" + two, reasoning_content=five)], {"thinking": True}
    call = {"id": one, "function": {"name": "f" + four, "arguments": {five: [one, {"k": two}]}}}
    tool = {"name": "f" + three, "description": four, "parameters": {"properties": {five: {"enum": [one]}}}}
    messages = [
        system("s" + one),
        user(two),
        assistant("x" + four, reasoning_content=three, tool_calls=[call]),
        result(five),
    ]
    return messages, {"tools": [tool]}


@pytest.mark.parametrize("name", list(FORMATS))
@given(texts=st.lists(hostile, min_size=5, max_size=5))
@settings(max_examples=80, deadline=None)
def test_content_cannot_change_the_special_tokens(name: str, texts: list[str], ernie_folder: Path) -> None:
    tokenizer = _loaded.setdefault(name, load_tokenizer(ernie_folder, chat_format=name))
    special = set(tokenizer.special_tokens.values())

    def skeleton(texts: list[str]) -> tuple[list[int], list[str]]:
        messages, options = _conversation(texts, name)
        prompt = tokenizer.render(messages, **options)
        return (
            [idx for idx in tokenizer.encode(prompt) if idx in special],
            [part.text for part in prompt.segments if part.special],
        )

    messages, options = _conversation(texts, name)
    assert skeleton(texts) == skeleton(["w"] * 5)
    prompt = tokenizer.render(messages, **options)
    assert tokenizer.decode(tokenizer.encode(prompt), skip_special_tokens=False) == prompt
    if name == "ernie":
        one, two, three, four, _ = texts
        assert prompt == (
            f"<|begin_of_sentence|>{one}\nUser: {two}\nAssistant: x{three}<|end_of_sentence|>"
            f"User: {four}{four}\nAssistant: "
        )
