"""The DPO family as an objective: against separate unpacked passes, in any number of micro-batches, and every option felt."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ernie45.errors import ConfigError, ShapeError
from ernie45.training.data.pairs import PreferencePair
from ernie45.training.losses.preference import PairScores, PreferenceConfig, answer_scores, preference_losses
from ernie45.training.network import TrainingNetwork
from ernie45.training.preference import PreferenceObjective
from ernie45.training.reference_policy import FrozenCopy

LOSSES: list[dict[str, Any]] = [
    {"loss_type": "sigmoid"},
    {"loss_type": "sigmoid", "normalize_logps": True, "label_smoothing": 0.1},
    {"loss_type": "sigmoid", "offset_alpha": 0.5},
    {"loss_type": "hinge", "beta": 0.01},
    {"loss_type": "ipo"},
    {"loss_type": "simpo", "beta": 2.0},
    {"loss_type": "dpop"},
    {"loss_type": "dpop_erniekit"},
    {"loss_type": "or", "sft_loss_ratio": 1.0},
    {"loss_type": "kto_pair"},
    {"loss_type": "sppo_hard"},
    {"loss_type": "nca_pair", "sft_loss_ratio": 0.5},
    {"loss_type": "sigmoid", "reference_free": True},
]


def pair(seed: int, sizes: tuple[int, int, int], scores: tuple[float, float] = (1.0, 0.0)) -> PreferencePair:
    """Random tokens; in answers of more than 3 tokens the second one is not scored, as in a dialogue."""
    generator = torch.Generator().manual_seed(seed)
    prompt, chosen, rejected = (torch.randint(1, 101, (size,), generator=generator) for size in sizes)
    marks = [torch.arange(len(ids)) != (1 if len(ids) > 3 else -1) for ids in (chosen, rejected)]
    return PreferencePair(
        prompt=prompt,
        chosen=chosen,
        chosen_learnt=marks[0],
        rejected=rejected,
        rejected_learnt=marks[1],
        score_chosen=scores[0],
        score_rejected=scores[1],
        origin=f"pairs.jsonl:{seed}",
    )


PAIRS = [
    pair(1, (3, 4, 2), (3.0, 1.0)),
    pair(2, (1, 1, 5), (0.5, 0.0)),
    pair(3, (6, 3, 3), (1.0, -1.0)),
    pair(4, (2, 7, 1), (9.0, 8.5)),
]


def objective_for(fields: dict[str, Any], reference: Any) -> PreferenceObjective:
    config = PreferenceConfig(**fields)
    return PreferenceObjective(config, reference if config.uses_reference else None)


def by_hand(model: Any, frozen: Any, fields: dict[str, Any]) -> Tensor:
    """The loss from whole sequences, one unpacked pass for each answer."""
    config = PreferenceConfig(**fields)

    def scores(network: Any) -> tuple[Tensor, Tensor, Tensor]:
        sums, counts, tokens = [], [], []
        for one in PAIRS:
            for ids, marks in ((one.chosen, one.chosen_learnt), (one.rejected, one.rejected_learnt)):
                logprobs = network(torch.cat((one.prompt, ids))[None])[0].log_softmax(-1)
                own = logprobs[len(one.prompt) - 1 : -1].gather(1, ids[:, None])[:, 0][marks]
                sums.append(own.sum())
                counts.append(float(len(own)))
                tokens.append(own)
        lengths = torch.tensor(counts)
        stacked = torch.stack(sums)
        found = answer_scores(stacked[0::2], stacked[1::2], lengths[0::2], lengths[1::2], config)
        return (*found, torch.cat(tokens[0::2]).mean())

    chosen, rejected, likelihood = scores(model)
    with torch.no_grad():
        reference = scores(frozen)
    gaps = torch.tensor([one.score_chosen - one.score_rejected for one in PAIRS])
    pair_scores = PairScores(
        chosen=chosen,
        rejected=rejected,
        reference_chosen=reference[0],
        reference_rejected=reference[1],
        score_gap=gaps,
    )
    losses = preference_losses(pair_scores, config)
    return config.pref_loss_ratio * losses.mean() - config.sft_loss_ratio * likelihood


def step(network: Any, objective: PreferenceObjective, micro_batches: list[list[PreferencePair]]) -> dict[str, Tensor]:
    """Gradients of one step, and what it logs; `total` is the loss."""
    batches = [objective.collate([[one] for one in pairs]) for pairs in micro_batches]
    totals = objective.totals(batches)
    logged: dict[str, Tensor] = {"total": torch.zeros(())}
    for batch in batches:
        loss = objective.loss(network, batch, totals)
        loss.total.backward()
        for name, value in {**loss.logged, "total": loss.total.detach()}.items():
            logged[name] = logged.get(name, torch.zeros(())) + value
    return logged


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("fields", LOSSES, ids=lambda fields: "-".join(map(str, fields.values())))
def test_loss_and_gradient_are_those_of_separate_passes(small_model: Any, fields: dict[str, Any]) -> None:
    plain, model, frozen = small_model(moe=True), small_model(moe=True), small_model(moe=True, seed=1)
    expected = by_hand(plain, frozen, fields)
    expected.backward()
    logged = step(TrainingNetwork(model), objective_for(fields, FrozenCopy(TrainingNetwork(frozen))), [PAIRS])
    torch.testing.assert_close(logged["total"], expected.detach(), atol=2e-5, rtol=2e-5)
    found = gradients(model)
    for name, gradient in gradients(plain).items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, atol=2e-4 * max(scale, 1e-3), rtol=2e-3, msg=name)


@pytest.mark.parametrize("fields", [one for one in LOSSES if one["loss_type"] != "kto_pair"][:9:4])
def test_a_step_is_the_same_in_any_number_of_micro_batches(small_model: Any, fields: dict[str, Any]) -> None:
    results = []
    for split in ([PAIRS], [[one] for one in PAIRS], [PAIRS[:3], PAIRS[3:]]):
        model = small_model(moe=True)
        reference = FrozenCopy(TrainingNetwork(small_model(moe=True, seed=1)))
        logged = step(TrainingNetwork(model), objective_for(fields, reference), split)
        results.append((logged, gradients(model)))
    for logged, found in results[1:]:
        assert logged.keys() == results[0][0].keys()
        torch.testing.assert_close(logged, results[0][0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found, results[0][1], atol=1e-4, rtol=1e-3)


def test_what_is_logged(small_model: Any) -> None:
    model, frozen = small_model(), small_model(seed=1)
    config = PreferenceConfig(beta=0.3, sft_loss_ratio=0.25)
    logged = step(
        TrainingNetwork(model), PreferenceObjective(config, FrozenCopy(TrainingNetwork(frozen))), [PAIRS[:2], PAIRS[2:]]
    )
    assert set(logged) == {
        "total",
        "loss",
        "sft_loss",
        *(f"rewards/{name}" for name in ("chosen", "rejected", "margin", "accuracy")),
    } | {
        "logps/chosen",
        "logps/rejected",
    }
    assert float(logged["rewards/margin"]) == pytest.approx(
        float(logged["rewards/chosen"] - logged["rewards/rejected"]), abs=1e-5
    )
    assert float(logged["rewards/accuracy"]) in (0, 0.25, 0.5, 0.75, 1)
    assert float(logged["total"]) == pytest.approx(float(logged["loss"] + 0.25 * logged["sft_loss"]), rel=1e-5)


def test_equal_policies_lose_ln_2(small_model: Any) -> None:
    network = TrainingNetwork(small_model())
    logged = step(network, PreferenceObjective(PreferenceConfig(), FrozenCopy.of(network)), [PAIRS])
    assert float(logged["loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert float(logged["rewards/margin"]) == pytest.approx(0, abs=1e-6)


def test_scores_of_the_rows_are_read(small_model: Any) -> None:
    network, reference = TrainingNetwork(small_model()), FrozenCopy(TrainingNetwork(small_model(seed=1)))
    objective = PreferenceObjective(PreferenceConfig(offset_alpha=0.5), reference)
    batch = objective.collate([PAIRS])
    assert batch.score_gap_B.tolist() == [2, 0.5, 2, 0.5]
    wide = objective.collate([[pair(seed, sizes, (10.0, 0.0)) for seed, sizes in ((1, (3, 4, 2)), (2, (1, 1, 5)))]])
    narrow = objective.collate([[pair(seed, sizes, (1.0, 0.9)) for seed, sizes in ((1, (3, 4, 2)), (2, (1, 1, 5)))]])
    losses = [float(objective.loss(network, one, objective.totals([one])).total.detach()) for one in (wide, narrow)]
    assert losses[0] > losses[1] + 0.1


def test_a_prompt_is_read_once(small_model: Any) -> None:
    objective = PreferenceObjective(PreferenceConfig(reference_free=True))
    batch = objective.collate([PAIRS[:1], PAIRS[1:2]])
    assert objective.num_tokens(batch) == (3 + 3 + 1) + (1 + 0 + 4)
    assert batch.packed.num_rows == 2
    assert objective.totals([batch, batch]).num_chosen_tokens == 2 * (3 + 1)


def test_an_answer_without_scored_tokens_is_refused_with_its_origin() -> None:
    bad = PreferencePair(
        prompt=torch.tensor([1]),
        chosen=torch.tensor([2]),
        chosen_learnt=torch.tensor([True]),
        rejected=torch.tensor([3]),
        rejected_learnt=torch.tensor([False]),
        origin="rows.jsonl:12",
    )
    with pytest.raises(ShapeError, match="rows.jsonl:12: answer 1 has no token that counts"):
        PreferenceObjective(PreferenceConfig(reference_free=True)).collate([[PAIRS[0]], [bad]])


def test_a_reference_is_given_where_it_is_read(small_model: Any) -> None:
    with pytest.raises(ConfigError, match="needs a reference"):
        PreferenceObjective(PreferenceConfig())
    with pytest.raises(ConfigError, match="does not read"):
        PreferenceObjective(PreferenceConfig(reference_free=True), FrozenCopy(TrainingNetwork(small_model())))


def test_pairs_are_learnt(small_model: Any) -> None:
    """The margin of four pairs grows until the loss is near nothing."""
    network = TrainingNetwork(small_model())
    objective = PreferenceObjective(PreferenceConfig(), FrozenCopy.of(network))
    optimizer = torch.optim.AdamW(network.model.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(float(step(network, objective, [PAIRS])["loss"]))
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.1
