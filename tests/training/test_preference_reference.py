"""The three ways to a reference agree, refresh when they shall, and refuse what is not theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ernie45.errors import CheckpointError, ConfigError, NotFoundError
from ernie45.training.branches import AnswerIds, BranchBatch, Branches, branch_logprobs
from ernie45.training.lora.adapter import adapter_off, add_lora, lora_parameters
from ernie45.training.lora.config import LoraConfig
from ernie45.training.network import TrainingNetwork
from ernie45.training.reference_cache import CachedReference, weights_hash, write_reference_cache
from ernie45.training.reference_policy import AdapterOff, FrozenCopy


def item(seed: int, prompt: int, *sizes: int) -> Branches:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(1, 101, (size,), generator=generator) for size in (prompt, *sizes)]
    answers = tuple(AnswerIds(ids=ids, learnt=torch.ones(len(ids), dtype=torch.bool)) for ids in drawn[1:])
    return Branches(prompt_ids=drawn[0], answers=answers, origin=f"rows.jsonl:{seed}")


ITEMS = [item(1, 3, 4, 2), item(2, 1, 1, 5), item(3, 5, 2), item(1, 3, 4, 2)]


def shake(model: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def test_a_frozen_copy_stays_where_it_was(small_model: Any) -> None:
    network = TrainingNetwork(small_model(moe=True))
    reference, batch = FrozenCopy.of(network), BranchBatch.of_items(ITEMS)
    before = branch_logprobs(network, batch).detach()
    shake(network.model)
    torch.testing.assert_close(reference.logprobs(batch), before, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(branch_logprobs(network, batch), before, atol=1e-2)
    assert not reference.logprobs(batch).requires_grad
    torch.testing.assert_close(reference.sums(batch), batch.sums(before), atol=1e-5, rtol=1e-6)


def test_it_is_refreshed_when_it_is_time(small_model: Any) -> None:
    network = TrainingNetwork(small_model())
    reference, batch = FrozenCopy.of(network, refresh_steps=3), BranchBatch.of_items(ITEMS)
    shake(network.model)
    now = branch_logprobs(network, batch).detach()
    for step in (1, 2):
        assert not reference.after_step(network, step)
        assert not torch.allclose(reference.logprobs(batch), now, atol=1e-3)
    assert reference.after_step(network, 3)
    torch.testing.assert_close(reference.logprobs(batch), now, atol=0, rtol=0)
    with pytest.raises(ConfigError, match="refresh_steps is -1"):
        FrozenCopy(TrainingNetwork(small_model()), refresh_steps=-1)


def test_a_refreshed_copy_is_part_of_the_checkpoint(small_model: Any) -> None:
    network = TrainingNetwork(small_model())
    assert FrozenCopy.of(network).state_tensors() == {}
    reference, batch = FrozenCopy.of(network, refresh_steps=1), BranchBatch.of_items(ITEMS)
    shake(network.model)
    reference.after_step(network, 1)
    saved = {name: tensor.clone() for name, tensor in reference.state_tensors().items()}
    again = FrozenCopy(TrainingNetwork(small_model(seed=5)), refresh_steps=1)
    again.load_state_tensors(saved)
    torch.testing.assert_close(again.logprobs(batch), reference.logprobs(batch), atol=0, rtol=0)
    with pytest.raises(CheckpointError, match="do not fit"):
        again.load_state_tensors({"x": torch.zeros(1)})


def test_adapters_off_is_the_network_without_them(small_model: Any) -> None:
    model = small_model(moe=True)
    plain = FrozenCopy.of(TrainingNetwork(small_model(moe=True)))
    add_lora(model, LoraConfig(rank=4), seed=0)
    network, batch = TrainingNetwork(model), BranchBatch.of_items(ITEMS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.fill_(0.05)
    reference = AdapterOff(network, adapter_off)
    torch.testing.assert_close(reference.logprobs(batch), plain.logprobs(batch), atol=2e-5, rtol=1e-5)
    assert not torch.allclose(branch_logprobs(network, batch), plain.logprobs(batch), atol=1e-2), "on again"
    torch.testing.assert_close(reference.sums(batch), plain.sums(batch), atol=1e-4, rtol=1e-5)


def test_sums_from_a_file(small_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(moe=True)
    network, path = TrainingNetwork(model), tmp_path / "reference.safetensors"
    live, name = FrozenCopy.of(network), weights_hash(model)
    passes: list[int] = []
    sums = live.sums

    def counted(batch: BranchBatch) -> torch.Tensor:
        passes.append(len(batch.items))
        return sums(batch)

    monkeypatch.setattr(live, "sums", counted)
    told: list[tuple[int, int]] = []
    write_reference_cache(
        path, live, ITEMS, model_hash=name, max_tokens=16, report=lambda done, of: told.append((done, of))
    )
    assert told == [(2, 3), (3, 3)]
    assert passes == [2, 1], "9 and 7 tokens, then 7 that have no room beside them"
    cached = CachedReference(path, model_hash=name)
    assert len(cached) == 3, "equal rows are computed once"
    shake(model)
    for items in (ITEMS, ITEMS[1:3], ITEMS[::-1]):
        batch = BranchBatch.of_items(items)
        torch.testing.assert_close(cached.sums(batch), live.sums(batch), atol=1e-5, rtol=1e-5)
    cached.check(ITEMS)
    with pytest.raises(CheckpointError, match="no log-probabilities of rows.jsonl:9"):
        cached.sums(BranchBatch.of_items([item(9, 2, 2)]))
    with pytest.raises(CheckpointError, match="no log-probabilities of rows.jsonl:9"):
        cached.check([*ITEMS, item(9, 2, 2)])


def test_a_file_of_other_weights_is_refused(small_model: Any, tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "reference.safetensors"
    name = weights_hash(model)
    write_reference_cache(path, FrozenCopy.of(TrainingNetwork(model)), ITEMS, model_hash=name)
    assert weights_hash(small_model()) == name
    shake(model)
    with pytest.raises(CheckpointError, match="remove the file"):
        CachedReference(path, model_hash=weights_hash(model))
    with pytest.raises(NotFoundError):
        CachedReference(tmp_path / "gone", model_hash=name)
    with pytest.raises(ConfigError, match="no rows"):
        write_reference_cache(path, FrozenCopy.of(TrainingNetwork(model)), [], model_hash=name)


def test_an_adapter_does_not_change_whose_weights_they_are(small_model: Any) -> None:
    model = small_model(moe=True)
    plain = weights_hash(model)
    add_lora(model, LoraConfig(rank=4), seed=0)
    assert weights_hash(model) != plain
    assert weights_hash(model, without=lora_parameters(model).keys()) == plain
