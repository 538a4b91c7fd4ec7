"""Rollouts: the serving engine as generator over shared weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import ernie45
from ernie45 import LLM, SamplingParams
from ernie45.errors import CheckpointError
from ernie45.models.text import CausalLM
from ernie45.training.branches import BranchBatch, branch_logprobs
from ernie45.training.lora.adapter import add_lora, merge
from ernie45.training.lora.config import LoraConfig
from ernie45.training.network import TrainingNetwork
from ernie45.training.rollout import Completion, LlmGenerator
from ernie45.training.sampler_weights import copy_weights, sampler_twin
from ernie45.training.upo_batch import sampled_branches

PROMPTS = [[5, 6, 7, 8], [9], list(range(20, 60))]


@pytest.fixture(scope="module")
def tokenizer(train_byte_level: Any) -> Any:
    return ernie45.load_tokenizer(train_byte_level(["one two three"], special=["<s>", "</s>"], bos="<s>"))


def llm_of(model: CausalLM, tokenizer: Any) -> LLM:
    """With steps that do not depend on time, and so with the same bits every time."""
    return LLM(sampler_twin(model), tokenizer=tokenizer, max_model_len=128, max_step_tokens_beside_decodes=64)


def shake(model: Any, seed: int = 0) -> None:
    """A step of an optimizer that works in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.03)


def ids_of(found: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    """The tokens alone: a prefix that is cached changes who shares a step, and with it the last bits of plain matrix products."""
    return [[answer.ids for answer in answers] for answers in found]


def test_a_twin_shares_all_memory(small_model: Any) -> None:
    model = small_model(moe=True, mtp=1)
    twin = sampler_twin(model)
    own = model.state_dict()
    assert {name: tensor.data_ptr() for name, tensor in twin.state_dict().items()} == {
        name: tensor.data_ptr() for name, tensor in own.items()
    }
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    shake(model)
    assert copy_weights(model, twin) == 0
    ids = torch.tensor([PROMPTS[0]])
    torch.testing.assert_close(twin(ids), model(ids), atol=0, rtol=0)


def test_what_cannot_be_shared_is_copied(small_model: Any) -> None:
    model = small_model(dtype=torch.bfloat16)
    twin = sampler_twin(model)
    assert twin.dtype == torch.float32
    shake(model)
    assert copy_weights(model, twin) > 0
    for name, tensor in twin.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].float()), name


def test_adapters_arrive_merged(small_model: Any) -> None:
    model = small_model(moe=True)
    add_lora(model, LoraConfig(rank=4), seed=0)
    TrainingNetwork(model)
    twin = sampler_twin(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([PROMPTS[0]])
    assert not torch.allclose(twin(ids), model(ids), atol=1e-2)
    assert copy_weights(model, twin) > 0
    torch.testing.assert_close(twin(ids), model(ids), atol=2e-4, rtol=1e-4)
    merge(model)
    torch.testing.assert_close(twin(ids), model(ids), atol=1e-6, rtol=1e-6)


def test_other_networks_are_refused(small_model: Any) -> None:
    with pytest.raises(CheckpointError, match="differ: .*lm_head"):
        copy_weights(small_model(tie_word_embeddings=True), sampler_twin(small_model(tie_word_embeddings=False)))


def test_the_generator_samples_from_the_weights_of_now(small_model: Any, tokenizer: Any) -> None:
    """What it gives is what a fresh generator gives, before and after a step, though a prefix was cached."""
    model = small_model(moe=True, vocab_size=330)
    network = TrainingNetwork(model)
    generator = LlmGenerator(llm_of(model, tokenizer), params=SamplingParams)
    found = []
    for seed in range(2):
        generator.sync(model)
        given = generator.generate(PROMPTS, n=3, max_tokens=7, temperature=1.0, seed=11)
        fresh = LlmGenerator(llm_of(model, tokenizer), params=SamplingParams)
        assert given == fresh.generate(PROMPTS, n=3, max_tokens=7, temperature=1.0, seed=11)
        for prompt, answers in zip(PROMPTS, given, strict=True):
            batch = BranchBatch.of_items([sampled_branches(prompt, [answer.ids for answer in answers], "")])
            sampler = torch.tensor([logprob for answer in answers for logprob in answer.logprobs])
            whole = branch_logprobs(network, batch).detach()
            # the engine knows nothing of the table's rows beyond the tokenizer's vocabulary: at most their share apart
            torch.testing.assert_close(sampler, whole, atol=0.3, rtol=0)
        found.append(given)
        shake(model, seed)
    assert found[0] != found[1]


def test_logprobs_are_the_training_networks(small_model: Any, tokenizer: Any) -> None:
    model = small_model(vocab_size=tokenizer.vocab_size)
    generator = LlmGenerator(llm_of(model, tokenizer), params=SamplingParams)
    (answers,) = generator.generate(PROMPTS[:1], n=4, max_tokens=6, temperature=1.0, seed=3)
    batch = BranchBatch.of_items([sampled_branches(PROMPTS[0], [answer.ids for answer in answers], "")])
    sampler = torch.tensor([logprob for answer in answers for logprob in answer.logprobs])
    torch.testing.assert_close(branch_logprobs(TrainingNetwork(model), batch).detach(), sampler, atol=2e-4, rtol=1e-4)


def test_seeds_number_and_length(small_model: Any, tokenizer: Any) -> None:
    generator = LlmGenerator(llm_of(small_model(vocab_size=330), tokenizer), params=SamplingParams)
    ask: dict[str, Any] = {"n": 2, "max_tokens": 5, "temperature": 1.0}
    first = generator.generate([[5], [5]], **ask, seed=1)
    assert [len(answers) for answers in first] == [2, 2]
    assert len({answer.ids for answers in first for answer in answers}) == 4, "no two share a seed"
    assert ids_of(first) == ids_of(generator.generate([[5], [5]], **ask, seed=1))
    assert ids_of(first) != ids_of(generator.generate([[5], [5]], **ask, seed=100))
    cold = generator.generate([[5]], n=3, max_tokens=5, temperature=1e-4, seed=1)[0]
    assert len({answer.ids for answer in cold}) == 1
    for answer in (one for answers in first for one in answers):
        assert len(answer.ids) == len(answer.logprobs) <= 5
        assert answer.finished is (answer.ids[-1] in generator._llm.tokenizer.stop_ids)


def test_forgetting_prefixes_leaves_no_page_cached(small_model: Any, tokenizer: Any) -> None:
    llm = llm_of(small_model(vocab_size=330), tokenizer)
    params = SamplingParams(max_tokens=2, temperature=0)
    llm.generate([PROMPTS[2]], params)
    assert llm.stats().pages.cached > 0
    llm.forget_prefixes()
    assert llm.stats().pages.cached == 0
    (answer,) = llm.generate([PROMPTS[2]], params)
    assert answer.usage.cached_tokens == 0


def test_training_imports_neither_engine_nor_server() -> None:
    """Generation is handed in: the folder of the engine stands above this one."""
    folder = Path(ernie45.__file__).parent / "training"
    above = re.compile(r"^\s*(?:from|import) ernie45\.(?:engine|server|llm|worker|cli)\b", re.MULTILINE)
    files = list(folder.rglob("*.py"))
    assert len(files) > 20
    assert [file.name for file in files if above.search(file.read_text(encoding="utf-8"))] == []
