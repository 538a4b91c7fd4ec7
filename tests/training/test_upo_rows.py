"""Rollouts: what is asked of generator, rewards and networks, credit by hand, the filter, pairs, and exact resumption."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ernie45.errors import ConfigError, ShapeError
from ernie45.training.branches import BranchBatch, branch_logprobs
from ernie45.training.data.pairs import PreferencePair
from ernie45.training.lora.adapter import add_lora
from ernie45.training.lora.config import LoraConfig
from ernie45.training.losses.advantage import PromptFilter
from ernie45.training.losses.preference import PreferenceConfig
from ernie45.training.network import TrainingNetwork
from ernie45.training.prompts import Prompt, PromptList
from ernie45.training.reference_policy import FrozenCopy
from ernie45.training.rewards import RewardConfig, Rewards
from ernie45.training.rollout import Completion
from ernie45.training.upo_batch import Group
from ernie45.training.upo_config import RolloutConfig, UpoConfig
from ernie45.training.upo_rows import UpoRows
from ernie45.training.values import Critic, logprobs_and_values


def count_of_ones(prompt: str, answer: str, row: Any) -> float:
    """The toy reward: how many tokens 1 the answer has, plus what the row adds."""
    return answer.split().count("1") + float(row.get("bonus", 0))


class Drawn:
    """A generator of random answers of 1 to 4 tokens from 1 to 3; remembers what it was asked."""

    def __init__(self, *, logprobs: bool = True) -> None:
        self.synced = 0
        self.calls: list[dict[str, Any]] = []
        self._logprobs = logprobs

    def sync(self, model: Any) -> None:
        self.synced += 1

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[Completion]]:
        self.calls.append({"prompts": [list(prompt) for prompt in prompts], **options})
        draw = random.Random(options["seed"])
        return [[self._answer(draw) for _ in range(options["n"])] for _ in prompts]

    def _answer(self, draw: random.Random) -> Completion:
        ids = tuple(draw.choices((1, 2, 3), k=draw.randint(1, 4)))
        logprobs = tuple(-draw.random() for _ in ids) if self._logprobs else ()
        return Completion(ids=ids, text=" ".join(map(str, ids)), logprobs=logprobs, finished=len(ids) < 4)


class Pairs:
    """A stream of numbered pairs, two to a row."""

    def __init__(self) -> None:
        self.at = 0

    def next_row(self) -> Sequence[PreferencePair]:
        self.at += 2
        marks = torch.tensor([True])
        return [
            PreferencePair(
                prompt=torch.tensor([number]),
                chosen=torch.tensor([1]),
                chosen_learnt=marks,
                rejected=torch.tensor([2]),
                rejected_learnt=marks,
            )
            for number in (self.at - 2, self.at - 1)
        ]

    def state(self) -> dict[str, Any]:
        return {"at": self.at}

    def restore(self, state: Any) -> None:
        self.at = state["at"]


PROMPTS = [
    Prompt(
        ids=(10 + number, 5),
        text=f"p{number}",
        subset="ab"[number % 2],
        row={"bonus": 100 * (number % 2)},
        origin=f"p:{number}",
    )
    for number in range(7)
]


def stream(
    small_model: Any, *, policy: dict[str, Any] | None = None, rollout: dict[str, Any] | None = None, **parts: Any
) -> UpoRows:
    config = UpoConfig(**(policy or {}))
    settings = RolloutConfig(**({"num_answers": 3, "max_tokens": 4} | (rollout or {})))
    network = parts.pop("network", None) or TrainingNetwork(small_model())
    rows, seed = parts.pop("rows_per_step", 2), parts.pop("seed", 5)
    return UpoRows(
        config,
        settings,
        network=network,
        generator=parts.pop("generator", None) or Drawn(),
        prompts=PromptList(PROMPTS, seed=1),
        rewards=Rewards([RewardConfig(function="rows_rewards:count_of_ones")]),
        rows_per_step=rows,
        seed=seed,
        **parts,
    )


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy reward under an import path, as a user's is."""
    module = ModuleType("rows_rewards")
    module.count_of_ones = count_of_ones  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rows_rewards", module)


def take(rows: UpoRows, count: int) -> list[Group]:
    found = []
    for _ in range(count):
        (group,) = rows.next_row()
        assert isinstance(group, Group)
        found.append(group)
    return found


