"""Small checkpoints with a tokenizer, and an empty store."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm

import ernie45
from ernie45.errors import NotFoundError, TransferError
from ernie45.store.location import DEFAULT_MODEL, resolve

VOCAB_SIZE = 320
# All of them answered at length: the comparisons count tokens.
_QUESTIONS = (
    "Tell me about the history of Paris.",
    "Write a story about the sea and an old sailor.",
    "Explain why the sky is blue.",
    "List three fruits and describe each.",
    "How do I learn to play the piano?",
)
_SENTENCES = ["the quick brown fox jumps over the lazy dog", "User: hello world, Assistant: 你好 naïve système"] * 20


@pytest.fixture(scope="session")
def bpe_folder(train_byte_level: Callable[..., Path]) -> Path:
    """A byte-level BPE vocabulary as tokenizer.json, 320 tokens."""
    special = ["<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>"]
    return train_byte_level(_SENTENCES, special=special, bos="<s>")


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece vocabulary with ERNIE's ids (unk 0, bos 1, eos 2, digits from 3), 320 tokens."""
    out = io.BytesIO()
    markers = ["<|end_of_sentence|>", "<|begin_of_sentence|>", "<|im_start|>", "<|im_end|>"]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES),
        model_writer=out,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        user_defined_symbols=[*"0123456789", *markers],
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture
def save(small_model: Callable[..., Any], bpe_folder: Path) -> Callable[..., Path]:
    """Writes a checkpoint of random weights: `save(folder, moe=True)`."""

    def write(folder: Path, *, tokenizer: Path | None = bpe_folder, layout: Any = "pt", **fields: Any) -> Path:
        model = small_model(**({"vocab_size": VOCAB_SIZE} | fields))
        words = None if tokenizer is None else ernie45.load_tokenizer(tokenizer)
        ernie45.save_model(model, folder, layout=layout, tokenizer=words)
        return folder

    return write


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store; the working directory is beside it."""
    store = tmp_path / "home"
    monkeypatch.setenv("ERNIE45_HOME", str(store))
    monkeypatch.chdir(tmp_path)
    return store


@pytest.fixture(scope="session")
def default_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The real default model: the one in the store, else fetched for this run; skips where neither can be had."""
    try:
        yield resolve()
        return
    except NotFoundError:
        pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERNIE45_HOME", str(tmp_path_factory.mktemp("home")))
        try:
            fetched = ernie45.pull(DEFAULT_MODEL).path
        except TransferError as error:
            pytest.skip(f"the default model is not in the store and cannot be fetched: {error}")
    yield fetched
    shutil.rmtree(fetched)  # half a gigabyte


@pytest.fixture(scope="session")
def prompts(default_model: Path) -> list[list[int]]:
    """Ids of ten prompts for the default model: five questions in its chat format, five texts to continue."""
    tokenizer = ernie45.load_tokenizer(default_model)
    questions = [tokenizer.encode(tokenizer.render([{"role": "user", "content": text}])) for text in _QUESTIONS]
    texts = (
        *("Once upon a time", "def fibonacci(n):\n", "The three laws of thermodynamics are", "1 + 1 = 2, 2 + 2 ="),
        "In 1969, the first human being",
    )
    return [*questions, *(tokenizer.encode(text) for text in texts)]
