"""Streamed text equals decoded text, and no half characters are shown."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.processing.detokenizer import Detokenizer
from ernie45.processing.tokenizer import Tokenizer, load_tokenizer

FOLDERS = ("ernie_folder", "bpe_folder", "llama_json_folder")
_loaded: dict[str, Tokenizer] = {}


def _tokenizer(name: str, request: pytest.FixtureRequest) -> Tokenizer:
    if name not in _loaded:
        folder: Path = request.getfixturevalue(name)
        _loaded[name] = load_tokenizer(folder)
    return _loaded[name]


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_pieces_add_up_to_decode(name: str, skip: bool, data: st.DataObject, request: pytest.FixtureRequest) -> None:
    tokenizer = _tokenizer(name, request)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    text = data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
    ids += tokenizer.encode(text)
    stream = Detokenizer(tokenizer, skip_special_tokens=skip)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids, skip_special_tokens=skip)
    if skip and not tokenizer.vocabulary.drops_first_space:
        kept = [idx for idx in ids if idx not in tokenizer.special_tokens.values()]
        raw = b"".join(map(tokenizer.token_bytes, kept))
        assert tokenizer.decode(ids) == raw.decode("utf-8", "replace")


@pytest.mark.parametrize("name", FOLDERS)
def test_half_characters_wait(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = _tokenizer(name, request)
    ids = tokenizer.encode("😀")
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces[:-1]).strip() == ""
    assert pieces[-1] == "😀"
    assert stream.finish() == ""


def test_cut_character_ends_as_replacement(request: pytest.FixtureRequest) -> None:
    tokenizer = _tokenizer("ernie_folder", request)
    stream = Detokenizer(tokenizer)
    assert [stream.push(token_id) for token_id in tokenizer.encode("😀")[:-1]] == ["", "", ""]
    assert stream.finish() == "\ufffd"


def test_special_tokens_are_skipped_or_written(request: pytest.FixtureRequest) -> None:
    tokenizer = _tokenizer("ernie_folder", request)
    ids = [tokenizer.special_tokens["<think>"], *tokenizer.encode("hello")]
    assert [Detokenizer(tokenizer, skip).push(ids[0]) for skip in (True, False)] == ["", "<think>"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<think>hello"
