"""Advantages against loops and hand numbers, and the limits that GAE must reach."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ernie45.errors import ConfigError, ShapeError
from ernie45.training.losses.advantage import (
    PromptFilter,
    gae,
    group_advantages,
    normalize_by_subset,
    whiten,
)

UNIT = st.floats(0, 1)


@st.composite
def _answers(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[int]]:
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    numbers = st.lists(st.floats(-3, 3), min_size=sum(lengths), max_size=sum(lengths))
    rewards, values = (torch.tensor(draw(numbers), dtype=torch.float64) for _ in range(2))
    return rewards, values, lengths


def test_gae_by_hand() -> None:
    """Rewards (1, 2), values (0.5, 1), gamma 0.9, lambda 0.8, and a lone token behind it that must not leak in.

    delta_2 = 2 - 1 = 1; delta_1 = 1 + 0.9 - 0.5 = 1.4; A_2 = 1; A_1 = 1.4 + 0.72 = 2.12.
    """
    rewards, values = torch.tensor([1.0, 2.0, 7.0]), torch.tensor([0.5, 1.0, 3.0])
    advantages, returns = gae(rewards, values, [2, 1], gamma=0.9, lam=0.8)
    torch.testing.assert_close(advantages, torch.tensor([2.12, 1.0, 4.0]))
    torch.testing.assert_close(returns, torch.tensor([2.62, 2.0, 7.0]))


@given(_answers(), UNIT, UNIT)
def test_gae_against_the_sum_that_defines_it(answers: tuple, gamma: float, lam: float) -> None:
    """`A_t = sum_l (gamma lam)^l delta_(t+l)`, answer by answer, token by token."""
    rewards, values, lengths = answers
    advantages, returns = gae(rewards, values, lengths, gamma=gamma, lam=lam)
    start = 0
    for length in lengths:
        r, v = rewards[start : start + length].tolist(), [*values[start : start + length].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** step * deltas[t + step] for step in range(length - t))
            assert advantages[start + t].item() == pytest.approx(expected, abs=1e-9)
            assert returns[start + t].item() == pytest.approx(expected + v[t], abs=1e-9)
        start += length


@given(_answers(), UNIT)
def test_gae_with_lambda_one_is_the_discounted_rewards_minus_the_value(answers: tuple, gamma: float) -> None:
    rewards, values, lengths = answers
    _, returns = gae(rewards, values, lengths, gamma=gamma, lam=1.0)
    start = 0
    for length in lengths:
        for t in range(length):
            expected = sum(gamma**step * rewards[start + t + step].item() for step in range(length - t))
            assert returns[start + t].item() == pytest.approx(expected, abs=1e-9)
        start += length


@given(_answers(), UNIT)
def test_gae_with_lambda_zero_is_one_step_ahead(answers: tuple, gamma: float) -> None:
    rewards, values, lengths = answers
    advantages, _ = gae(rewards, values, lengths, gamma=gamma, lam=0.0)
    start = 0
    for length in lengths:
        v = [*values[start : start + length].tolist(), 0.0]
        for t in range(length):
            assert advantages[start + t].item() == pytest.approx(
                rewards[start + t].item() + gamma * v[t + 1] - v[t], abs=1e-9
            )
        start += length


@given(_answers())
def test_gae_of_an_answer_does_not_depend_on_its_neighbours(answers: tuple) -> None:
    rewards, values, lengths = answers
    together, _ = gae(rewards, values, lengths)
    alone = [gae(r, v, [len(r)])[0] for r, v in zip(rewards.split(lengths), values.split(lengths), strict=True)]
    assert torch.equal(together, torch.cat(alone))


def test_gae_has_no_gradient_and_refuses_what_makes_no_sense() -> None:
    values = torch.zeros(2, requires_grad=True)
    advantages, returns = gae(torch.ones(2), values, [2])
    assert not advantages.requires_grad
    assert not returns.requires_grad
    for fields, message in (
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"lam": -0.1}, "lam is -0.1"),
        ({"lam": math.nan}, "lam is nan"),
    ):
        with pytest.raises(ConfigError, match=message):
            gae(torch.ones(2), values, [2], **fields)
    with pytest.raises(ShapeError, match="do not fit 2 packed values"):
        gae(torch.ones(2), values, [3])


def test_whitening() -> None:
    found = whiten(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    torch.testing.assert_close(found.mean(), torch.tensor(0.0))
    torch.testing.assert_close(found.std(correction=0), torch.tensor(1.0))
    assert whiten(torch.tensor([4.0])).item() == 0


def test_group_advantages_by_hand() -> None:
    """Prompt 0: (1, 0, 2), mean 1, deviation 1; prompt 2: (5, 5); prompt 3 alone; prompt 1 has no answer; any order."""
    rewards = torch.tensor([5.0, 1.0, 0.0, 7.0, 2.0, 5.0], dtype=torch.float64)
    groups = torch.tensor([2, 0, 0, 3, 0, 2])
    found = group_advantages(rewards, groups, eps=1e-12)
    torch.testing.assert_close(found, torch.tensor([0.0, 0, -1, 0, 1, 0], dtype=torch.float64))
    plain = group_advantages(3 * rewards, groups, by_std=False)
    torch.testing.assert_close(plain, torch.tensor([0.0, 0, -3, 0, 3, 0], dtype=torch.float64))


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 3)), min_size=1, max_size=12), st.booleans())
def test_group_advantages_against_a_loop(rows: list[tuple[float, int]], by_std: bool) -> None:
    rewards = torch.tensor([reward for reward, _ in rows], dtype=torch.float64)
    groups = torch.tensor([group for _, group in rows])
    found = group_advantages(rewards, groups, by_std=by_std, eps=1e-4)
    for place, (reward, group) in enumerate(rows):
        own = torch.tensor([r for r, g in rows if g == group], dtype=torch.float64)
        expected = reward - own.mean().item()
        if by_std:
            expected /= (own.std().item() if len(own) > 1 else 0.0) + 1e-4
        assert found[place].item() == pytest.approx(expected, abs=1e-6)


def test_normalising_by_subset_puts_graders_on_one_scale() -> None:
    """The second grader gives the first one's marks times 100, plus 7."""
    marks = torch.tensor([0.0, 1.0, 0.5, 0.25])
    rewards, subsets = torch.cat((marks, 100 * marks + 7)), torch.tensor([0] * 4 + [1] * 4)
    found = normalize_by_subset(rewards, subsets, eps=1e-9)
    torch.testing.assert_close(found[:4], found[4:], atol=1e-5, rtol=1e-5)
    for part in (found[:4], found[4:]):
        torch.testing.assert_close(part.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
        torch.testing.assert_close(part.std(), torch.tensor(1.0))
    assert normalize_by_subset(torch.tensor([3.0, 3.0]), torch.tensor([0, 0])).tolist() == [0, 0]
    assert normalize_by_subset(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    with pytest.raises(ShapeError, match="expected as many int64"):
        normalize_by_subset(torch.zeros(3), torch.zeros(2, dtype=torch.int64))


def test_prompts_that_teach_nothing_are_named() -> None:
    """Prompt 0 is solved by all, 1 by nobody, 2 by some, 3 has answers alike in between, 4 has none, 5 is just apart enough."""
    rewards = torch.tensor([1.0, 0.9, 0.0, 0.1, 1.0, 0.0, 0.5, 0.5, 0.4, 0.6])
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 5, 5])
    found = PromptFilter(min_spread=0.01, solved=0.9, failed=0.1).verdicts(rewards, groups)
    assert found == ["always_solved", "never_solved", "kept", "alike", "alike", "kept"]
    assert PromptFilter(min_spread=0.01).verdicts(rewards, groups) == ["kept", "kept", "kept", "alike", "alike", "kept"]
    assert PromptFilter(min_spread=0.2).verdicts(rewards, groups)[5] == "alike"
    assert PromptFilter(min_spread=0.01, solved=0.9).verdicts(rewards, groups)[:2] == ["always_solved", "kept"]
    assert PromptFilter(min_spread=0.01, failed=0.1).verdicts(rewards, groups)[:2] == ["kept", "never_solved"]
    assert PromptFilter().verdicts(torch.zeros(0), torch.zeros(0, dtype=torch.int64)) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_spread": -1.0}, "min_spread is -1.0"),
        ({"min_spread": math.nan}, "min_spread is nan"),
        ({"solved": 0.1, "failed": 0.5}, "failed is 0.5 and solved 0.1: expected failed < solved"),
    ],
)
def test_a_wrong_filter_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptFilter(**fields)
