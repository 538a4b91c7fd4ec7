"""A store of models of this folder's own, and a way to run `ernie` in this process."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import ernie45
from ernie45.cli.main import main

VOCAB_SIZE = 320
SPECIAL = ["<|begin_of_sentence|>", "<|end_of_sentence|>", "</s>", "<think>", "</think>"]


class Outcome(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


class _Stdin(io.StringIO):
    """What a pipe delivers."""

    def isatty(self) -> bool:
        return False


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level vocabulary without a chat template, so that ERNIE's text format applies."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog, User: Assistant: "] * 20, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": SPECIAL[0], "eos_token": "</s>"}))
    return folder


@pytest.fixture(scope="session")
def tiny(small_model: Callable[..., Any], tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights that writes a text of nonsense and no end token in the first tokens."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = small_model(vocab_size=VOCAB_SIZE, max_position_embeddings=256)
    ernie45.save_model(model, folder, tokenizer=ernie45.load_tokenizer(tokenizer_folder))
    return folder


@pytest.fixture
def home(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store that holds the model `tiny`."""
    store = tmp_path / "home"
    (store / "models").mkdir(parents=True)
    (store / "models" / "tiny").symlink_to(tiny)
    monkeypatch.setenv("ERNIE45_HOME", str(store))
    monkeypatch.chdir(tmp_path)
    return store


@pytest.fixture
def ernie(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """Runs a command; `stdin` is what a pipe delivers."""

    def run(*argv: str, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "stdin", _Stdin(stdin))
        code = main(argv)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run
