"""A vocabulary of one's own: the published layout, any text and back, the same files from the same text, other readers."""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import ConfigError, NotFoundError
from ernie45.processing.formats import BEGIN, END_OF_SENTENCE, FORMATS
from ernie45.processing.tokenizer import Tokenizer, load_tokenizer
from ernie45.processing.tokenizer_training import (
    MARKERS,
    TokenizerConfig,
    read_lines,
    tokenizer_files,
    train_model,
)

WORDS = (
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "User", "Assistant", "think", "mask"),
    *(
        "明月",
        "春風",
        "秋風",
        "白雲",
        "青山",
        "流水",
        "故人",
        "故鄉",
        "床前",
        "naïve",
        "1912",
        "2024",
        "end_of_sentence",
    ),
)
SIZE = 480
SPELLED = (*MARKERS, "<s>", "</s>", "<unk>", "<0x0A>", "<|LOC_0|>")
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
spelled_text = st.lists(st.one_of(st.sampled_from(SPELLED), st.sampled_from("<|>/ ▁▅\n"), any_text), max_size=6).map(
    "".join
)
MESSAGES = [
    {"role": "system", "content": "Answer in verse."},
    {"role": "user", "content": "明月 <|end_of_sentence|>"},
    {"role": "assistant", "content": "床前\n"},
    {"role": "user", "content": "the fox"},
]


def corpus(seed: int = 0) -> list[str]:
    """Known words, and enough of unknown ones for larger vocabularies."""
    rng = random.Random(seed)
    return [" ".join([*rng.choices(WORDS, k=10), "".join(rng.choices("abcdefgh", k=4))]) for _ in range(300)]


def config(**changes: Any) -> TokenizerConfig:
    return TokenizerConfig(**({"vocab_size": SIZE} | changes))


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def save(texts: Sequence[str] | None = None, **changes: Any) -> Path:
        settings = config(**changes)
        folder = tmp_path_factory.mktemp("trained")
        for name, data in tokenizer_files(train_model(texts or corpus(), settings), settings.chat_format).items():
            (folder / name).write_bytes(data)
        return folder

    return save


@pytest.fixture(scope="module")
def folder(save: Callable[..., Path]) -> Path:
    return save()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def test_ids_lie_where_the_published_vocabulary_has_them(folder: Path, tokenizer: Tokenizer) -> None:
    raw = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert raw.get_piece_size() == tokenizer.vocab_size == SIZE
    assert [raw.id_to_piece(idx) for idx in range(13)] == ["<unk>", "<s>", "</s>", *"0123456789"]
    assert [raw.id_to_piece(idx) for idx in (13, 23, 268)] == ["<0x00>", "<0x0A>", "<0xFF>"]
    assert [raw.id_to_piece(idx) for idx in range(SIZE - len(MARKERS), SIZE)] == list(MARKERS)
    assert MARKERS[:2] == (END_OF_SENTENCE, BEGIN)
    assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2} | {
        text: SIZE - len(MARKERS) + at for at, text in enumerate(MARKERS)
    }
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.stop_ids == {2, tokenizer.special_tokens[END_OF_SENTENCE]}


def test_text_is_learnt_without_a_space_put_first(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("明月")) == 1
    assert len(tokenizer.encode("the quick")) <= 3
    assert tokenizer.encode("\n") == [23]


@given(text=st.text("0123456789", min_size=1, max_size=12))
@settings(max_examples=30, deadline=None)
def test_every_digit_is_a_token(text: str, tokenizer: Tokenizer) -> None:
    """The text to learn from is full of 1912 and 2024."""
    assert tokenizer.encode(text) == [3 + int(digit) for digit in text]


@given(text=st.one_of(any_text, spelled_text))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_and_is_never_special(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert not set(ids) & set(tokenizer.special_tokens.values())


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40))
@settings(max_examples=100, deadline=None)
def test_the_library_alone_reads_the_file_alike(text: str, folder: Path, tokenizer: Tokenizer) -> None:
    raw = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert raw.encode(text) == tokenizer.encode(text)


