"""The walker against the library's own reading, and models that somebody tampered with."""

import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import CheckpointError
from ernie45.processing.sentencepiece_model import Piece, PieceType, SentencePieceModel
from ernie45.processing.tokenizer import load_tokenizer

TEXT = "hello world 12 你好 ＡＢ ﬁ <|im_start|> 😀  é"


def _varint_field(number: int, value: int) -> bytes:
    return bytes([number << 3, value])


@pytest.mark.parametrize("rule", ["identity", "nfkc", "nmt_nfkc_cf"])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_reading_and_writing_agree_with_the_library(rule: str, model_type: str, make_sentencepiece: Any) -> None:
    data = make_sentencepiece(
        normalization_rule_name=rule, model_type=model_type, add_dummy_prefix=True, hard_vocab_limit=False
    )
    model = SentencePieceModel.parse(data, "test")
    oracle = spm.SentencePieceProcessor(model_proto=data)
    assert [piece.text for piece in model.pieces] == [oracle.id_to_piece(idx) for idx in range(oracle.vocab_size())]
    assert [piece.score for piece in model.pieces] == [oracle.get_score(idx) for idx in range(oracle.vocab_size())]
    types = [piece.type for piece in model.pieces]
    assert [kind is PieceType.BYTE for kind in types] == [oracle.is_byte(idx) for idx in range(len(types))]
    assert [kind is PieceType.CONTROL for kind in types] == [oracle.is_control(idx) for idx in range(len(types))]
    assert model.add_dummy_prefix
    assert not model.remove_extra_whitespaces
    written = spm.SentencePieceProcessor(model_proto=model.serialise())
    assert written.encode(TEXT) == oracle.encode(TEXT)
    inner = spm.SentencePieceProcessor(model_proto=model.without_dummy_prefix().serialise())
    assert inner.decode(inner.encode("hello")) == "hello"
    assert inner.encode(" hello") == oracle.encode("hello")


def test_control_pieces_are_out_of_reach(make_sentencepiece: Any) -> None:
    data = make_sentencepiece()
    model = SentencePieceModel.parse(data, "test")
    marker = [piece.text for piece in model.pieces].index("<|im_start|>")
    assert marker in spm.SentencePieceProcessor(model_proto=data).encode("<|im_start|>")
    retyped = model.with_control([marker, 0])
    assert retyped.pieces[0].type is PieceType.UNKNOWN, "a model cannot do without it"
    plain = spm.SentencePieceProcessor(model_proto=retyped.serialise())
    assert marker not in plain.encode("<|im_start|>")
    assert plain.decode(plain.encode("<|im_start|>")) == "<|im_start|>"


