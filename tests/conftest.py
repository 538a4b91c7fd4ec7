"""Fixtures that several folders share: small networks, ours and transformers', with every parameter random, and a
vocabulary trained on the spot.

A fresh transformers ERNIE MoE has an all-zero router, so that every expert ties: `randomise` gives router and
correction bias values, without which no routing test proves anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ernie45.config.model import ModelConfig, MoeConfig
from ernie45.models.build import build_model
from ernie45.models.init import initialize
from ernie45.models.text import CausalLM


def randomise(model: nn.Module, seed: int) -> None:
    """Draw every parameter and persistent buffer: norms around one, the correction bias wide enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            drawn = torch.empty(tensor.shape).normal_(0, 1, generator=generator)
            if name.endswith("norm.weight"):
                tensor.copy_(1 + 0.1 * drawn)
            else:
                # 0.05 x hidden 64 gives logits and router scores of order one
                tensor.copy_(drawn * (0.05 if tensor.ndim > 1 else 0.02))


@pytest.fixture(scope="session")
def transformers_model() -> Callable[..., Any]:
    """Builds a random `Ernie4_5ForCausalLM` or, with `moe_*` arguments, an `Ernie4_5_MoeForCausalLM`."""
    transformers = pytest.importorskip("transformers")

    def build(seed: int = 0, **fields: Any) -> Any:
        moe = any(name.startswith("moe_") for name in fields)
        config_class = transformers.Ernie4_5_MoeConfig if moe else transformers.Ernie4_5Config
        head_dim = fields.pop("head_dim", None)
        config = config_class(**fields)
        config.head_dim = head_dim or config.hidden_size // config.num_attention_heads
        config._attn_implementation = "eager"
        model = (transformers.Ernie4_5_MoeForCausalLM if moe else transformers.Ernie4_5ForCausalLM)(config).eval()
        randomise(model, seed)
        if config.tie_word_embeddings:
            model.tie_weights()
        return model

    return build


SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture(scope="session")
def small_model() -> Callable[..., CausalLM]:
    """Builds one of our networks with random weights: `small_model(moe=True, mtp=1, ...)`."""

    def build(
        *, moe: bool = False, mtp: int = 0, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
    ) -> CausalLM:
        experts = MoeConfig(
            moe_num_experts=8, moe_k=3, moe_intermediate_size=24, moe_num_shared_experts=2, moe_layer_start_index=1
        )
        config = ModelConfig(**(SMALL | {"moe": experts if moe else None, "num_nextn_predict_layers": mtp} | changes))
        model = build_model(config, dtype=dtype)
        initialize(model, std=0.1, seed=seed, correction_bias_std=0.05)
        return model.eval()

    return build


@pytest.fixture
def check_png() -> Callable[[Path], tuple[int, int]]:
    """Gives width and height of a PNG that somebody could look at: of a sensible size, and not one colour all over."""

    def check(path: Path) -> tuple[int, int]:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
        assert 600 <= width <= 2000
        assert 200 <= height <= 2000
        assert len(data) > width * height / 100, "an empty picture compresses to less"
        return width, height

    return check


@pytest.fixture(scope="session")
def train_byte_level(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a folder with a byte-level BPE of 320 tokens: `train_byte_level(sentences, special=[...], bos="<s>")`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def train(sentences: Sequence[str], *, special: Sequence[str], bos: str) -> Path:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=list(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(sentences, trainer)
        folder = tmp_path_factory.mktemp("byte_level")
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": "</s>"}))
        return folder

    return train
