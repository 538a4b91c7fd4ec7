"""A small vocabulary with thought markers, networks with kernel leaves, and a driver that proves the books after every step."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import ernie45
from ernie45.checkpoint.source import ModuleSource
from ernie45.checkpoint.write import write_folder
from ernie45.engine.engine import Engine
from ernie45.engine.pieces import Completion, join
from ernie45.engine.request import End, Output, PromptScores, Request
from ernie45.kernels.native import status
from ernie45.layers.native import use_kernel_leaves
from ernie45.models.text import CausalLM
from ernie45.processing.tokenizer import Tokenizer
from ernie45.quant.quantize import quantize_checkpoint


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level vocabulary of 101 tokens: specials, then bytes of ASCII, in an order of no meaning."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:94], "Ġ", "Ċ"]  # ASCII, space, newline
    specials = ["<s>", "</s>", "<|im_end|>", "<think>", "</think>"]
    vocab = {text: i for i, text in enumerate(specials)} | {c: i + 5 for i, c in enumerate(alphabet)}
    built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens(specials)
    folder = tmp_path_factory.mktemp("tokenizer")
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return ernie45.load_tokenizer(folder)


@pytest.fixture(scope="session")
def thinking_tokenizer(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same vocabulary with the chat format of the thinking model."""
    folder = tmp_path_factory.mktemp("thinking")
    tokenizer.save(folder)
    return ernie45.load_tokenizer(folder, chat_format="ernie_thinking")


@pytest.fixture(scope="session")
def network(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], CausalLM]:
    """Networks by name, built once: dense, moe, and packed-dense, packed-moe in 4 bits. Routers and bias are random."""
    built: dict[str, CausalLM] = {}

    def make(name: str) -> CausalLM:
        model: CausalLM = small_model(moe=name.endswith("moe"), seed=3, hidden_size=64, mtp=1)
        if name.startswith("packed"):
            if not status().available:
                pytest.skip("packed weights give the same bits in every batch with the native kernels only")
            folder = tmp_path_factory.mktemp(name)
            write_folder(ModuleSource(model, model.config), folder / "plain", layout="pt")
            quantize_checkpoint(folder / "plain", folder / "packed", "wint4-all")
            return ernie45.load_model(folder / "packed")
        use_kernel_leaves(model)
        return model.requires_grad_(False)

    def get(name: str) -> CausalLM:
        return built.setdefault(name, built.get(name) or make(name))

    return get


@pytest.fixture(scope="session")
def tokens() -> Callable[[int, int], list[int]]:
    """Draws ordinary tokens: `tokens(seed, count)`."""

    def draw(seed: int, count: int) -> list[int]:
        return torch.randint(5, 101, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

    return draw


@pytest.fixture(scope="session")
def drive() -> Callable[..., Any]:
    """Builds a `Driver` around an engine."""
    return Driver


@dataclass
class Driver:
    """Steps an engine and keeps what it publishes."""

    engine: Engine
    outputs: dict[tuple[str, int], list[Any]] = field(default_factory=dict)
    scores: dict[str, PromptScores] = field(default_factory=dict)
    ends: dict[str, End] = field(default_factory=dict)

    def add(self, name: str, prompt: Sequence[int], params: Any = None, **fields: Any) -> None:
        self.engine.add(Request(id=name, prompt=tuple(prompt), params=params or ernie45.SamplingParams(), **fields))

    def step(self) -> None:
        for event in self.engine.step():
            assert event.request_id not in self.ends, "nothing comes behind the end"
            if isinstance(event, Output):
                self.outputs.setdefault((event.request_id, event.index), []).append(event.piece)
            elif isinstance(event, PromptScores):
                self.scores[event.request_id] = event
            else:
                self.ends[event.request_id] = event
        self.engine.check()

    def run(self, limit: int = 5000) -> Driver:
        """Until nothing is left; all pages are free or cached then."""
        while self.engine.has_work:
            self.step()
            limit -= 1
            assert limit, "the engine does not come to an end"
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.pages.in_use) == (0, 0, 0)
        return self

    def completion(self, name: str, index: int = 0) -> Completion:
        return join(self.outputs[name, index], 0)

    def ids(self, name: str, index: int = 0) -> list[int]:
        return [i for piece in self.outputs.get((name, index), []) for i in piece.ids]
