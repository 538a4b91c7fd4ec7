"""The UPO objective: terms against formulas written out, PPO at lambda 0 and DPO without the policy bit by bit, any micro-batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ernie45.errors import ConfigError
from ernie45.training.branches import BranchBatch, branch_logprobs
from ernie45.training.data.pairs import PreferencePair
from ernie45.training.losses.preference import PreferenceConfig
from ernie45.training.network import TrainingNetwork
from ernie45.training.preference import PreferenceObjective
from ernie45.training.reference_policy import FrozenCopy
from ernie45.training.upo import UpoObjective
from ernie45.training.upo_batch import Group, decode_group, encode_group, sampled_branches
from ernie45.training.upo_config import RolloutConfig, UpoConfig

ROLLOUT = RolloutConfig(max_tokens=9)
SIZES = [(3, (4, 1, 6)), (1, (2, 5, 3)), (5, (3, 3, 3))]


def group(seed: int, prompt: int, answers: tuple[int, ...], pair: tuple[int, int] | None = None) -> Group:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, 101, (size,), generator=generator).tolist() for size in (prompt, *answers)]

    def drawn(mean: float = 0.0, spread: float = 1.0) -> Tensor:
        return mean + spread * torch.randn(sum(answers), generator=generator)

    return Group(
        branches=sampled_branches(ids[0], ids[1:], f"prompts:{seed}"),
        sampler_L=drawn(-5, 0.3),
        old_L=drawn(-5, 0.3),
        advantages_L=drawn(),
        rewards_A=torch.randn(len(answers), generator=generator),
        reference_L=drawn(-5, 0.3),
        values_L=drawn(0, 0.2),
        returns_L=drawn(),
        pair=pair,
        staleness=seed,
        logged={"rewards/score": float(seed)},
    )


GROUPS = [group(seed, *sizes, pair=(0, 2)) for seed, sizes in enumerate(SIZES)]


def near_policy(network: TrainingNetwork, groups: list[Group], shift: float = 0.3) -> list[Group]:
    """Groups whose old log-probabilities lie about `shift` beside what the network says."""
    done = []
    for seed, one in enumerate(groups):
        now = branch_logprobs(network, BranchBatch.of_items([one.branches])).detach()
        noise = torch.randn(now.shape, generator=torch.Generator().manual_seed(seed))
        done.append(
            replace(
                one, old_L=now + shift * noise, sampler_L=now - shift * noise, reference_L=now + 0.2 * noise.flip(0)
            )
        )
    return done


def step(
    network: TrainingNetwork, objective: UpoObjective, split: list[list[Any]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a step logs, with its loss as `total`, and its gradients."""
    network.model.zero_grad()
    batches = [objective.collate([(one,) for one in rows]) for rows in split]
    totals = objective.totals(batches)
    logged: dict[str, Tensor] = {}
    for batch in batches:
        loss = objective.loss(network, batch, totals)
        loss.total.backward()
        for name, value in {**loss.logged, "total": loss.total.detach()}.items():
            logged[name] = logged.get(name, torch.zeros(())) + value
    parameters = dict(network.model.named_parameters())
    if objective.critic is not None:
        parameters |= {f"critic.{name}": parameter for name, parameter in objective.critic.named_parameters()}
    return logged, {
        name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None
    }


def objective_of(*, reference: Any = None, critic_seed: int | None = 3, **fields: Any) -> UpoObjective:
    made = UpoObjective(UpoConfig(**fields), ROLLOUT, hidden_size=48, reference=reference)
    if made.critic is not None and critic_seed is not None:
        torch.nn.init.normal_(made.critic.linear.weight, generator=torch.Generator().manual_seed(critic_seed), std=0.1)
    return made