def test_files_are_read_as_programs_for_published_folders_do(folder: Path, tokenizer: Tokenizer) -> None:
    """Jinja renders the template, text is cut at the declared tokens, and the library encodes what lies between."""
    declared = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    ids = {token["content"]: int(idx) for idx, token in declared.items()}
    assert ids == json.loads((folder / "added_tokens.json").read_text()) == tokenizer.special_tokens
    template = jinja2.Template((folder / "chat_template.jinja").read_text())
    clean = [{**message, "content": message["content"].replace(END_OF_SENTENCE, "")} for message in MESSAGES]
    for generate in (True, False):
        text = template.render(messages=clean, add_generation_prompt=generate)
        assert text == tokenizer.render(clean, add_generation_prompt=generate)
        raw = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        parts = re.split("(" + "|".join(map(re.escape, ids)) + ")", text)
        found = [idx for part in parts for idx in ([ids[part]] if part in ids else raw.encode(part))]
        assert found == tokenizer.encode(tokenizer.render(clean, add_generation_prompt=generate))


def test_transformers_reads_the_folder_alike(folder: Path, tokenizer: Tokenizer) -> None:
    pytest.importorskip("google.protobuf", reason="transformers reads SentencePiece files with protobuf")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == SIZE
    roles = (
        "unk_token_id",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "cls_token_id",
        "sep_token_id",
        "mask_token_id",
    )
    found = [getattr(theirs, role) for role in roles]
    specials = tokenizer.special_tokens
    assert found == [0, 1, 2, 0, specials[BEGIN], specials[END_OF_SENTENCE], specials["<mask:1>"]]
    for text in ("the quick brown fox", "床前明月 1912", "  two  spaces", "龘 naïve 😀", "a\n\nb"):
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    clean = [{**message, "content": message["content"].replace(END_OF_SENTENCE, "")} for message in MESSAGES]
    rendered = theirs.apply_chat_template(clean, tokenize=False, add_generation_prompt=True)
    assert rendered == tokenizer.render(clean)
    assert theirs.encode(rendered, add_special_tokens=False) == tokenizer.encode(tokenizer.render(clean))


def test_equal_text_gives_equal_files(save: Callable[..., Path], folder: Path) -> None:
    def contents(path: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in path.iterdir()}

    assert contents(save()) == contents(folder)
    assert contents(save(corpus(1)))["tokenizer.model"] != contents(folder)["tokenizer.model"]


@pytest.mark.parametrize("chat_format", FORMATS)
def test_conversations_are_written_in_the_format_that_was_chosen(
    save: Callable[..., Path], folder: Path, chat_format: str
) -> None:
    ours = load_tokenizer(save(chat_format=chat_format))
    assert ours.chat_format == chat_format
    expected = load_tokenizer(folder, chat_format=chat_format).render(MESSAGES)
    assert ours.render(MESSAGES) == expected
    assert ours.render(MESSAGES).segments == expected.segments
    if chat_format == "ernie":
        assert ours.chat_template is not None, "for other programs"


def test_a_role_that_the_format_lacks_is_refused(tokenizer: Tokenizer) -> None:
    from ernie45.errors import RequestError

    with pytest.raises(RequestError, match="no tool results"):
        tokenizer.render([*MESSAGES, {"role": "tool", "content": "x", "tool_call_id": "1"}])


def test_rare_characters_are_bytes_below_full_coverage(save: Callable[..., Path]) -> None:
    texts = [*corpus() * 4, "龘"]
    num_tokens = {}
    for coverage in (0.9995, 1.0):
        num_tokens[coverage] = len(load_tokenizer(save(texts, character_coverage=coverage)).encode("龘"))
    assert num_tokens == {0.9995: 3, 1.0: 1}


def test_nothing_of_a_line_is_lost_that_the_library_would_drop(save: Callable[..., Path]) -> None:
    """All of the text stands in one long line, beside signs that the library reserves."""
    line = "▁\0\t\r" + "▅".join(corpus() * 2)
    assert len(line) > 16384
    tokenizer = load_tokenizer(save([line]))
    assert len(tokenizer.encode(line)) < len(line) / 1.5
    assert tokenizer.decode(tokenizer.encode(line)) == line
    assert not any("▅" in text or "\t" in text for text in map(tokenizer.token_str, range(269, SIZE)))


