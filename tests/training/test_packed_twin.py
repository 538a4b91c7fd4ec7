"""Rollouts from 8 bits: the copy holds the rounded weights of now, samples nearly as the policy does, and says what it samples with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ernie45
from ernie45 import LLM, SamplingParams
from ernie45.cli.train import _Store
from ernie45.errors import CheckpointError
from ernie45.models.text import CausalLM
from ernie45.quant.layers import PackedExperts, PackedLinear
from ernie45.training.branches import BranchBatch, branch_logprobs
from ernie45.training.lora.adapter import add_lora
from ernie45.training.lora.config import LoraConfig
from ernie45.training.network import TrainingNetwork
from ernie45.training.packed_twin import PackedTwin
from ernie45.training.rollout import LlmGenerator
from ernie45.training.upo_batch import sampled_branches

IDS = torch.tensor([[5, 6, 7, 8, 60, 61, 3, 2]])
SHAPES: list[dict[str, Any]] = [
    {"moe": True, "mtp": 1},
    {"moe": True, "tie_word_embeddings": False},
    {"use_bias": True},
]


def shake(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.03)


def rounded_by_hand(weights: Tensor) -> Tensor:
    """Each 64 columns of a row in 255 steps of their largest magnitude / 127, which float16 holds."""
    out = weights.clone()
    for start in range(0, weights.shape[-1], 64):
        part = weights[..., start : start + 64]
        step = (part.abs().amax(-1, keepdim=True) / 127).half().float()
        out[..., start : start + 64] = torch.where(step > 0, (part / step).round().clamp(-127, 127) * step, 0.0)
    return out


@torch.no_grad()
def distance(twin: PackedTwin, model: CausalLM) -> float:
    """Mean difference of the logits."""
    return float((twin.network(IDS) - model(IDS).float()).abs().mean())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_it_holds_the_rounded_weights_of_now(small_model: Any, shape: dict[str, Any]) -> None:
    model = small_model(**shape)
    twin = PackedTwin(model)
    before = twin.network(IDS)
    shake(model)
    torch.testing.assert_close(twin.network(IDS), before, atol=0, rtol=0)
    twin.renew(model)
    own, plain = model.state_dict(), twin.network.state_dict()
    packed = own.keys() - plain.keys()
    assert packed
    assert not any(word in name for name in packed for word in ("norm", "gate.weight", "bias"))
    for name in packed:
        parameter, matrices = twin._parameters[name], twin._matrices[name]
        found = torch.stack([parameter.dequantized(matrix) for matrix in matrices]).view(own[name].shape)
        torch.testing.assert_close(found, rounded_by_hand(own[name]), atol=0, rtol=1e-6)
    for name, tensor in plain.items():
        assert torch.equal(tensor, own[name]), name
    assert 1e-4 < distance(twin, model) < 0.03
    assert float((twin.network(IDS) - before).abs().mean()) > 0.3


def test_adapters_arrive_merged_and_narrow_weights_widened(small_model: Any) -> None:
    model = small_model(moe=True)
    add_lora(model, LoraConfig(rank=4), seed=0)
    TrainingNetwork(model)
    twin = PackedTwin(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    before = distance(twin, model)
    twin.renew(model)
    assert before > 0.3
    assert distance(twin, model) < 0.03
    narrow = small_model(dtype=torch.bfloat16)
    assert distance(PackedTwin(narrow), narrow) < 0.03


def test_other_networks_are_refused(small_model: Any) -> None:
    twin = PackedTwin(small_model(tie_word_embeddings=True))
    with pytest.raises(CheckpointError, match="differ: .*lm_head"):
        twin.renew(small_model(tie_word_embeddings=False))
    with pytest.raises(CheckpointError, match="load them in floating point"):
        PackedTwin(twin.network)


def test_the_generator_samples_from_it_and_reports_its_logprobs(small_model: Any, train_byte_level: Any) -> None:
    tokenizer = ernie45.load_tokenizer(train_byte_level(["one two three"], special=["<s>", "</s>"], bos="<s>"))
    model = small_model(moe=True, vocab_size=tokenizer.vocab_size)
    twin = PackedTwin(model)
    llm = LLM(twin.network, tokenizer=tokenizer, max_model_len=128, max_step_tokens_beside_decodes=64)
    generator = LlmGenerator(llm, params=SamplingParams, renew=twin.renew)
    ask: dict[str, Any] = {"n": 8, "max_tokens": 12, "temperature": 1.0, "seed": 3}
    first = generator.generate([[5, 6, 7]], **ask)
    shake(model)
    generator.sync(model)
    (answers,) = generator.generate([[5, 6, 7]], **ask)
    assert first[0] != answers
    batch = BranchBatch.of_items([sampled_branches([5, 6, 7], [answer.ids for answer in answers], "")])
    sampler = torch.tensor([logprob for answer in answers for logprob in answer.logprobs])
    exact = branch_logprobs(TrainingNetwork(model), batch).detach()
    assert 1e-5 < float((sampler - exact).abs().mean()) < 0.03, "near the policy, and not the policy"


@pytest.mark.parametrize(("weights", "is_packed"), [("float32", False), ("wint8", True)])
def test_the_command_line_samples_from_what_was_asked_for(
    small_model: Any, train_byte_level: Any, weights: Any, is_packed: bool
) -> None:
    tokenizer = ernie45.load_tokenizer(train_byte_level(["one two three"], special=["<s>", "</s>"], bos="<s>"))
    generator = _Store().generator(small_model(moe=True), tokenizer, weights)
    assert isinstance(generator, LlmGenerator)
    modules = list(generator._llm.model.modules())
    assert any(isinstance(module, PackedLinear | PackedExperts) for module in modules) is is_packed