@pytest.mark.parametrize("averaging", ["token", "answer", "constant"])
def test_ppo_is_its_formula(small_model: Any, averaging: Any) -> None:
    """Token by token, as the papers have it, from a network that runs each answer alone."""
    network = TrainingNetwork(small_model())
    groups = near_policy(network, GROUPS)
    objective = objective_of(
        advantages="gae", averaging=averaging, clip_low=0.1, clip_high=0.3, value_clip=0.1, value_weight=0.5, kl_weight=0.2,
        kl_in="loss", entropy_weight=0.01,
    )  # fmt: skip
    logged, _ = step(network, objective, [groups])
    plain = small_model()
    num_answers, num_tokens = 9, sum(sum(one.lengths) for one in groups)
    sums = {"loss": 0.0, "value_loss": 0.0, "policy/reference_kl": 0.0, "policy/entropy": 0.0}
    assert objective.critic is not None
    for one in groups:
        start = 0
        for answer in one.branches.answers:
            size = len(answer.ids)
            ids = torch.cat((one.branches.prompt_ids, answer.ids))
            with torch.no_grad():
                hidden = plain.hidden(ids, BranchBatch.of_items([sampled_branches(ids.tolist(), [[1]], "")]).view())
                rows = hidden[len(one.branches.prompt_ids) - 1 : -1]
                logprobs = plain.logits(rows).log_softmax(-1)
                values = objective.critic(plain.model.norm(rows))
            for at in range(size):
                place = start + at
                weight = {
                    "token": 1 / num_tokens,
                    "answer": 1 / (num_answers * size),
                    "constant": 1 / (num_answers * 9),
                }[averaging]
                new = float(logprobs[at, answer.ids[at]])
                ratio = torch.tensor(new - float(one.old_L[place])).exp().item()
                advantage = float(one.advantages_L[place])
                sums["loss"] -= weight * min(ratio * advantage, min(max(ratio, 0.9), 1.3) * advantage)
                value, old, aim = float(values[at]), float(one.values_L[place]), float(one.returns_L[place])  # type: ignore[index]
                clipped = old + min(max(value - old, -0.1), 0.1)
                sums["value_loss"] += weight * max((value - aim) ** 2, (clipped - aim) ** 2) / 2
                gap = float(one.reference_L[place]) - new  # type: ignore[index]
                sums["policy/reference_kl"] += weight * (torch.tensor(gap).exp().item() - 1 - gap)
                sums["policy/entropy"] -= weight * float((logprobs[at].exp() * logprobs[at]).sum())
            start += size
    for name, value in sums.items():
        assert float(logged[name]) == pytest.approx(value, rel=2e-3, abs=1e-5), name
    total = sums["loss"] + 0.5 * sums["value_loss"] + 0.2 * sums["policy/reference_kl"] - 0.01 * sums["policy/entropy"]
    assert float(logged["total"]) == pytest.approx(total, rel=2e-3, abs=1e-5)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"advantages": "gae", "kl_weight": 0.1, "kl_in": "loss", "entropy_weight": 0.1},
    {"ratio_of": "sequence", "averaging": "answer"},
    {"preference_weight": 0.5, "averaging": "constant", "preference": PreferenceConfig(sft_loss_ratio=0.3)},
    {"policy": False, "preference_weight": 2.0},
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_a_step_is_the_same_in_any_number_of_micro_batches(small_model: Any, fields: dict[str, Any]) -> None:
    network = TrainingNetwork(small_model(moe=True))
    groups = near_policy(network, GROUPS)
    whole, gradients = step(network, objective_of(**fields), [groups])
    for split in ([[one] for one in groups], [groups[:2], groups[2:]]):
        logged, found = step(network, objective_of(**fields), split)
        torch.testing.assert_close(logged, whole, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found, gradients, atol=1e-5, rtol=2e-3)


def test_at_lambda_0_it_is_ppo_bit_by_bit(small_model: Any) -> None:
    network = TrainingNetwork(small_model(moe=True))
    groups = near_policy(network, GROUPS)
    plain = step(network, objective_of(advantages="gae"), [[replace(one, pair=None) for one in groups]])
    off = step(network, objective_of(advantages="gae", preference_weight=0.0), [groups])
    assert torch.equal(plain[0]["total"], off[0]["total"])
    assert all(torch.equal(plain[1][name], off[1][name]) for name in plain[1])
    on = step(network, objective_of(advantages="gae", preference_weight=0.5), [groups])
    assert float((on[0]["total"] - off[0]["total"]).abs()) > 1e-3


def as_pair(one: Group, chosen: int, rejected: int) -> PreferencePair:
    """A group's two answers as a row of preference data."""
    answers = one.branches.answers
    return PreferencePair(
        prompt=one.branches.prompt_ids,
        chosen=answers[chosen].ids,
        chosen_learnt=answers[chosen].learnt,
        rejected=answers[rejected].ids,
        rejected_learnt=answers[rejected].learnt,
        score_chosen=float(one.rewards_A[chosen]),
        score_rejected=float(one.rewards_A[rejected]),
    )


