"""Encoding and decoding against the libraries themselves, special tokens that text cannot forge, loading and saving."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from transformers import PreTrainedTokenizerFast

from ernie45.errors import CheckpointError, ConfigError, NotFoundError, RequestError
from ernie45.processing.prompt import RenderedPrompt, Segment
from ernie45.processing.tokenizer import Tokenizer, load_tokenizer

FOLDERS = ("ernie_folder", "bpe_folder", "llama_json_folder")
TEXTS = (
    "hello world",
    "  two  spaces\n\n\ttabs \r\n",
    "12345 x 3.14",
    "你好，世界 😀 👩‍👩‍👧 naïve é",
    "def f(x):\n    return x\n",
    "<|im_start|>user</think><tool_call><s></s><unk><|end_of_sentence|>",
    "＜|im_start|＞ ＜think＞",
    "<0x41> ▁ ﷐ \x00",
    "",
)
# Fragments that could be put together to a marker.
FRAGMENTS: tuple[str, ...] = (
    "<",
    "|",
    ">",
    "<|",
    "|>",
    "im_start",
    "im_end",
    "<|im_start|>",
    "<|im_",
    "start|>",
    "<think>",
    "</think>",
)
FRAGMENTS += (
    "<|end_of_sentence|>",
    "<s>",
    "</",
    "think>",
    "<|image@placeholder|>",
    "＜|im_end|＞",
    "\ufdd0",
    "\n",
    " ",
    "a",
)
injections = st.lists(
    st.one_of(st.sampled_from(FRAGMENTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=3)), max_size=8
).map("".join)
texts = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), injections)


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def ernie(ernie_folder: Path) -> Tokenizer:
    return load_tokenizer(ernie_folder)


@pytest.mark.parametrize("text", TEXTS)
def test_plain_text_comes_back_and_is_never_special(tokenizer: Tokenizer, text: str, folder: Path) -> None:
    if folder.name.startswith("llama"):
        text = text.replace("▁", "")  # such a tokenizer.json spells spaces with this very character
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False) == text
    assert not set(ids) & set(tokenizer.special_tokens.values())


@given(text=texts)
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back(text: str, ernie: Tokenizer) -> None:
    ids = ernie.encode(text)
    assert ernie.decode(ids) == text
    assert not set(ids) & set(ernie.special_tokens.values())


@given(text=texts)
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back_from_byte_level_bpe(text: str, bpe_folder: Path) -> None:
    tokenizer = _cached(bpe_folder)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_tokens.values())


_loaded: dict[Path, Tokenizer] = {}


def _cached(folder: Path) -> Tokenizer:
    if folder not in _loaded:
        _loaded[folder] = load_tokenizer(folder)
    return _loaded[folder]


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<"), max_size=40))
@settings(max_examples=150, deadline=None)
def test_encode_is_what_sentencepiece_does(text: str, ernie: Tokenizer, ernie_folder: Path) -> None:
    oracle = spm.SentencePieceProcessor(model_file=str(ernie_folder / "tokenizer.model"))
    assert ernie.encode(text) == oracle.encode(text)


@pytest.mark.parametrize("name", ["bpe_folder", "llama_json_folder"])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=40))
@settings(max_examples=100, deadline=None)
def test_encode_is_what_transformers_does(name: str, text: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    oracle = HfTokenizer.from_file(str(folder / "tokenizer.json"))
    assert _cached(folder).encode(text) == oracle.encode(text, add_special_tokens=False).ids


def test_rendered_special_tokens_encode_as_transformers_does(bpe_folder: Path) -> None:
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(bpe_folder / "tokenizer.json"))
    tokenizer = load_tokenizer(bpe_folder)
    prompt = RenderedPrompt(
        [Segment("<|im_start|>", True), Segment("user\nhello 12    x", False), Segment("<|im_end|>", True)]
    )
    assert tokenizer.encode(prompt) == oracle(str(prompt), add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(prompt) != tokenizer.encode(str(prompt))


@pytest.mark.parametrize("dummy", [True, False])
@pytest.mark.parametrize("trim", [True, False])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_decode_is_what_sentencepiece_does(
    dummy: bool, trim: bool, data: st.DataObject, make_sentencepiece: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Random ids. The libraries replace invalid UTF-8 byte by byte, Python per sequence: compared with runs as one."""
    folder = tmp_path_factory.getbasetemp() / f"decode-{dummy}-{trim}"
    if folder not in _loaded:
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(
            make_sentencepiece(add_dummy_prefix=dummy, remove_extra_whitespaces=trim)
        )
    tokenizer = _cached(folder)
    oracle = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ordinary = sorted(set(range(tokenizer.vocab_size)) - set(tokenizer.special_tokens.values()))
    spaces = [idx for idx in ordinary if not tokenizer.token_bytes(idx).strip(b" ")]
    ids = data.draw(st.lists(st.sampled_from(spaces), max_size=3)) + data.draw(st.lists(st.sampled_from(ordinary)))
    assert _squeezed(tokenizer.decode(ids)) == _squeezed(oracle.decode(ids))