def test_built_models_load() -> None:
    pieces = [Piece("<unk>", 0.0, PieceType.UNKNOWN), Piece("▁", -1.0, PieceType.NORMAL)]
    pieces += [Piece("a", -2.0, PieceType.NORMAL), Piece("▁a", -0.5, PieceType.NORMAL)]
    model = SentencePieceModel.build(pieces, add_dummy_prefix=False, remove_extra_whitespaces=False, source="test")
    library = spm.SentencePieceProcessor(model_proto=model.serialise())
    assert library.encode("a a") == [2, 3]
    assert library.unk_id() == 0


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([], "0 unknown pieces"),
        ([Piece("<unk>", 0.0, PieceType.UNKNOWN)] * 2, "2 unknown pieces"),
        ([Piece("<unk>", 0.0, PieceType.UNKNOWN), *[Piece("a", 0.0, PieceType.NORMAL)] * 2], "appears twice"),
        ([Piece("<unk>", float("nan"), PieceType.UNKNOWN)], "score"),
        ([Piece("<unk>", 0.0, PieceType.UNKNOWN), Piece("", 0.0, PieceType.NORMAL)], "has 0 bytes"),
        ([Piece("<unk>", 0.0, PieceType.UNKNOWN), Piece("a\0b", 0.0, PieceType.NORMAL)], "zero character"),
        ([Piece("<unk>", 0.0, PieceType.UNKNOWN), Piece("<0xzz>", 0.0, PieceType.BYTE)], "byte piece"),
        ([Piece("<unk>", 0.0, PieceType.UNKNOWN), Piece("<0x00>", 0.0, PieceType.BYTE)], "1 byte pieces"),
    ],
)
def test_impossible_vocabularies_are_refused(pieces: list[Piece], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        SentencePieceModel.build(pieces, add_dummy_prefix=False, remove_extra_whitespaces=False, source="test")


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (b"\x0a\x7f", "cut off"),
        (b"\x80" * 11, "too long"),
        (b"\x0b", "wire type 3"),
        (b"\x08\x01", "no message"),
        (b"\x0a\x04\x0a\x02\xff\xfe", "not UTF-8"),
        (b"\x0a\x05\x0a\x01z\x18\x09", "unknown type"),
        (b"\x12\x02" + _varint_field(3, 3), "model type is 3"),
        (b"\x12\x03\xc0\x01\x01", "treat_whitespace_as_suffix"),
        (b"\x1a\x02" + _varint_field(5, 0), "escape_whitespaces"),
        (b"\x1a\x03\x12\x01x", "impossible size"),
    ],
)
def test_damage_is_named(tail: bytes, reason: str, make_sentencepiece: Any) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        SentencePieceModel.parse(make_sentencepiece() + tail, "somewhere/tokenizer.model")
    assert "somewhere/tokenizer.model" in str(caught.value)


def _charsmap_range(data: bytes) -> range:
    """Return where the character map of a serialised model lies: it is by far the longest field."""
    name = data.index(b"\x0a\x04nfkc")
    start = name + 6 + 1
    size, shift = 0, 0
    while True:
        byte = data[start]
        size |= (byte & 0x7F) << shift
        start, shift = start + 1, shift + 7
        if byte < 0x80:
            return range(start, start + size)


def test_tampered_character_map_is_refused_or_harmless(make_sentencepiece: Any, tmp_path: Path) -> None:
    """The library does not check its trie: what we let through must be safe to look up in."""
    data = make_sentencepiece(normalization_rule_name="nfkc")
    where = _charsmap_range(data)
    rng = random.Random(3)
    refused = 0
    for _ in range(25):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 4, 64])):
            # The top bytes of trie units hold most of an offset.
            changed[where.start + 4 + 4 * rng.randrange(20_000) + rng.choice([1, 2, 3])] = rng.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(changed)
        try:
            tokenizer = load_tokenizer(tmp_path)
        except CheckpointError:
            refused += 1
            continue
        tokenizer.encode("".join(chr(rng.randrange(0x20, 0xD000)) for _ in range(300)))
    assert refused > 5


def _mutate(data: bytes, seed: int) -> bytes:
    rng = random.Random(seed)
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(out))
        match rng.randrange(4):
            case 0:
                out[at] = rng.randrange(256)
            case 1:
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                del out[at : at + rng.choice([1, 2, 50])]
            case 3:
                out[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 3])))
    return bytes(out[: rng.randrange(len(out))] if rng.random() < 0.1 else out)


@pytest.fixture(scope="module")
def original(make_sentencepiece: Any) -> bytes:
    """Return a small model."""
    data: bytes = make_sentencepiece(vocab_size=340)
    return data


@given(seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_mutated_models_are_refused_or_work(
    seed: int, original: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "tokenizer.model").write_bytes(_mutate(original, seed))
    try:
        tokenizer = load_tokenizer(folder)
    except CheckpointError:
        return
    ids = tokenizer.encode(TEXT)
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)
    assert not set(ids) & set(tokenizer.special_tokens.values()) - {tokenizer.special_tokens.get("<unk>")}
    tokenizer.decode(range(tokenizer.vocab_size), skip_special_tokens=False)


def test_bytes_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match="not a usable SentencePiece model"):
        load_tokenizer(tmp_path)