def test_a_rollout_asks_once_and_serves_every_epoch(small_model: Any) -> None:
    generator = Drawn()
    rollout = {"num_minibatches": 2, "num_epochs": 3, "temperature": 0.7}
    rows = stream(small_model, rollout=rollout, generator=generator)
    groups = take(rows, 12)
    (call,) = generator.calls
    assert (len(call["prompts"]), call["n"], call["max_tokens"], call["temperature"]) == (4, 3, 4, 0.7)
    assert [group.staleness for group in groups] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    epochs = [[group.branches.key() for group in groups[start : start + 4]] for start in (0, 4, 8)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len(set(map(tuple, epochs))) > 1, "each epoch has an order of its own"
    take(rows, 1)
    assert generator.synced == len(generator.calls) == 2
    assert generator.calls[0]["seed"] != generator.calls[1]["seed"]


def test_the_seed_decides_answers_and_order(small_model: Any) -> None:
    generators = [Drawn(), Drawn(), Drawn()]
    rollout = {"num_minibatches": 3, "num_epochs": 2}
    found = [
        take(stream(small_model, rollout=rollout, generator=generator, seed=seed), 24)
        for seed, generator in zip((5, 5, 6), generators, strict=True)
    ]
    keys = [[group.branches.key() for group in groups] for groups in found]
    assert keys[0] == keys[1]
    assert {call["seed"] for call in generators[0].calls}.isdisjoint(call["seed"] for call in generators[2].calls)
    prompts = [[int(group.branches.prompt_ids[0]) for group in groups] for groups in found]
    assert prompts[0][:6] != prompts[2][:6], "the same prompts in another order"
    assert sorted(prompts[0][:6]) == sorted(prompts[2][:6])


def test_what_a_group_knows(small_model: Any) -> None:
    network = TrainingNetwork(small_model())
    (group,) = take(stream(small_model, network=network, rows_per_step=1), 1)
    answers = [answer.ids.tolist() for answer in group.branches.answers]
    bonus = 100 * (int(group.branches.prompt_ids[0]) % 2)
    rewards = [ids.count(1) + bonus for ids in answers]
    assert group.rewards_A.tolist() == rewards
    now = branch_logprobs(network, BranchBatch.of_items([group.branches])).detach()
    torch.testing.assert_close(group.old_L, now, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(group.sampler_L, now)
    assert group.reference_L is None
    assert group.logged["rewards/score"] == pytest.approx(sum(rewards) / 3)
    assert group.logged["rewards/score/count_of_ones"] == pytest.approx(sum(rewards) / 3)
    assert group.logged["rollout/answer_tokens"] == pytest.approx(sum(map(len, answers)) / 3)
    assert group.logged["rollout/cut"] == pytest.approx(sum(len(ids) == 4 for ids in answers) / 3)


def test_group_advantages_by_hand(small_model: Any) -> None:
    for by_std in (True, False):
        for group in take(stream(small_model, policy={"group_by_std": by_std}), 4):
            rewards = group.rewards_A
            expected = rewards - rewards.mean()
            expected = expected / (rewards.std() + 1e-4) if by_std else expected
            spread = torch.cat([value.repeat(size) for value, size in zip(expected, group.lengths, strict=True)])
            torch.testing.assert_close(group.advantages_L, spread)


def test_the_samplers_own_logprobs_save_a_pass(small_model: Any) -> None:
    for group in take(stream(small_model, rollout={"old_logprobs": "sampler"}), 2):
        assert torch.equal(group.old_L, group.sampler_L)


def gae_by_hand(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    advantages: list[float] = []
    ahead = 0.0
    for at in reversed(range(len(rewards))):
        following = values[at + 1] if at + 1 < len(values) else 0.0
        ahead = rewards[at] + gamma * following - values[at] + gamma * lam * ahead
        advantages.insert(0, ahead)
    return advantages


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_credit_with_a_critic_by_hand(small_model: Any, kl_in: str) -> None:
    network, critic = TrainingNetwork(small_model()), Critic(48)
    torch.nn.init.normal_(critic.linear.weight, std=0.2, generator=torch.Generator().manual_seed(0))
    reference = FrozenCopy(TrainingNetwork(small_model(seed=1)))
    policy = {"advantages": "gae", "gamma": 0.9, "lam": 0.8, "whiten": False, "kl_weight": 0.3, "kl_in": kl_in}
    for group in take(stream(small_model, policy=policy, network=network, critic=critic, reference=reference), 2):
        with torch.no_grad():
            now, values = logprobs_and_values(network, BranchBatch.of_items([group.branches]), critic)
        far = reference.logprobs(BranchBatch.of_items([group.branches]))
        assert values is not None
        start = 0
        for size, reward in zip(group.lengths, group.rewards_A.tolist(), strict=True):
            here = slice(start, start + size)
            penalties = (0.3 * (now - far))[here].tolist() if kl_in == "reward" else [0.0] * size
            rewards = [-penalty for penalty in penalties]
            rewards[-1] += reward
            expected = torch.tensor(gae_by_hand(rewards, values[here].tolist(), 0.9, 0.8))
            torch.testing.assert_close(group.advantages_L[here], expected, atol=1e-3, rtol=1e-4)
            assert group.returns_L is not None
            torch.testing.assert_close(group.returns_L[here], expected + values[here], atol=1e-3, rtol=1e-4)
            start += size


def test_the_penalty_counts_in_groups_as_well(small_model: Any) -> None:
    network, reference = TrainingNetwork(small_model()), FrozenCopy(TrainingNetwork(small_model(seed=1)))
    policy = {"kl_weight": 0.5, "group_by_std": False}
    for group in take(stream(small_model, policy=policy, network=network, reference=reference), 2):
        assert group.reference_L is not None
        penalties = torch.stack([part.sum() for part in (0.5 * (group.old_L - group.reference_L)).split(group.lengths)])
        worth = group.rewards_A - penalties
        firsts = torch.tensor([0, *group.lengths[:-1]]).cumsum(0)
        torch.testing.assert_close(group.advantages_L[firsts], worth - worth.mean(), atol=1e-4, rtol=1e-4)


def test_whitening_spans_the_rollout(small_model: Any) -> None:
    policy = {"advantages": "gae", "whiten": True}
    groups = take(stream(small_model, policy=policy, rows_per_step=4, critic=Critic(48)), 4)
    advantages = torch.cat([group.advantages_L for group in groups])
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-5)
    assert float(advantages.std(correction=0)) == pytest.approx(1, abs=1e-3)


def test_rewards_of_each_subset_come_to_one_scale(small_model: Any) -> None:
    policy = {"group_by_std": False}
    raw, scaled = (
        take(stream(small_model, policy=policy, rollout={"normalize_rewards": on}, rows_per_step=6), 6)
        for on in (False, True)
    )
    for subset in (0, 1):
        rewards = torch.cat([group.rewards_A for group in raw if int(group.branches.prompt_ids[0]) % 2 == subset])
        spread = float(rewards.std()) + 1e-4
        for before, after in zip(raw, scaled, strict=True):
            if int(before.branches.prompt_ids[0]) % 2 == subset:
                torch.testing.assert_close(after.advantages_L, before.advantages_L / spread, atol=1e-4, rtol=1e-3)
                assert torch.equal(before.rewards_A, after.rewards_A), "the log shows them as they are"


def test_prompts_that_teach_nothing_are_drawn_again(small_model: Any) -> None:
    generator = Drawn()
    rollout = {"prompt_filter": PromptFilter(min_spread=0.6), "max_draws": 50, "num_answers": 2}
    groups = take(stream(small_model, rollout=rollout, generator=generator, rows_per_step=4), 4)
    assert all(float(group.rewards_A.std(correction=0)) >= 0.6 for group in groups)
    drawn = sum(len(call["prompts"]) for call in generator.calls)
    assert drawn > 4
    assert groups[0].logged["rollout/prompts_kept"] == pytest.approx(4 / drawn)
    assert len({call["seed"] for call in generator.calls}) == len(generator.calls)


def test_what_is_missing_after_all_draws_is_filled_up(small_model: Any) -> None:
    generator = Drawn()
    rollout = {"prompt_filter": PromptFilter(min_spread=1000.0), "max_draws": 3}
    groups = take(stream(small_model, rollout=rollout, generator=generator), 2)
    assert len(generator.calls) == 3
    assert len(groups) == 2
    assert groups[0].logged["rollout/prompts_kept"] == 0


@pytest.mark.parametrize(("ratio", "expected"), [(1.0, 8), (0.5, 4), (0.25, 2)])
def test_pairs_of_best_and_worst(small_model: Any, ratio: float, expected: int) -> None:
    policy = {"preference_weight": 1.0, "pair_ratio": ratio, "preference": PreferenceConfig(reference_free=True)}
    rollout = {"prompt_filter": PromptFilter(min_spread=0.1), "max_draws": 20}
    groups = take(stream(small_model, policy=policy, rollout=rollout, rows_per_step=8), 8)
    pairs = [(group, group.pair) for group in groups if group.pair is not None]
    assert len(pairs) == expected
    for group, (best, worst) in pairs:
        assert float(group.rewards_A[best]) == float(group.rewards_A.max()) > float(group.rewards_A[worst])
        assert float(group.rewards_A[worst]) == float(group.rewards_A.min())
    wide = stream(small_model, policy=policy | {"pair_min_spread": 1000.0}, rollout=rollout)
    assert all(group.pair is None for group in take(wide, 4))


@pytest.mark.parametrize(
    ("ratio", "numbers"), [(1.0, [2, 0, 2, 0, 2, 0]), (0.5, [0, 2, 0, 0, 0, 2]), (3.0, [4, 2, 4, 2, 4, 2])]
)
def test_pairs_of_a_data_set_keep_the_ratio(small_model: Any, ratio: float, numbers: list[int]) -> None:
    policy = {"preference_weight": 1.0, "pair_source": "offline", "pair_ratio": ratio}
    rows = stream(small_model, policy=policy, pairs=Pairs())
    found = [rows.next_row() for _ in range(6)]
    assert [len(row) - 1 for row in found] == numbers
    prompts = [int(one.prompt[0]) for row in found for one in row[1:] if isinstance(one, PreferencePair)]
    assert prompts == list(range(sum(numbers))), "none is left out"


@pytest.mark.parametrize("stop", range(1, 14))
def test_a_run_goes_on_exactly_where_it_stopped(small_model: Any, stop: int) -> None:
    """Also when the weights have changed since the rollout began."""
    network = TrainingNetwork(small_model())
    parts: dict[str, Any] = {
        "policy": {"advantages": "gae", "preference_weight": 1.0, "pair_source": "offline", "pair_ratio": 0.5},
        "rollout": {"num_minibatches": 2, "num_epochs": 2, "prompt_filter": PromptFilter(min_spread=0.3)},
        "network": network,
        "critic": Critic(48),
    }
    whole = stream(small_model, **parts, pairs=Pairs())
    expected = [whole.next_row() for _ in range(20)]
    first = stream(small_model, **parts, pairs=Pairs())
    for _ in range(stop):
        first.next_row()
    state = json.loads(json.dumps(first.state()))
    assert bool(state["groups"]) is (stop % 8 != 0), "between rollouts a checkpoint is small"
    again = stream(small_model, **parts, pairs=Pairs())
    again.restore(state)
    for row in expected[stop:]:
        assert_same(again.next_row(), row)


def assert_same(found: Sequence[Any], expected: Sequence[Any]) -> None:
    assert len(found) == len(expected)
    group, other = found[0], expected[0]
    assert group.branches.key() == other.branches.key()
    assert (group.staleness, group.pair, group.logged) == (other.staleness, other.pair, other.logged)
    for name in ("sampler_L", "old_L", "advantages_L", "rewards_A", "values_L", "returns_L"):
        one: Tensor = getattr(group, name)
        assert torch.equal(one, getattr(other, name)), name
    for pair, same in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(pair.prompt, same.prompt)


def test_passes_are_as_large_as_they_may_be(small_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network = TrainingNetwork(small_model())
    sizes: list[int] = []
    run = network.run

    def counted(batch: BranchBatch) -> Any:
        sizes.append(len(batch.items))
        return run(batch)

    monkeypatch.setattr(network, "run", counted)
    groups = [
        take(stream(small_model, network=network, rollout={"max_pass_tokens": limit}, rows_per_step=4), 4)
        for limit in (8192, 1)
    ]
    assert sizes == [4, 1, 1, 1, 1]
    for whole, alone in zip(*groups, strict=True):
        torch.testing.assert_close(whole.old_L, alone.old_L, atol=1e-5, rtol=1e-5)


def test_what_is_measured_is_measured_without_dropout(small_model: Any) -> None:
    model = small_model()
    add_lora(model, LoraConfig(rank=4, dropout=0.5), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    model.train()
    network = TrainingNetwork(model)
    (group,) = take(stream(small_model, network=network, rows_per_step=1), 1)
    assert model.training
    batch = BranchBatch.of_items([group.branches])
    assert not torch.allclose(branch_logprobs(network, batch), group.old_L, atol=1e-3), "dropout is felt"
    model.eval()
    torch.testing.assert_close(branch_logprobs(network, batch).detach(), group.old_L, atol=1e-6, rtol=1e-6)


def test_parts_are_given_where_they_are_read(small_model: Any) -> None:
    offline = {"preference_weight": 1.0, "pair_source": "offline"}
    for policy, parts, message in (
        ({"advantages": "gae"}, {}, "critic: missing"),
        ({}, {"critic": Critic(48)}, "critic: given for nothing"),
        ({"kl_weight": 0.1}, {}, "reference: missing"),
        ({"preference_weight": 0.1}, {}, "reference: missing"),
        (offline, {}, "pairs: missing"),
        ({}, {"pairs": Pairs()}, "pairs: given for nothing"),
        ({}, {"rows_per_step": 0}, "rows_per_step is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            stream(small_model, policy=policy, **parts)
    with pytest.raises(ConfigError, match="num_answers is 1"):
        stream(small_model, rollout={"num_answers": 1})


def test_a_generator_without_logprobs_is_refused(small_model: Any) -> None:
    with pytest.raises(ShapeError, match="gave 0 log-probabilities"):
        take(stream(small_model, generator=Drawn(logprobs=False)), 1)