@pytest.mark.parametrize(
    "preference",
    [
        PreferenceConfig(),
        PreferenceConfig(loss_type="ipo", beta=0.5),
        PreferenceConfig(sft_loss_ratio=0.4),
        PreferenceConfig(offset_alpha=0.1),
    ],
    ids=lambda config: f"{config.loss_type}-{config.sft_loss_ratio}-{config.offset_alpha}",
)
def test_without_the_policy_term_it_is_dpo(small_model: Any, preference: PreferenceConfig) -> None:
    """Offline: the same batch, so the same bits. Online: the same pairs inside of larger groups."""
    network = TrainingNetwork(small_model(moe=True))
    reference = FrozenCopy(TrainingNetwork(small_model(moe=True, seed=1)))
    groups = [
        replace(
            one,
            reference_L=reference.logprobs(BranchBatch.of_items([one.branches])),
            rewards_A=torch.tensor([1.0, 0.5, 0.0]),
        )
        for one in GROUPS
    ]
    pairs = [as_pair(one, 0, 2) for one in groups]
    dpo = PreferenceObjective(preference, reference)
    batch = dpo.collate([pairs])
    network.model.zero_grad()
    expected = dpo.loss(network, batch, dpo.totals([batch]))
    expected.total.backward()
    gradients = {name: one.grad.clone() for name, one in network.model.named_parameters() if one.grad is not None}

    config: dict[str, Any] = {"policy": False, "preference_weight": 1.0, "preference": preference}
    logged, found = step(network, objective_of(reference=reference, pair_source="offline", **config), [pairs])
    assert torch.equal(logged["total"], expected.total.detach())
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)
    for name, value in expected.logged.items():
        assert torch.equal(logged[name], value), name

    logged, found = step(network, objective_of(**config), [groups])
    torch.testing.assert_close(logged["total"], expected.total.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, gradients, atol=1e-5, rtol=2e-3)


def test_lambda_weighs_the_sum(small_model: Any) -> None:
    network = TrainingNetwork(small_model())
    groups = near_policy(network, GROUPS)
    logged = {weight: step(network, objective_of(preference_weight=weight), [groups])[0] for weight in (0.5, 2.0)}
    for weight, one in logged.items():
        assert float(one["total"]) == pytest.approx(
            float(one["loss"] + weight * one["preference_loss"]), rel=1e-5, abs=1e-6
        )


def test_pairs_of_a_data_set_ride_along(small_model: Any) -> None:
    network = TrainingNetwork(small_model())
    groups = [replace(one, pair=None) for one in near_policy(network, GROUPS)]
    reference = FrozenCopy(TrainingNetwork(small_model(seed=1)))
    pairs = [as_pair(group(7, 2, (3, 4)), 1, 0), as_pair(group(8, 4, (1, 5)), 0, 1)]
    objective = objective_of(reference=reference, pair_source="offline", preference_weight=0.3)
    logged, gradients = step(network, objective, [[*groups, *pairs]])
    dpo = PreferenceObjective(PreferenceConfig(), reference)
    batch = dpo.collate([pairs])
    alone = dpo.loss(network, batch, dpo.totals([batch]))
    assert float(logged["preference_loss"]) == pytest.approx(float(alone.total.detach()), rel=1e-5)
    assert float(logged["loss"]) == pytest.approx(
        float(step(network, objective_of(), [groups])[0]["loss"]), rel=1e-4, abs=1e-6
    )
    split, again = step(network, objective, [[groups[0], pairs[0]], [groups[1]], [groups[2], pairs[1]]])
    torch.testing.assert_close(split, logged, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again, gradients, atol=1e-5, rtol=2e-3)
    with pytest.raises(ConfigError, match="need a reference"):
        objective_of(pair_source="offline", preference_weight=0.3)


BASE: dict[str, Any] = {"advantages": "gae", "kl_weight": 0.1, "kl_in": "loss", "preference_weight": 0.5}


