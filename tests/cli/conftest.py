"""A store of models of this folder's own, and a way to run `ernie` in this process."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

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
def tokenizer_folder(train_byte_level: Callable[..., Path]) -> Path:
    """A byte-level vocabulary without a chat template, so that ERNIE's text format applies."""
    sentences = ["the quick brown fox jumps over the lazy dog, User: Assistant: "] * 20
    return train_byte_level(sentences, special=SPECIAL, bos=SPECIAL[0])


@pytest.fixture(scope="session")
def save_random(small_model: Callable[..., Any], tokenizer_folder: Path) -> Callable[..., Path]:
    """Saves a checkpoint of random weights that writes nonsense, and greedily never ends."""

    def save(folder: Path, **fields: Any) -> Path:
        model = small_model(vocab_size=VOCAB_SIZE, tie_word_embeddings=False, **fields)
        model.lm_head.weight.detach()[: len(SPECIAL)] = 0  # logit 0, and the largest of 315 random ones is above
        ernie45.save_model(model, folder, tokenizer=ernie45.load_tokenizer(tokenizer_folder))
        return folder

    return save


@pytest.fixture(scope="session")
def tiny(save_random: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a context of 256 tokens."""
    return save_random(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=256)


@pytest.fixture
def endless(save_random: Callable[..., Path], home: Path) -> str:
    """Name of a model whose greedy answers take longer than any test."""
    save_random(home / "models" / "endless", max_position_embeddings=1 << 20)
    return "endless"


@pytest.fixture
def home(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store that holds the model `tiny`."""
    store = tmp_path / "home"
    (store / "models").mkdir(parents=True)
    (store / "models" / "tiny").symlink_to(tiny)
    monkeypatch.setenv("ERNIE45_HOME", str(store))
    monkeypatch.chdir(tmp_path)
    # processes that a test starts from there find the package, too, where it is not installed
    root = str(Path(ernie45.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
    return store


@pytest.fixture
def ernie(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs a command; `stdin` is what a pipe delivers."""

    def run(*argv: str, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "stdin", _Stdin(stdin))
        code = main(argv)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run