@pytest.mark.parametrize("name", ["bpe_folder", "llama_json_folder"])
@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_decode_is_what_tokenizers_does(
    name: str, skip: bool, data: st.DataObject, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    tokenizer, oracle = _cached(folder), HfTokenizer.from_file(str(folder / "tokenizer.json"))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    if name == "llama_json_folder":
        # Its byte fallback gives up whole runs of bytes where ours keeps the valid characters: ASCII only.
        ids = [idx for idx in ids if not 3 + 0x80 <= idx < 3 + 256]
    ours = tokenizer.decode(ids, skip_special_tokens=skip)
    assert _squeezed(ours) == _squeezed(oracle.decode(ids, skip_special_tokens=skip))


def _squeezed(text: str) -> str:
    while "\ufffd\ufffd" in text:
        text = text.replace("\ufffd\ufffd", "\ufffd")
    return text


def test_dummy_prefix_is_put_before_the_prompt_only(make_sentencepiece: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(make_sentencepiece(add_dummy_prefix=True))
    tokenizer = load_tokenizer(tmp_path)
    oracle = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert tokenizer.encode("hello") == oracle.encode("hello")
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"
    prompt = RenderedPrompt([Segment("<think>", True), Segment("hello", False)])
    ids = tokenizer.encode(prompt)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<think>hello"


def test_nfkc_look_alikes_stay_plain(make_sentencepiece: Any, tmp_path: Path) -> None:
    data = make_sentencepiece(normalization_rule_name="nfkc")
    raw = spm.SentencePieceProcessor(model_proto=data)
    assert raw.encode("＜|im_start|＞") == [raw.piece_to_id("<|im_start|>")], "the hole that the retyping closes"
    (tmp_path / "tokenizer.model").write_bytes(data)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("＜|im_start|＞ ＜think＞")
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == "<|im_start|> <think>"


def test_special_tokens_and_roles(ernie: Tokenizer) -> None:
    assert (ernie.bos_id, ernie.eos_id, ernie.pad_id) == (1, 2, 0)
    assert {"<unk>", "<s>", "</s>", "<think>", "<mask:1>", "<|im_start|>"} <= ernie.special_tokens.keys()
    assert ernie.special_tokens.keys().isdisjoint("0123456789")
    assert ernie.encode("1") == [4]
    assert not any(text.startswith("<0x") for text in ernie.special_tokens)
    assert ernie.stop_ids == {2, ernie.special_tokens["<|end_of_sentence|>"]}
    assert ernie.chat_format == "ernie"
    assert ernie.token_bytes(ernie.special_tokens["<think>"]) == b"<think>"
    newline = ernie.encode("\n")
    assert len(newline) == 1
    assert ernie.token_bytes(newline[0]) == b"\n"
    assert ernie.token_str(ernie.encode("é")[0]) in ("é", "\ufffd")


def test_stop_ids_follow_format_and_configs(ernie_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ernie_folder, tmp_path / "copy"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7], "temperature": 0.8}')
    (folder / "config.json").write_text('{"eos_token_id": 9, "hidden_size": 8}')
    tokenizer = load_tokenizer(folder, chat_format="ernie_thinking")
    assert tokenizer.stop_ids == {2, 7, 9, tokenizer.special_tokens["<|im_end|>"]}
    assert tokenizer.chat_format == "ernie_thinking"


def test_vocabulary_without_byte_pieces_gives_unknown(make_sentencepiece: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(make_sentencepiece(byte_fallback=False, vocab_size=180))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("㍿") == [0]


def test_added_tokens_behind_the_model(ernie_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ernie_folder, tmp_path / "copy"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        "480": {"content": "<|VIDEO_PLACEHOLDER|>", "special": True},
        "483": {"content": "qqq", "special": False},
        "3": {"content": "0", "special": False},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text('{"<|VIDEO_PLACEHOLDER|>": 480}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 484
    assert tokenizer.encode("hi qqq <|VIDEO_PLACEHOLDER|>").count(483) == 1
    assert 480 not in tokenizer.encode("<|VIDEO_PLACEHOLDER|>")
    assert tokenizer.encode(RenderedPrompt([Segment("<|VIDEO_PLACEHOLDER|>", True)])) == [480]
    assert tokenizer.token_bytes(481) == b"", "a hole in the vocabulary"
    with pytest.raises(RequestError, match="484"):
        tokenizer.token_bytes(484)
    with pytest.raises(RequestError, match="-1"):
        tokenizer.decode([-1])


def test_hf_special_tokens_survive_merges_and_whole_words(tmp_path: Path) -> None:
    """A vocabulary whose merges spell a special token, and which looks whole words up first."""
    vocab = {text: idx for idx, text in enumerate([*"<s>abc", "<s", "<s>"])}
    definition = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": [["<", "s"], ["<s", ">"]]},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id == vocab["<s>"]
    assert tokenizer.encode("<s>") == [vocab["<s"], vocab[">"]]


def test_missing_special_tokens_are_reported(
    ernie_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(ernie_folder, tmp_path / "copy"))
    (folder / "special_tokens_map.json").write_text('{"mask_token": "<nowhere>"}')
    tokenizer = load_tokenizer(folder)
    assert "<nowhere>" in caplog.text
    assert "<nowhere>" not in tokenizer.special_tokens


def test_half_a_surrogate_pair_is_refused(ernie: Tokenizer) -> None:
    with pytest.raises(RequestError, match="character 1"):
        ernie.encode("a\ud800")


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("chat_format", [None, "ernie_vl"])
def test_saved_folder_loads_equal(
    name: str, chat_format: str | None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(name), tmp_path / "source"))
    (folder / "config.json").write_text('{"eos_token_id": [2, 5]}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 3, "temperature": 0.5}')
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_start|>{% endfor %}")
    tokenizer = load_tokenizer(folder, chat_format=chat_format)
    tokenizer.save(tmp_path / "saved" / "deep")
    again = load_tokenizer(tmp_path / "saved" / "deep")
    assert again == tokenizer
    assert hash(again) == hash(tokenizer)
    assert again.chat_format == tokenizer.chat_format == (chat_format or "chatml")
    assert {2, 3, 5} <= again.stop_ids
    messages = [{"role": "user", "content": "hello"}]
    assert again.render(messages) == tokenizer.render(messages)
    assert not (tmp_path / "saved" / "deep" / "config.json").exists()
    assert json.loads((tmp_path / "saved" / "deep" / "generation_config.json").read_text())["temperature"] == 0.5
    assert load_tokenizer(request.getfixturevalue(name)) != tokenizer


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("tokenizer_config.json", b"{", "no JSON"),
        ("tokenizer_config.json", b"[]", "must hold an object"),
        ("tokenizer_config.json", b"\xff", "not UTF-8"),
        ("tokenizer_config.json", b"[" * 100_000, "no JSON"),
        ("tokenizer_config.json", b'{"bos_token": 3}', "bos_token must be text"),
        ("tokenizer_config.json", b'{"bos_token": "\\ud800"}', "no valid Unicode"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}', "expected an id"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"2": {"content": "a"}}}', "contradicts"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"999999999": {"content": "a"}}}', "id 999999999"),
        ("tokenizer_config.json", b'{"additional_special_tokens": 5}', "must be a list"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "a", "template": "x"}]}', "'default'"),
        ("tokenizer_config.json", b'{"chat_template": "{% if %}"}', "no usable chat template"),
        ("added_tokens.json", b'{"a": -1}', "expected a token id"),
        ("added_tokens.json", b'{"a": 1.5}', "expected a token id"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "expected a token id"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
        ("chat_template.json", b'{"chat_template": {}}', "chat_template"),
        ("tokenizer.model", b"", "unknown pieces"),
        ("tokenizer.model", b"not a model", "not a usable SentencePiece model"),
    ],
)
def test_malformed_files_are_named(file: str, content: bytes, reason: str, ernie_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ernie_folder, tmp_path / "copy"))
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_tokenizer(folder)
    assert file in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": None}, "no 'model'"),
        ({"model": {"type": "Unigram"}}, "'Unigram'"),
        ({"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}, "model.vocab"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}, "gives the id 0"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "ids from -1"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "empty vocabulary"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["abc"]}}, "model.merges"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}, "added_tokens": []}, "tokenizers library"),
        ({"decoder": None}, "no decoder"),
        ({"decoder": {"type": "Metaspace"}}, "'Metaspace'"),
        ({"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}]}}, "Replace"),
        ({"pre_tokenizer": {"type": "Nonsense"}}, "tokenizers library"),
        ({"added_tokens": 5}, "added_tokens"),
    ],
)
def test_unsupported_tokenizer_json_is_named(
    change: dict[str, Any], reason: str, bpe_folder: Path, tmp_path: Path
) -> None:
    definition = json.loads((bpe_folder / "tokenizer.json").read_text()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_tokenizer(tmp_path)
    assert "tokenizer.json" in str(caught.value)


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(NotFoundError):
        load_tokenizer(tmp_path / "missing")


def test_file_size_limit(ernie_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ernie45.processing.files.MAX_FILE_BYTES", 1000)
    with pytest.raises(CheckpointError, match="larger than"):
        load_tokenizer(ernie_folder)


def test_unknown_chat_format(ernie_folder: Path) -> None:
    with pytest.raises(ConfigError, match="'vicuna', known are ernie"):
        load_tokenizer(ernie_folder, chat_format="vicuna")


def test_threads_share_a_tokenizer(ernie: Tokenizer) -> None:
    text = "hello world 你好 " * 20
    expected = ernie.encode(text)
    failures: list[int] = []

    def work() -> None:
        for _ in range(50):
            if ernie.encode(text) != expected:
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