@pytest.mark.parametrize(
    "change",
    [
        {"clip_low": 0.01}, {"clip_high": 0.01}, {"ratio_of": "sequence"}, {"averaging": "answer"}, {"value_weight": 0.3},
        {"sampler_ratio_cap": 1.2},
        {"value_clip": 0.01}, {"value_clip": None}, {"kl_weight": 0.4}, {"kl_estimator": "k2"}, {"entropy_weight": 0.1},
        {"preference_weight": 0.7}, {"preference": PreferenceConfig(beta=0.3)},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_is_felt(small_model: Any, change: dict[str, Any]) -> None:
    network = TrainingNetwork(small_model())
    groups = near_policy(network, GROUPS)
    before, gradients = step(network, objective_of(**BASE), [groups])
    after, changed = step(network, objective_of(**(BASE | change)), [groups])
    assert float((before["total"] - after["total"]).abs()) > 1e-6
    assert any(not torch.allclose(gradients[name], changed[name], atol=1e-7, rtol=1e-4) for name in gradients)


def test_a_sampler_beside_the_policy_is_corrected_for(small_model: Any) -> None:
    """By hand: the advantage times the truncated weight. Where both agree, nothing changes; no gradient goes through the weight."""
    network = TrainingNetwork(small_model())
    groups = near_policy(network, GROUPS)
    corrected, gradients = step(network, objective_of(sampler_ratio_cap=1.5), [groups])
    weights = [(one.old_L - one.sampler_L).exp().clamp(max=1.5) for one in groups]
    by_hand = [replace(one, advantages_L=one.advantages_L * w) for one, w in zip(groups, weights, strict=True)]
    wanted, wanted_gradients = step(network, objective_of(), [by_hand])
    torch.testing.assert_close(corrected["total"], wanted["total"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradients, wanted_gradients, atol=1e-7, rtol=1e-4)
    assert float(corrected["policy/sampler_ratio"]) == pytest.approx(float(torch.cat(weights).mean()), rel=1e-5)
    same = [replace(one, sampler_L=one.old_L) for one in groups]
    assert torch.equal(
        step(network, objective_of(sampler_ratio_cap=1.5), [same])[0]["total"],
        step(network, objective_of(), [same])[0]["total"],
    )


def test_ratios_against_the_sampler_leave_nothing_to_correct() -> None:
    with pytest.raises(ConfigError, match="sampler_ratio_cap is 2.0, but with old_logprobs: sampler"):
        UpoObjective(UpoConfig(sampler_ratio_cap=2.0), RolloutConfig(old_logprobs="sampler"), hidden_size=48)


def test_a_penalty_in_the_reward_is_only_logged(small_model: Any) -> None:
    network = TrainingNetwork(small_model())
    groups = near_policy(network, GROUPS)
    without = step(network, objective_of(), [groups])[0]
    logged = step(network, objective_of(kl_weight=0.5, kl_in="reward"), [groups])[0]
    assert torch.equal(logged["total"], without["total"])
    assert float(logged["policy/reference_kl"]) > 0


def test_what_is_logged(small_model: Any) -> None:
    network = TrainingNetwork(small_model())
    now = [replace(one, sampler_L=one.old_L) for one in near_policy(network, GROUPS, shift=0.0)]
    logged, _ = step(network, objective_of(), [now[:1], now[1:]])
    assert float(logged["rewards/score"]) == pytest.approx(1)  # seeds 0, 1, 2
    assert float(logged["policy/staleness_steps"]) == pytest.approx(1)
    for name in ("policy/clipped", "policy/staleness_kl", "policy/sampler_kl"):
        assert float(logged[name]) == pytest.approx(0, abs=1e-5), name
    moved = near_policy(network, GROUPS, shift=0.5)
    logged, _ = step(network, objective_of(), [moved])
    assert float(logged["policy/clipped"]) > 0.3
    assert float(logged["policy/sampler_kl"]) > 0.05
    ratios = [
        (branch_logprobs(network, BranchBatch.of_items([one.branches])).detach() - one.sampler_L).double()
        for one in moved
    ]
    expected = torch.cat(ratios)
    kl = float((expected.exp() * expected - expected.exp() + 1).mean())
    assert float(logged["policy/sampler_kl"]) == pytest.approx(kl, rel=1e-3)


def test_a_micro_batch_without_pairs_gives_nothing_to_dpo(small_model: Any) -> None:
    network = TrainingNetwork(small_model())
    groups = near_policy(network, GROUPS)
    alone = replace(groups[1], pair=None)
    objective = objective_of(policy=False, preference_weight=1.0)
    split = step(network, objective, [[groups[0]], [alone]])
    whole = step(network, objective, [[groups[0], alone]])
    torch.testing.assert_close(split[0]["total"], whole[0]["total"], atol=1e-6, rtol=1e-5)


def test_a_group_survives_a_checkpoint_bit_by_bit() -> None:
    one = replace(GROUPS[0], reference_L=None)
    again = decode_group(encode_group(one))
    for name in ("sampler_L", "old_L", "advantages_L", "rewards_A", "values_L", "returns_L"):
        assert torch.equal(getattr(again, name), getattr(one, name)), name
    assert again.reference_L is None
    assert again.branches.key() == one.branches.key()
    assert (again.pair, again.logged, again.branches.origin) == (one.pair, one.logged, one.branches.origin)
