"""Losses of pairs against numbers worked out by hand, their gradients, and that every option acts or is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from ernie45.errors import ConfigError, ShapeError
from ernie45.training.losses import pairs
from ernie45.training.losses.pairs import log1mexp
from ernie45.training.losses.preference import (
    PairLoss,
    PairScores,
    PreferenceConfig,
    answer_scores,
    combine,
    preference_losses,
    preference_metrics,
)

LOSSES = get_args(PairLoss)


def _config(loss_type: str, **fields: Any) -> PreferenceConfig:
    return PreferenceConfig(loss_type=loss_type, **({"sft_loss_ratio": 1.0} if loss_type == "or" else {}) | fields)  # type: ignore[arg-type]


def _scores(*, gap: Tensor | None = None, **changes: Tensor) -> PairScores:
    """Two pairs: a = (1, -2), b = (-2, 0.5), d = (3, -2.5)."""
    numbers = {
        "chosen": torch.tensor([-4.0, -7.0], dtype=torch.float64),
        "rejected": torch.tensor([-8.0, -3.0], dtype=torch.float64),
        "reference_chosen": torch.tensor([-5.0, -5.0], dtype=torch.float64),
        "reference_rejected": torch.tensor([-6.0, -3.5], dtype=torch.float64),
    }
    return PairScores(**(numbers | changes), score_gap=gap)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _ls(x: float) -> float:
    return math.log(_sigmoid(x))


def _odds(p: float) -> float:
    return p / (1 - p)


BY_HAND: dict[str, tuple[dict[str, Any], list[float]]] = {
    "sigmoid": ({}, [0.554355244468527, -_ls(-0.25)]),
    "hinge": ({}, [0.7, 1.25]),
    "ipo": ({}, [(3 - 5) ** 2, (-2.5 - 5) ** 2]),
    # without a reference: pi_c - pi_r = (4, -4), minus gamma / beta = 3
    "simpo": ({"simpo_gamma": 0.3}, [-_ls(0.1), -_ls(-0.7)]),
    # lost = (0, 2)
    "dpop": ({"dpop_lambda": 5.0}, [-_ls(0.3), -_ls(0.1 * (-2.5 - 10))]),
    "dpop_erniekit": ({"dpop_lambda": 5.0}, [-_ls(0.3), -_ls(-0.25) + 10]),
    "or": (
        {},
        [
            -_ls(math.log(_odds(math.exp(-4)) / _odds(math.exp(-8)))),
            -_ls(math.log(_odds(math.exp(-7)) / _odds(math.exp(-3)))),
        ],
    ),
    # mean of a = -0.5, of b = -0.75: both distances are floored at 0
    "kto_pair": (
        {},
        [(1 - _sigmoid(0.1) + 1 - _sigmoid(0.2)) / 2, (1 - _sigmoid(-0.2) + 1 - _sigmoid(-0.05)) / 2],
    ),
    "sppo_hard": ({}, [(1 - 5) ** 2 + (-2 + 5) ** 2, (-2 - 5) ** 2 + (0.5 + 5) ** 2]),
    "nca_pair": (
        {},
        [-_ls(0.1) - _ls(-0.1) / 2 - _ls(0.2) / 2, -_ls(-0.2) - _ls(0.2) / 2 - _ls(-0.05) / 2],
    ),
}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_by_hand(loss_type: str) -> None:
    fields, expected = BY_HAND[loss_type]
    found = preference_losses(_scores(), _config(loss_type, **fields))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_label_smoothing_by_hand() -> None:
    smoothed = preference_losses(_scores(), _config("sigmoid", label_smoothing=0.1))
    expected = [-0.9 * _ls(x) - 0.1 * _ls(-x) for x in (0.3, -0.25)]
    torch.testing.assert_close(smoothed, torch.tensor(expected, dtype=torch.float64))
    smoothed = preference_losses(_scores(), _config("simpo", label_smoothing=0.1))
    expected = [-0.9 * _ls(x) - 0.1 * _ls(-x) for x in (-0.1, -0.9)]
    torch.testing.assert_close(smoothed, torch.tensor(expected, dtype=torch.float64))


def test_the_offset_reads_scores() -> None:
    """d - alpha/beta log(gap): beta d - 2 log 3 and - 2 log 1; a gap of one asks for nothing."""
    gap = torch.tensor([3.0, 1.0], dtype=torch.float64)
    found = preference_losses(_scores(gap=gap), _config("sigmoid", offset_alpha=2.0))
    expected = torch.tensor([-_ls(0.3 - 2 * math.log(3)), -_ls(-0.25)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(
        preference_losses(_scores(gap=gap), _config("sigmoid")), preference_losses(_scores(), _config("sigmoid"))
    )
    with pytest.raises(ConfigError, match="offset_alpha is 2.0, but the pairs have no scores"):
        preference_losses(_scores(), _config("sigmoid", offset_alpha=2.0))
    tie = preference_losses(_scores(gap=torch.zeros(2)), _config("sigmoid", offset_alpha=1.0))
    assert tie.isfinite().all()


def test_kto_pair_measures_each_half_against_the_other() -> None:
    """a = (3, 1), b = (2, 0): KL_c = 2, KL_r = 1."""
    found = pairs.kto_pair_loss(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0]), beta=0.5)
    expected = [(1 - _sigmoid(1.0) + 1 - _sigmoid(0.0)) / 2, (1 - _sigmoid(0.0) + 1 - _sigmoid(1.0)) / 2]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_gradients_by_finite_differences(loss_type: str) -> None:
    config = _config(loss_type)

    chosen = torch.tensor([-0.5, -4.0, -7.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-0.2, -8.0, -3.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-3.0, -5.0, -5.5], dtype=torch.float64)

    def whole(chosen: Tensor, rejected: Tensor) -> Tensor:
        scores = PairScores(
            chosen=chosen, rejected=rejected, reference_chosen=reference, reference_rejected=reference + 0.3
        )
        return preference_losses(scores, config)

    assert torch.autograd.gradcheck(whole, (chosen, rejected))


@pytest.mark.parametrize("loss_type", [name for name in LOSSES if name not in ("ipo", "sppo_hard", "nca_pair")])
def test_a_better_margin_never_costs_more(loss_type: str) -> None:
    """The three that are left out have their lowest point at a finite margin."""
    reference = torch.tensor([-9.0], dtype=torch.float64)

    def loss(step: float) -> float:
        chosen, rejected = (reference + 2 + step).clamp(max=-1e-3), (reference - step).clamp(max=-1e-3)
        scores = PairScores(chosen=chosen, rejected=rejected, reference_chosen=reference, reference_rejected=reference)
        return preference_losses(scores, _config(loss_type)).item()

    losses = [loss(step / 4) for step in range(-24, 25)]
    assert all(after <= before for before, after in pairwise(losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_beta_acts_or_is_refused(loss_type: str) -> None:
    if loss_type == "or":
        with pytest.raises(ConfigError, match="beta is 0.3, but loss_type or does not read it"):
            _config(loss_type, beta=0.3)
        return
    assert not torch.equal(
        preference_losses(_scores(), _config(loss_type)), preference_losses(_scores(), _config(loss_type, beta=0.3))
    )


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_reference_acts_or_is_not_needed(loss_type: str) -> None:
    config, scores = _config(loss_type), _scores()
    alone = PairScores(chosen=scores.chosen, rejected=scores.rejected)
    free = preference_losses(alone, replace(config, reference_free=True))
    assert torch.equal(free, preference_losses(scores, replace(config, reference_free=True)))
    assert config.uses_reference == (loss_type not in ("simpo", "or"))
    if config.uses_reference:
        assert not torch.equal(free, preference_losses(scores, config))
        with pytest.raises(ShapeError, match=f"{loss_type} needs the reference's log-probabilities"):
            preference_losses(alone, config)
    else:
        assert torch.equal(free, preference_losses(scores, config))


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize(
    ("name", "value", "readers"),
    [
        ("label_smoothing", 0.1, ("sigmoid", "simpo")),
        ("offset_alpha", 1.0, ("sigmoid",)),
        ("simpo_gamma", 1.0, ("simpo",)),
        ("dpop_lambda", 5.0, ("dpop", "dpop_erniekit")),
        ("normalize_logps", True, tuple(name for name in LOSSES if name not in ("ipo", "simpo", "or"))),
    ],
)
def test_an_option_that_a_loss_does_not_read_is_refused(loss_type: str, name: str, value: Any, readers: tuple) -> None:
    if loss_type in readers:
        assert getattr(_config(loss_type, **{name: value}), name) == value
        return
    with pytest.raises(
        ConfigError, match=f"{name} is {value}, but loss_type {loss_type} does not read it.*{readers[0]}"
    ):
        _config(loss_type, **{name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_type": "dpo"}, "loss_type is 'dpo', expected one of sigmoid, hinge"),
        ({"beta": 0.0}, "beta is 0.0, expected a number above 0"),
        ({"beta": math.inf}, "beta is inf"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5, expected a number from 0 on to below 0.5"),
        ({"sft_loss_ratio": -1.0}, "sft_loss_ratio is -1.0"),
        ({"pref_loss_ratio": 0.0}, "both 0: nothing would be learnt"),
        ({"loss_type": "or"}, "set sft_loss_ratio"),
    ],
)
def test_a_wrong_configuration_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreferenceConfig(**fields)


def test_scores_are_sums_means_or_sums_of_equal_length() -> None:
    """Answers of 2 and 6 tokens, of 3 and 1: mean lengths 4 and 2."""
    sums_c, sums_r = torch.tensor([-4.0, -6.0]), torch.tensor([-12.0, -1.0])
    lengths_c, lengths_r = torch.tensor([2, 3]), torch.tensor([6, 1])

    def found(config: PreferenceConfig) -> list[list[float]]:
        return [score.tolist() for score in answer_scores(sums_c, sums_r, lengths_c, lengths_r, config)]

    assert found(_config("sigmoid")) == [[-4, -6], [-12, -1]]
    for loss_type in ("ipo", "or", "simpo"):
        assert found(_config(loss_type)) == [[-2, -2], [-2, -1]]
    assert found(_config("sigmoid", normalize_logps=True)) == [[-8, -4], [-8, -2]]
    with pytest.raises(ShapeError, match="no scored token"):
        answer_scores(sums_c, sums_r, torch.tensor([2, 0]), lengths_r, _config("sigmoid"))


def test_the_sum_of_preference_and_likelihood_by_hand() -> None:
    losses = torch.tensor([1.0, 2.0], requires_grad=True)
    chosen = torch.tensor(-12.0, requires_grad=True)
    config = _config("sigmoid", pref_loss_ratio=0.5, sft_loss_ratio=2.0)
    total, preference, likelihood = combine(losses, chosen, config, num_pairs=4, num_chosen_tokens=6)
    assert (total.item(), preference.item(), likelihood.item()) == (0.5 * 0.75 + 2 * 2, 0.75, 2)
    total.backward()
    assert losses.grad is not None
    assert chosen.grad is not None
    assert losses.grad.tolist() == [0.125, 0.125]
    assert chosen.grad.item() == pytest.approx(-1 / 3)
    assert not preference.requires_grad
    assert not likelihood.requires_grad


def test_a_part_of_weight_zero_is_not_there() -> None:
    """An infinite likelihood would turn 0 times itself into nan."""
    losses, infinite = torch.tensor([1.0]), torch.tensor(-math.inf)
    total, *_ = combine(losses, infinite, _config("sigmoid"), num_pairs=1, num_chosen_tokens=1)
    assert total.item() == 1
    total, *_ = combine(
        torch.tensor([math.inf]),
        torch.tensor(-2.0),
        _config("sigmoid", pref_loss_ratio=0.0, sft_loss_ratio=1.0),
        num_pairs=1,
        num_chosen_tokens=1,
    )
    assert total.item() == 2


@pytest.mark.parametrize("loss_type", [name for name in LOSSES if name != "kto_pair"])
def test_shares_of_micro_batches_add_up(loss_type: str) -> None:
    scores, config = _scores(), _config(loss_type, sft_loss_ratio=1.0)
    whole = combine(preference_losses(scores, config), scores.chosen.sum(), config, num_pairs=2, num_chosen_tokens=5)
    parts = []
    for pair in range(2):
        fields = ("chosen", "rejected", "reference_chosen", "reference_rejected")
        one = PairScores(**{name: getattr(scores, name)[pair : pair + 1] for name in fields})
        parts.append(
            combine(preference_losses(one, config), one.chosen.sum(), config, num_pairs=2, num_chosen_tokens=5)
        )
    for place in range(3):
        torch.testing.assert_close(whole[place], parts[0][place] + parts[1][place])


def test_metrics_by_hand() -> None:
    found = preference_metrics(_scores(), _config("sigmoid"), num_pairs=2)
    expected = {
        "rewards/chosen": -0.05,
        "rewards/rejected": -0.075,
        "rewards/margin": 0.025,
        "rewards/accuracy": 0.5,
        "logps/chosen": -5.5,
        "logps/rejected": -5.5,
    }
    assert {name: pytest.approx(value.item()) for name, value in found.items()} == expected
    halved = preference_metrics(_scores(), _config("sigmoid"), num_pairs=4)
    assert halved["rewards/accuracy"].item() == 0.25


def test_log1mexp_is_exact_near_zero_and_far_from_it() -> None:
    """Against float64 through expm1 and log1p, from where 1 - e^x rounds to 0 to where it rounds to 1."""
    x = torch.tensor([-1e-6, -1e-3, -0.5, -0.6931, -0.6932, -1.0, -20.0, -80.0])
    expected = [math.log(-math.expm1(v)) if v > -0.69 else math.log1p(-math.exp(v)) for v in x.tolist()]
    torch.testing.assert_close(log1mexp(x), torch.tensor(expected), atol=0, rtol=1e-5)
    at_zero = torch.tensor([0.0, -1e-12, 1e-9], requires_grad=True)
    log1mexp(at_zero).sum().backward()
    assert log1mexp(at_zero).isfinite().all()
    assert at_zero.grad is not None
    assert at_zero.grad.isfinite().all()


@pytest.mark.parametrize(
    ("chosen", "rejected"), [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e-12, -200.0), (-200.0, -1e-9)]
)
def test_orpo_stands_certain_answers(chosen: float, rejected: float) -> None:
    inputs = [torch.tensor([value], requires_grad=True) for value in (chosen, rejected)]
    loss = pairs.odds_ratio_loss(*inputs)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in inputs)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_losses_stand_extreme_ratios(loss_type: str) -> None:
    chosen = torch.tensor([-1e4, -1e-3], requires_grad=True)
    rejected = torch.tensor([-1e-3, -1e4], requires_grad=True)
    reference = torch.tensor([-50.0, -50.0])
    scores = PairScores(chosen=chosen, rejected=rejected, reference_chosen=reference, reference_rejected=reference)
    losses = preference_losses(scores, _config(loss_type))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert chosen.grad is not None
    assert chosen.grad.isfinite().all()
