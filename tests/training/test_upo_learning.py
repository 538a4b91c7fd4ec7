"""End to end on a toy: a network of two layers learns to say one token, by GRPO, by PPO, and with preferences."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch

import ernie45
from ernie45.config.model import ModelConfig
from ernie45.models.build import build_model
from ernie45.models.init import initialize
from ernie45.training.losses.advantage import PromptFilter
from ernie45.training.losses.preference import PreferenceConfig
from ernie45.training.network import TrainingNetwork
from ernie45.training.prompts import Prompt, PromptList
from ernie45.training.reference_policy import FrozenCopy
from ernie45.training.rewards import RewardConfig, Rewards
from ernie45.training.rollout import Completion, LlmGenerator
from ernie45.training.sampler_weights import sampler_twin
from ernie45.training.upo import UpoObjective
from ernie45.training.upo_config import RolloutConfig, UpoConfig
from ernie45.training.upo_rows import UpoRows

TOKENS, WANTED, ROWS = 4, "7", 4


class Plain:
    """Samples with whole passes of the network that trains: prompts of one length, no cache."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def sync(self, model: Any) -> None:
        assert model is self._model

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], *, n: int, max_tokens: int, temperature: float, seed: int
    ) -> list[list[Completion]]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.tensor([list(prompt) for prompt in prompts]).repeat_interleave(n, dim=0)
        logprobs = []
        for _ in range(max_tokens):
            found = (self._model(ids)[:, -1] / temperature).log_softmax(-1)
            drawn = torch.multinomial(found.exp(), 1, generator=generator)
            logprobs.append(found.gather(1, drawn))
            ids = torch.cat((ids, drawn), dim=1)
        answers = ids[:, -max_tokens:].tolist()
        scores = torch.cat(logprobs, dim=1).tolist()
        made = [
            Completion(ids=tuple(one), text=" ".join(map(str, one)), logprobs=tuple(own))
            for one, own in zip(answers, scores, strict=True)
        ]
        return [made[start : start + n] for start in range(0, len(made), n)]


@pytest.fixture
def reward(monkeypatch: pytest.MonkeyPatch) -> Rewards:
    module = ModuleType("toy_rewards")
    module.says_it = lambda prompt, answer, row: answer.split().count(WANTED) / TOKENS  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_rewards", module)
    return Rewards([RewardConfig(function="toy_rewards:says_it")])


METHODS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "grpo": (14, {}, {}),
    "ppo": (26, {"advantages": "gae", "kl_weight": 0.01}, {"num_minibatches": 2, "num_epochs": 2}),
    "gspo": (20, {"ratio_of": "sequence", "averaging": "answer"}, {"num_epochs": 2}),
    "upo": (14, {"preference_weight": 0.3, "kl_weight": 0.01, "kl_in": "loss"}, {"prompt_filter": PromptFilter()}),
    "online_dpo": (16, {"policy": False, "preference_weight": 1.0, "preference": PreferenceConfig(beta=0.2)}, {}),
}


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_what_is_rewarded(reward: Rewards, method: str) -> None:
    num_steps, policy, rollout = METHODS[method]
    config = UpoConfig(**policy)
    settings = RolloutConfig(**({"num_answers": 8, "max_tokens": TOKENS} | rollout))
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    model = build_model(ModelConfig(vocab_size=24, num_hidden_layers=2, **shape))
    initialize(model, std=0.1, seed=0)
    network = TrainingNetwork(model)
    objective = UpoObjective(config, settings, hidden_size=32)
    rows = UpoRows(
        config,
        settings,
        network=network,
        generator=Plain(model),
        prompts=PromptList([Prompt(ids=(number, number + 8), text=str(number)) for number in range(1, 9)]),
        rewards=reward,
        rows_per_step=ROWS,
        critic=objective.critic,
        reference=FrozenCopy.of(network) if config.asks_reference else None,
    )
    critic = [] if objective.critic is None else list(objective.critic.parameters())
    optimizer = torch.optim.AdamW([*model.parameters(), *critic], lr=1.5e-2, weight_decay=0.0)
    scores = []
    for _ in range(num_steps):
        batch = objective.collate([rows.next_row() for _ in range(ROWS)])
        optimizer.zero_grad()
        loss = objective.loss(network, batch, objective.totals([batch]))
        assert torch.isfinite(loss.total)
        loss.total.backward()
        optimizer.step()
        scores.append(float(loss.logged["rewards/score"]))
    assert sum(scores[:2]) / 2 < 0.2
    assert sum(scores[-2:]) / 2 > 0.8, scores


def test_the_engine_samples_from_the_policy_of_each_step(
    small_model: Any, train_byte_level: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the serving engine over shared weights: at every step its probabilities are those of the network that trains."""
    module = ModuleType("engine_rewards")
    module.letters = lambda prompt, answer, row: float(len(answer))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "engine_rewards", module)
    tokenizer = ernie45.load_tokenizer(train_byte_level(["one two three"], special=["<s>", "</s>"], bos="<s>"))
    model = small_model(moe=True, vocab_size=tokenizer.vocab_size)
    network, config = TrainingNetwork(model), UpoConfig(kl_weight=0.05, kl_in="loss")
    settings = RolloutConfig(num_answers=4, max_tokens=6, num_epochs=2)
    llm = ernie45.LLM(sampler_twin(model), tokenizer=tokenizer, max_model_len=64)
    objective = UpoObjective(config, settings, hidden_size=48)
    rows = UpoRows(
        config,
        settings,
        network=network,
        generator=LlmGenerator(llm, params=ernie45.SamplingParams),
        prompts=PromptList([Prompt(ids=tuple(range(20, 52 + number))) for number in range(4)]),
        rewards=Rewards([RewardConfig(function="engine_rewards:letters")]),
        rows_per_step=2,
        reference=FrozenCopy.of(network),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    logged = []
    for _ in range(6):
        batch = objective.collate([rows.next_row() for _ in range(2)])
        optimizer.zero_grad()
        loss = objective.loss(network, batch, objective.totals([batch]))
        loss.total.backward()
        optimizer.step()
        logged.append({name: float(value) for name, value in loss.logged.items()})
    assert [one["policy/staleness_steps"] for one in logged] == [0, 1, 0, 1, 0, 1]
    assert all(one["policy/sampler_kl"] < 1e-6 for one in logged[::2]), "fresh answers come from the policy itself"
    assert all(one["policy/sampler_kl"] > 1e-4 for one in logged[1::2]), "a step later they do not"
    assert logged[0]["policy/reference_kl"] < 1e-6
    assert logged[-1]["policy/reference_kl"] > 1e-3
