"""Dialogues as tokens, against strings written out by hand from the published formats; what is learnt is in brackets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ernie45.errors import ConfigError, RequestError
from ernie45.processing.formats import FORMATS
from ernie45.processing.tokenizer import Tokenizer, load_tokenizer
from ernie45.training.batch import IGNORED, Batch
from ernie45.training.data.encoding import ChatEncoder, Encoded, with_chat_format

Marked = Callable[[Tokenizer, Encoded], str]
TokenizerOf = Callable[[str], Tokenizer]

SYSTEM = {"role": "system", "content": "S"}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
GLOBAL = "<global_setting>\nthink_mode=True\n</global_setting>"


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


TWO = (SYSTEM, user("q"), answer("a"), user("r"), answer("b"))
THOUGHTS = (user("q"), answer("<think>\ns\n</think>\n\na"), user("r"), answer("<think>t</think>b"))
TOOLS = (
    user("q"),
    answer(None, tool_calls=[CALL]),
    {"role": "tool", "content": "R"},
    answer("<think>t</think>a"),
)

GOLDEN: list[tuple[str, str, tuple[dict[str, Any], ...], list[Any], str]] = [
    (
        "ernie",
        "last",
        TWO,
        [],
        "<|begin_of_sentence|>S\nUser: q\nAssistant: [[a<|end_of_sentence|>]]User: r\nAssistant: [[b</s>]]",
    ),
    ("ernie", "none", (user("q"), answer(" a\n")), [], "<|begin_of_sentence|>User: q\nAssistant: [[ a\n</s>]]"),
    (
        "ernie_vl",
        "last",
        TWO,
        [],
        "<|begin_of_sentence|>S\nUser: q\nAssistant: [[a<|end_of_sentence|>]]User: r\n"
        "Assistant: <think>[[\n\n</think>\nb</s>]]",
    ),
    (
        "ernie_vl",
        "last",
        THOUGHTS,
        [],
        "<|begin_of_sentence|>User: q\nAssistant: [[a<|end_of_sentence|>]]User: r\nAssistant: <think>[[\nt\n</think>\nb</s>]]",
    ),
    (
        "ernie_vl",
        "all",
        THOUGHTS,
        [],
        "<|begin_of_sentence|>User: q\nAssistant: <think>[[\ns\n</think>\na<|end_of_sentence|>]]User: r\n"
        "Assistant: <think>[[\nt\n</think>\nb</s>]]",
    ),
    (
        "ernie_vl",
        "none",
        THOUGHTS,
        [],
        "<|begin_of_sentence|>User: q\nAssistant: [[a<|end_of_sentence|>]]User: r\nAssistant: <think>\n\n</think>\n\n[[b</s>]]",
    ),
    (
        "ernie_vl_thinking",
        "last",
        (SYSTEM, *THOUGHTS),
        [],
        "<|begin_of_sentence|>S\nUser: q\nAssistant: [[a<|end_of_sentence|>]]User: r\n"
        "Assistant: \n<think>\n[[t\n</think>\n\nb</s>]]",
    ),
    (
        "ernie_vl_thinking",
        "last",
        (SYSTEM, *TOOLS),
        [TOOL],
        '<|begin_of_sentence|>S\n\n<tool_list>\n[{"type": "function", "function": {"name": "f"}}]\n</tool_list>\n'
        'User: q\nAssistant: [[<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n<|end_of_sentence|>]]'
        "User: <tool_output>\nR\n</tool_output>\n\nAssistant: \n<think>\n[[t\n</think>\n\na</s>]]",
    ),
    (
        "ernie_thinking",
        "last",
        (SYSTEM, *THOUGHTS),
        [],
        f"<|im_start|>system\n<system_setting>\nS\n</system_setting>\n\n{GLOBAL}<|im_end|>\n\n"
        "<|im_start|>user\nq<|im_end|>\n\n<|im_start|>assistant\n[[<response>\na\n</response>\n<|im_end|>]]\n\n"
        "<|im_start|>user\nr<|im_end|>\n\n<|im_start|>assistant\n<think>\n[[t\n</think>\n\n<response>\nb\n</response>\n<|im_end|>]]",
    ),
    (
        "ernie_thinking",
        "last",
        (user("q"), answer("a")),
        [],
        f"<|im_start|>system\n{GLOBAL}<|im_end|>\n\n<|im_start|>user\nq<|im_end|>\n\n"
        "<|im_start|>assistant\n<think>\n[[\n</think>\n\n<response>\na\n</response>\n<|im_end|>]]",
    ),
    (
        "ernie_thinking",
        "last",
        TOOLS,
        [TOOL],
        f"<|im_start|>system\n{GLOBAL}\n\n<tool_list>\n"
        '[{"type": "function", "function": {"name": "f"}}]\n</tool_list><|im_end|>\n\n'
        '<|im_start|>user\nq<|im_end|>\n\n<|im_start|>assistant\n[[\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n'
        "</tool_call>\n<|im_end|>]]\n\n<|im_start|>user\n<tool_response>\nR\n</tool_response><|im_end|>\n\n"
        "<|im_start|>assistant\n<think>\n[[t\n</think>\n\n<response>\na\n</response>\n<|im_end|>]]",
    ),
    (
        "chatml",
        "last",
        TWO,
        [],
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[a<|im_end|>]]\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]",
    ),
    (
        "chatml",
        "last",
        (user("q"), answer("a")),
        [],
        "<|im_start|>system\nYou are SmolLM<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[a<|im_end|>]]",
    ),
]


@pytest.mark.parametrize(("name", "thoughts", "messages", "tools", "expected"), GOLDEN)
def test_golden(
    name: str, thoughts: Any, messages: Any, tools: Any, expected: str, tokenizer_of: TokenizerOf, marked: Marked
) -> None:
    tokenizer = tokenizer_of(name)
    assert marked(tokenizer, ChatEncoder(tokenizer, thoughts).encode(messages, tools)) == expected


@pytest.mark.parametrize("name", [*FORMATS, "chatml"])
def test_the_prompt_is_the_one_of_serving(name: str, tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(name)
    for thoughts in ("last", "none") if tokenizer.thinking != "always" else ("last",):
        encoded = ChatEncoder(tokenizer, thoughts).encode((SYSTEM, user("q  x"), answer("one two")))
        thinking = None if tokenizer.thinking == "never" else thoughts == "last"
        prompt = tokenizer.encode(tokenizer.render([SYSTEM, user("q  x")], thinking=thinking))
        assert encoded.ids[: len(prompt)] == prompt
        assert encoded.learnt == [False] * len(prompt) + [True] * (len(encoded.ids) - len(prompt))
        assert encoded.answers[0][1:] == (len(prompt), len(encoded.ids))


def test_ids_and_marks_are_those_of_transformers(vocabulary: Path, tokenizer_of: TokenizerOf) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(vocabulary / "tokenizer.json"))
    theirs.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
        "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    )
    dialogue = [SYSTEM, user("what is the fox?"), answer("the quick one"), user("ü 好"), answer("a dog\n\nx")]
    expected = theirs.apply_chat_template(dialogue, return_dict=True, return_assistant_tokens_mask=True)
    encoded = ChatEncoder(tokenizer_of("chatml")).encode(tuple(dialogue))
    newline = len(tokenizer_of("chatml").encode("\n"))
    assert encoded.ids == expected["input_ids"][:-newline], "all but the newline behind the last answer"
    assert encoded.learnt == [bool(mark) for mark in expected["assistant_masks"][:-newline]]


def test_ends_inside_a_dialogue_learn_the_end_token(ernie: Tokenizer) -> None:
    encoded = ChatEncoder(ernie).encode(TWO)
    separator, end = (ernie.special_tokens[text] for text in ("<|end_of_sentence|>", "</s>"))
    first, second = encoded.answers
    assert [answer.message for answer in encoded.answers] == [2, 4]
    assert encoded.ids[first.end - 1] == separator
    assert encoded.targets[first.end - 1] == end == encoded.targets[second.end - 1] == encoded.ids[-1]
    differ = [
        idx for idx, (read, learnt) in enumerate(zip(encoded.ids, encoded.targets, strict=True)) if read != learnt
    ]
    assert differ == [first.end - 1]
    batch = Batch.of_rows([[encoded.document("f:1")]], num_mtp=1)
    labels = batch.labels_DT.tolist()
    assert [label for label in labels[0] if label != IGNORED] == [
        target for target, learnt in zip(encoded.targets, encoded.learnt, strict=True) if learnt
    ]
    assert labels[1][first.end - 3] == end, "MTP blocks learn the same"
    assert batch.ahead_DT[0].tolist() == encoded.ids[1:], "while the network reads what stands there"


def test_documents_without_such_ends_have_no_targets_of_their_own(tokenizer_of: TokenizerOf) -> None:
    document = ChatEncoder(tokenizer_of("chatml")).encode(TWO).document("f:1")
    assert document.targets is None
    assert document.origin == "f:1"
    assert document.ids.dtype == torch.int64


def test_answers_may_be_left_unlearnt(ernie: Tokenizer, marked: Marked) -> None:
    encoded = ChatEncoder(ernie).encode(TWO, learnt=[False, False, True, False, False])
    assert marked(ernie, encoded) == (
        "<|begin_of_sentence|>S\nUser: q\nAssistant: [[a<|end_of_sentence|>]]User: r\nAssistant: b</s>"
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from([*FORMATS, "chatml"]),
    texts=st.lists(
        st.lists(
            st.sampled_from(
                [
                    "<|im_end|>",
                    "</s>",
                    "<|end_of_sentence|>",
                    "<think>",
                    "</think>",
                    "Assistant: ",
                    "\n",
                    " ",
                    "x",
                    "ü<",
                    "|>",
                ]
            ),
            min_size=1,
            max_size=5,
        ).map("".join),
        min_size=2,
        max_size=6,
    ),
)
def test_texts_cannot_forge_ends_and_nothing_else_is_learnt(
    name: str, texts: list[str], tokenizer_of: TokenizerOf
) -> None:
    tokenizer = tokenizer_of(name)
    texts = [f"{idx}{text}" for idx, text in enumerate(texts[: len(texts) // 2 * 2])]
    messages = tuple((user, answer)[idx % 2](text) for idx, text in enumerate(texts))
    encoded = ChatEncoder(tokenizer).encode(messages)
    assert len(encoded.answers) == len(texts) // 2
    ends = set(tokenizer.stop_ids)
    for text, found in zip(texts[1::2], encoded.answers, strict=True):
        ids = encoded.ids[found.start : found.end]
        assert all(encoded.learnt[found.start : found.end])
        assert [token for token in ids if token in ends] == ids[-1:], "one end token"
        assert text in tokenizer.decode(ids, skip_special_tokens=False)
    assert sum(encoded.learnt) == sum(found.end - found.start for found in encoded.answers)


def test_a_vocabulary_that_puts_a_space_first_does_so_at_the_start_alone(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    sentences = ["the quick brown fox jumps over the lazy dog User Assistant"] * 20
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        user_defined_symbols=["<|begin_of_sentence|>", "<|end_of_sentence|>"],
        add_dummy_prefix=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path, chat_format="ernie")
    encoded = ChatEncoder(tokenizer).encode((user("the fox"), answer("dog")))
    start = encoded.answers[0].start
    pieces = b"".join(tokenizer.token_bytes(idx) for idx in encoded.ids[start:-1])
    assert pieces == b"dog"


def test_always_opened_turns_at_the_end_are_no_part_of_the_answer(with_template: Any, marked: Marked) -> None:
    tokenizer = with_template(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\\n' }}"
    )
    assert marked(tokenizer, ChatEncoder(tokenizer).encode((user("q"), answer("a")))) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[a<|im_end|>]]"
    )


def test_templates_that_cannot_be_learnt_from_are_refused(with_template: Any) -> None:
    changing = with_template(
        "{{ messages|length }}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    with pytest.raises(ConfigError, match=r"writes a dialogue differently once it goes on, from character 0, "):
        ChatEncoder(changing).encode((user("q"), answer("a")))
    endless = with_template("{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}")
    with pytest.raises(ConfigError, match=r"ends an answer with none of the tokens <\|im_end\|>"):
        ChatEncoder(endless).encode((user("q"), answer("a")))
    forgetful = with_template(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}"
        "{% if loop.last and m['reasoning_content'] %}{{ '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    ChatEncoder(forgetful, "last").encode(THOUGHTS)
    long = (user("q"), answer("<think>first thought</think>a"), *THOUGHTS[2:])
    with pytest.raises(ConfigError, match=r"leaves out the thought of messages\[1\]: choose thoughts 'last'"):
        ChatEncoder(forgetful, "all").encode(long)


def test_what_a_format_cannot_say_is_the_rows_fault(tokenizer_of: TokenizerOf) -> None:
    with pytest.raises(RequestError, match="has no tools"):
        ChatEncoder(tokenizer_of("ernie")).encode((user("q"), answer("a")), [TOOL])
    with pytest.raises(ConfigError, match="thoughts is 'none', but the chat format ernie_thinking always thinks"):
        ChatEncoder(tokenizer_of("ernie_thinking"), "none")


def test_a_chat_format_replaces_the_template(tokenizer_of: TokenizerOf, marked: Marked) -> None:
    chatml = tokenizer_of("chatml")
    assert with_chat_format(chatml, None) is chatml
    ernie = with_chat_format(chatml, "ernie")
    assert marked(ernie, ChatEncoder(ernie).encode((user("q"), answer("a")))).startswith(
        "<|begin_of_sentence|>User: q\nAssistant: [[a"
    )
    assert with_chat_format(ernie, "ernie") is ernie
