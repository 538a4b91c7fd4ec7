"""Small models with chat formats, and real servers in processes of their own: what these tests talk to is `ernie serve`."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ernie45
from tests.server.served import Served, launch


@pytest.fixture(scope="session")
def model_folder(small_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of a small random MoE model with a byte vocabulary, by chat format: `ernie`, `ernie_thinking`, .."""
    tokenizers = pytest.importorskip("tokenizers")
    built: dict[str, Path] = {}

    def make(chat_format: str) -> Path:
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        specials = ["<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|im_start|>", "<|im_end|>"]
        specials += ["<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>"]
        vocab = {text: i for i, text in enumerate([*specials, *alphabet])}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        tokenizer.add_special_tokens(specials)
        raw = tmp_path_factory.mktemp("raw")
        tokenizer.save(str(raw / "tokenizer.json"))
        (raw / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        folder = tmp_path_factory.mktemp("models") / chat_format
        model = small_model(moe=True, seed=5, vocab_size=len(vocab), mtp=1, max_position_embeddings=4096)
        ernie45.save_model(model, folder, tokenizer=ernie45.load_tokenizer(raw, chat_format=chat_format))
        return folder

    def get(chat_format: str) -> Path:
        if chat_format not in built:
            built[chat_format] = make(chat_format)
        return built[chat_format]

    return get


@pytest.fixture(scope="session")
def start(model_folder: Callable[[str], Path]) -> Iterator[Callable[..., Served]]:
    """Starts a server that is stopped in the end: `start("ernie_thinking", "--max-num-seqs", "4")`."""
    running: list[Served] = []

    def begin(chat_format: str = "ernie_thinking", *options: str, **settings: Any) -> Served:
        served = launch(model_folder(chat_format), *options, **settings)
        running.append(served)
        return served

    yield begin
    for served in running:
        served.stop(signal.SIGKILL)


@pytest.fixture(scope="session")
def server(start: Callable[..., Served]) -> Served:
    """One that most tests share: thinks, knows tools, random weights. Leave it as it was."""
    return start("ernie_thinking", "--max-model-len", "2048", "--served-model-name", "tiny", "baidu/ERNIE-4.5-Tiny")


@pytest.fixture(scope="session")
def plain_server(start: Callable[..., Served]) -> Served:
    """One without thinking and tools."""
    return start("ernie", "--max-model-len", "2048", "--served-model-name", "plain")
