"""Vocabularies through GGUF metadata and back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter, TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from ernie45.errors import CheckpointError
from ernie45.processing.gguf_vocab import tokenizer_files_from_gguf
from ernie45.processing.tokenizer import Tokenizer, load_tokenizer

TEXTS = ("hello world 12345", "  two  spaces\n\n\t", "你好 😀 é", "def f(x):\n    return x", "<|im_start|></think> ")
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30)


def _write(folder: Path, metadata: dict[str, object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files_from_gguf(metadata).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module", params=["ernie_folder", "bpe_folder"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    """Return a tokenizer and the one that comes back out of its GGUF metadata."""
    original = load_tokenizer(request.getfixturevalue(request.param))
    return original, load_tokenizer(_write(tmp_path_factory.mktemp("gguf"), original.gguf_metadata()))


@given(text=texts)
@settings(max_examples=80, deadline=None)
def test_round_trip_encodes_alike(text: str, pair: tuple[Tokenizer, Tokenizer]) -> None:
    original, again = pair
    assert again.encode(text) == original.encode(text)
    assert again.decode(again.encode(text)) == text


def test_round_trip_keeps_ids_and_markers(pair: tuple[Tokenizer, Tokenizer]) -> None:
    original, again = pair
    assert again.special_tokens == original.special_tokens
    assert (again.bos_id, again.eos_id, again.pad_id) == (original.bos_id, original.eos_id, original.pad_id)
    assert [again.token_bytes(idx) for idx in range(again.vocab_size)] == [
        original.token_bytes(idx) for idx in range(original.vocab_size)
    ]
    for text in TEXTS:
        assert again.encode(text) == original.encode(text)


def test_round_trip_through_a_file(bpe_folder: Path, tmp_path: Path) -> None:
    """Written and read by the gguf package, which checks types of its own."""
    metadata = load_tokenizer(bpe_folder).gguf_metadata() | {"tokenizer.chat_template": "{{ messages[0].content }}"}
    writer = GGUFWriter(tmp_path / "vocab.gguf", "llama")
    writer.add_tokenizer_model(metadata["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(metadata["tokenizer.ggml.pre"])
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    writer.add_token_types([TokenType(kind) for kind in metadata["tokenizer.ggml.token_type"]])
    writer.add_token_merges(metadata["tokenizer.ggml.merges"])
    writer.add_eos_token_id(metadata["tokenizer.ggml.eos_token_id"])
    writer.add_chat_template(metadata["tokenizer.chat_template"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = GGUFReader(tmp_path / "vocab.gguf").fields
    read = {key: field.contents() for key, field in fields.items()}
    tokenizer = load_tokenizer(_write(tmp_path / "out", read))
    assert tokenizer.encode("hello world 12") == load_tokenizer(bpe_folder).encode("hello world 12")
    assert tokenizer.render([{"role": "user", "content": "<|im_end|>"}]) == "<|im_end|>"
    assert tokenizer.gguf_metadata()["tokenizer.chat_template"] == "{{ messages[0].content }}"


def test_metadata_of_a_sentencepiece_vocabulary(ernie_folder: Path) -> None:
    metadata = load_tokenizer(ernie_folder).gguf_metadata()
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.tokens"][:5] == ["<unk>", "<s>", "</s>", "0", "1"]
    assert metadata["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 4]
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["tokenizer.ggml.add_space_prefix"] is False
    assert metadata["tokenizer.ggml.padding_token_id"] == 0
    assert "tokenizer.chat_template" not in metadata
    assert len(metadata["tokenizer.ggml.scores"]) == len(metadata["tokenizer.ggml.tokens"])


def test_metadata_may_be_numpy(ernie_folder: Path, tmp_path: Path) -> None:
    original = load_tokenizer(ernie_folder)
    metadata = original.gguf_metadata()
    metadata["tokenizer.ggml.scores"] = np.array(metadata["tokenizer.ggml.scores"], dtype=np.float32)
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"], dtype=np.int32)
    assert load_tokenizer(_write(tmp_path, metadata)).encode(TEXTS[0]) == original.encode(TEXTS[0])


def test_end_of_turn_id_stops(bpe_folder: Path, tmp_path: Path) -> None:
    metadata = load_tokenizer(bpe_folder).gguf_metadata() | {"tokenizer.ggml.eot_token_id": 0}
    assert {0, 2} <= load_tokenizer(_write(tmp_path, metadata)).stop_ids


# What each kind does to text, by hand. Byte-level spelling: Ġ is a space, Ċ a newline.
@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "It's 123  x", ["It", "'s", "Ġ123", "Ġ", "Ġx"]),
        ("default", "It's 123  x", ["It", "'s", "Ġ123", "Ġ", "Ġx"]),
        ("smollm", "It's 123  x", ["It", "'s", "Ġ", "1", "2", "3", "Ġ", "Ġx"]),
        ("qwen2", "IT'S 123\n\n x", ["IT", "'S", "Ġ", "1", "2", "3", "ĊĊ", "Ġx"]),
        ("llama-bpe", "IT'S 1234\n\n x", ["IT", "'S", "Ġ", "123", "4", "ĊĊ", "Ġx"]),
    ],
)
def test_pre_tokenizers_split_as_published(pre: str, text: str, words: list[str], bpe_folder: Path) -> None:
    metadata = load_tokenizer(bpe_folder).gguf_metadata() | {"tokenizer.ggml.pre": pre}
    definition = json.loads(tokenizer_files_from_gguf(metadata)["tokenizer.json"])
    assert [word for word, _ in _pre_tokenizer(definition["pre_tokenizer"]).pre_tokenize_str(text)] == words


def _pre_tokenizer(spec: dict[str, Any]) -> Any:
    if spec["type"] == "Sequence":
        return pre_tokenizers.Sequence([_pre_tokenizer(step) for step in spec["pretokenizers"]])
    if spec["type"] == "Split":
        return pre_tokenizers.Split(Regex(spec["pattern"]["Regex"]), "isolated")
    if spec["type"] == "Digits":
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=spec["use_regex"])


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_pre_tokenizer_names_come_back(pre: str, bpe_folder: Path, tmp_path: Path) -> None:
    metadata = load_tokenizer(bpe_folder).gguf_metadata() | {"tokenizer.ggml.pre": pre}
    assert load_tokenizer(_write(tmp_path, metadata)).gguf_metadata()["tokenizer.ggml.pre"] == pre


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("model", "bert", "'bert'"),
        ("pre", "deepseek-r1", "'deepseek-r1'"),
        ("pre", 5, "5"),
        ("tokens", None, "tokens"),
        ("tokens", ["a", 3], "must hold texts"),
        ("tokens", ["a", "a"], "token_type"),
        ("token_type", [1], "token_type"),
        ("merges", ["a"], r"merges\[0\]"),
        ("eos_token_id", 10**9, "eos_token_id"),
        ("eos_token_id", "x", "eos_token_id"),
    ],
)
def test_malformed_metadata_is_named(key: str, value: object, reason: str, bpe_folder: Path) -> None:
    metadata = load_tokenizer(bpe_folder).gguf_metadata() | {f"tokenizer.ggml.{key}": value}
    with pytest.raises(CheckpointError, match=reason):
        tokenizer_files_from_gguf(metadata)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokenizer.ggml.scores": [1.0]}, "1 scores"),
        ({"tokenizer.ggml.add_space_prefix": 3}, "add_space_prefix"),
        ({"tokenizer.chat_template": 3}, "chat_template"),
        ({"tokenizer.ggml.tokens": ["a"] * 480}, "appears twice"),
    ],
)
def test_malformed_sentencepiece_metadata_is_named(change: dict[str, object], reason: str, ernie_folder: Path) -> None:
    metadata = load_tokenizer(ernie_folder).gguf_metadata() | change
    with pytest.raises(CheckpointError, match=reason):
        tokenizer_files_from_gguf(metadata)


def test_doubled_bpe_token_is_named(bpe_folder: Path) -> None:
    metadata = load_tokenizer(bpe_folder).gguf_metadata()
    metadata["tokenizer.ggml.tokens"][5] = metadata["tokenizer.ggml.tokens"][6]
    with pytest.raises(CheckpointError, match="twice"):
        tokenizer_files_from_gguf(metadata)


def test_llama_style_json_has_no_gguf_name(llama_json_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no byte-level BPE"):
        load_tokenizer(llama_json_folder).gguf_metadata()
