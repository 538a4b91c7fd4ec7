"""A tokenizer, a few texts and a run file over them: what tests of whole runs begin with."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TEXT = "the moon rises over a quiet river and light falls on old stones while someone reads a letter from far away"
WORDS = TEXT.split()


@pytest.fixture(scope="session")
def tokenizer_folder(train_byte_level: Callable[..., Path]) -> Path:
    """A byte-level vocabulary of 320 tokens with the markers of the plain ERNIE format."""
    special = ["<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>"]
    return train_byte_level([" ".join(WORDS)] * 20, special=special, bos="<s>")


def sentence(seed: int) -> str:
    """A sentence that follows from the seed."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(4, 30)))


@pytest.fixture
def run_file(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., Path]:
    """Writes rows and a run file over them: `run_file(method="sft", train={"steps": 3})`; sections are merged into the default."""
    import yaml

    def write(name: str = "run.yaml", **sections: Any) -> Path:
        method = sections.pop("method", "pretrain")
        rows = tmp_path / f"{method}.jsonl"
        rows.write_text("".join(json.dumps(_row(method, seed)) + "\n" for seed in range(60)))
        config: dict[str, Any] = {
            "method": method,
            "model": {"tokenizer": str(tokenizer_folder), "network": _NETWORK},
            "data": {"train": [{"path": str(rows)}], "max_seq_len": 96, "buffer_rows": 2, "chat_format": "ernie"},
            "train": {"steps": 6},
            "optimizer": {"lr": 1e-2},
            "schedule": {"warmup_steps": 2},
        }
        for section, fields in sections.items():
            config[section] = {**config.get(section, {}), **fields} if isinstance(fields, dict) else fields
        path = tmp_path / name
        path.write_text(yaml.safe_dump(config))
        return path

    return write


_NETWORK = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_nextn_predict_layers": 1,
    "moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
}


def _row(method: str, seed: int) -> dict[str, Any]:
    question, answer, other = sentence(seed), sentence(seed + 1000), sentence(seed + 2000)
    if method == "pretrain":
        return {"text": answer}
    if method == "sft":
        return {"src": [question], "tgt": [answer]}
    if method == "upo":
        return {"prompt": question, "subset": "even" if seed % 2 == 0 else "odd"}
    if method == "kto":
        return {"prompt": question, "completion": answer, "label": seed % 2 == 0}
    return {"question": question, "chosen": answer, "rejected": other}