def test_too_little_text_is_told_with_a_size_that_works() -> None:
    with pytest.raises(ConfigError, match="too little for a vocabulary of 50000 ids: .* at most (\\d+)") as caught:
        train_model(corpus(), config(vocab_size=50000))
    most = int(str(caught.value).rsplit(" ", 1)[1])
    assert SIZE < most < 50000
    assert len(train_model(corpus(), config(vocab_size=most)).pieces) == most
    with pytest.raises(ConfigError, match=f"at most {most}"):
        train_model(corpus(), config(vocab_size=most + 1))


def test_too_many_characters_are_told_with_a_size_that_works() -> None:
    texts = [chr(code) * 3 for code in range(0x4E00, 0x4E00 + 300)]
    with pytest.raises(ConfigError, match="at least (\\d+), or a character_coverage below 1") as caught:
        train_model(texts, config(vocab_size=400, character_coverage=1.0))
    least = int(str(caught.value).split("at least ")[1].split(",")[0])
    assert len(train_model(texts, config(vocab_size=least, character_coverage=1.0)).pieces) == least


@pytest.mark.parametrize("texts", [[], ["", "\n\n", "\t"]])
def test_no_text_at_all(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="there is no text"):
        train_model(texts, config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 290}, "vocab_size is 290, expected 291"),
        ({"vocab_size": 1 << 23}, "expected 291 .* to 4194304"),
        ({"character_coverage": 0.9}, "character_coverage is 0.9, expected 0.98 to 1"),
        ({"character_coverage": 1.5}, "expected 0.98 to 1"),
        ({"chat_format": "llama"}, "chat_format is 'llama', known are ernie"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_the_smallest_vocabulary() -> None:
    assert len(train_model(["aaaa"], config(vocab_size=291)).pieces) == 291


def test_lines_of_text_and_fields_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo", encoding="utf-8")
    rows = [{"text": "three", "other": "x"}, {"text": ["four", "five"], "other": ["y"]}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    reports: list[tuple[int, int]] = []
    texts = list(read_lines(files, field="text", progress=lambda done, total: reports.append((done, total))))
    assert [text.strip() for text in texts] == ["one", "two", "three", "four", "five"]
    size = sum(file.stat().st_size for file in files)
    assert reports[-1] == (size, size)
    assert sorted(reports) == reports
    assert list(read_lines(files[1:], field="other")) == ["x", "y"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "bad.jsonl:2 is no JSON"),
        (b'{"texts": "a"}', "bad.jsonl:2 has no text in the field 'text': it has texts; choose another field"),
        (b'{"text": 3}', "bad.jsonl:2 has no text"),
        (b'{"text": ["a", null]}', "bad.jsonl:2 has no text"),
        (b'"text"', "bad.jsonl:2 .* it is no object"),
        (b'{"text": "\\ud800"}', "bad.jsonl:2 holds half of a surrogate pair"),
        (b"\xff\xfe", "bad.jsonl:2 is not UTF-8: .* at byte 0; convert the file"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(ConfigError, match=message):
        list(read_lines([path], field="text"))


def test_a_missing_file_is_told_before_any_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(NotFoundError, match="there is no file .*b.txt"):
        next(read_lines([tmp_path / "a.txt", tmp_path / "b.txt"], field="text"))


def test_pieces_are_those_of_the_library(folder: Path) -> None:
    """The learnt part is what the trainer gives for the same settings, untouched."""
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=out, model_type="bpe", vocab_size=SIZE - len(MARKERS),
        byte_fallback=True, user_defined_symbols=list("0123456789"), pad_id=-1, normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    theirs = spm.SentencePieceProcessor(model_proto=out.getvalue())
    ours = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    size = SIZE - len(MARKERS)
    assert [ours.id_to_piece(idx) for idx in range(size)] == [theirs.id_to_piece(idx) for idx in range(size)]
    assert [ours.get_score(idx) for idx in range(size)] == [theirs.get_score(idx) for idx in range(size)]
