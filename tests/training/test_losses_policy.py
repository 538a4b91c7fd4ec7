"""Policy losses against hand numbers, loops over single tokens, exact expectations and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ernie45.errors import ConfigError, ShapeError
from ernie45.training.losses.policy import (
    clipped_policy_losses,
    clipped_value_losses,
    kl_estimates,
    policy_metrics,
    sampler_weights,
    sequence_log_ratios,
    split_answers,
    spread_to_tokens,
    token_log_ratios,
    token_weights,
)

NUMBERS = st.floats(-2, 2, allow_nan=False)


def test_the_clipped_ratio_by_hand() -> None:
    """Ratios 0.5, 1.5, 0.5, 1.5, 1.1 with advantages 1, 1, -1, -1, 2 and clips 0.2, 0.3."""
    log_ratios = torch.tensor([0.5, 1.5, 0.5, 1.5, 1.1]).log().requires_grad_()
    losses = clipped_policy_losses(log_ratios, torch.tensor([1.0, 1, -1, -1, 2]), clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(losses, torch.tensor([-0.5, -1.3, 0.8, 1.5, -2.2]))
    losses.sum().backward()
    assert log_ratios.grad is not None
    # Beyond the clip in the direction of the advantage nothing pulls; on the way back the whole ratio does.
    torch.testing.assert_close(log_ratios.grad, torch.tensor([-0.5, 0, 0, 1.5, -2.2]))


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=6), st.floats(0.05, 0.9), st.floats(0.05, 3))
def test_the_clipped_ratio_is_the_worse_of_both(rows: list[tuple[float, float]], low: float, high: float) -> None:
    log_ratios, advantages = torch.tensor(rows, dtype=torch.float64).unbind(1)
    found = clipped_policy_losses(log_ratios, advantages, clip_low=low, clip_high=high)
    for loss, (log_ratio, advantage) in zip(found.tolist(), rows, strict=True):
        ratio = math.exp(log_ratio)
        expected = -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
        assert loss == pytest.approx(expected, abs=1e-12)


def test_at_the_policy_that_sampled_it_is_the_policy_gradient() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([3.0, -0.5])
    losses = clipped_policy_losses(token_log_ratios(logprobs, logprobs.detach()), advantages)
    assert torch.equal(losses, -advantages)
    losses.sum().backward()
    assert logprobs.grad is not None
    assert torch.equal(logprobs.grad, -advantages)


def test_a_ratio_that_left_the_data_stays_finite() -> None:
    logprobs = torch.tensor([-1.0], requires_grad=True)
    loss = clipped_policy_losses(token_log_ratios(logprobs, torch.tensor([-500.0])), torch.tensor([-1.0]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()


def test_the_ratio_of_sequences_by_hand() -> None:
    """Answers of 2 and 1 tokens: mean log-ratios 0.2 and -0.5. With the mean per answer, the loss has one term per answer."""
    logprobs = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.1, -2.3, -2.5], dtype=torch.float64)
    log_ratios = sequence_log_ratios(logprobs, old, [2, 1])
    torch.testing.assert_close(log_ratios, torch.tensor([0.2, 0.2, -0.5], dtype=torch.float64))
    advantages = spread_to_tokens(torch.tensor([2.0, -1.0], dtype=torch.float64), [2, 1])
    weights = token_weights([2, 1], "answer", total_tokens=3, total_answers=2, max_tokens=8)
    loss = (clipped_policy_losses(log_ratios, advantages, clip_low=0.9, clip_high=0.9) * weights).sum()
    expected = -(math.exp(0.2) * 2 - math.exp(-0.5)) / 2
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert logprobs.grad is not None
    shared = -math.exp(0.2) * 2 / 2 / 2
    torch.testing.assert_close(logprobs.grad, torch.tensor([shared, shared, math.exp(-0.5) / 2], dtype=torch.float64))


def test_the_clipped_value_by_hand() -> None:
    """Return 1. From 0 to 0.9 the clip holds at 0.2, whose error is the larger; from 0 to 0.1 it is not reached."""
    values = torch.tensor([0.9, 0.1, -3.0], requires_grad=True)
    losses = clipped_value_losses(values, torch.zeros(3), torch.ones(3), clip=0.2)
    torch.testing.assert_close(losses, torch.tensor([0.8**2 / 2, 0.9**2 / 2, 4**2 / 2]))
    losses.sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([0.0, -0.9, -4.0]))
    plain = clipped_value_losses(values, torch.zeros(3), torch.ones(3), clip=None)
    torch.testing.assert_close(plain, torch.tensor([0.1**2 / 2, 0.9**2 / 2, 4**2 / 2]))


def test_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = (-torch.rand(5, generator=generator, dtype=torch.float64)).requires_grad_()
    old = logprobs.detach() + 0.3 * torch.randn(5, generator=generator, dtype=torch.float64)
    advantages = torch.randn(5, generator=generator, dtype=torch.float64)
    for log_ratios in (token_log_ratios, lambda new, old: sequence_log_ratios(new, old, [3, 2])):
        assert torch.autograd.gradcheck(
            lambda new, log_ratios=log_ratios: clipped_policy_losses(log_ratios(new, old), advantages), (logprobs,)
        )
    assert torch.autograd.gradcheck(lambda v: clipped_value_losses(v, old, advantages, clip=0.2), (logprobs,))
    for estimator in ("k1", "k2", "k3"):
        assert torch.autograd.gradcheck(lambda p, e=estimator: kl_estimates(p, old, estimator=e), (logprobs,))


def _two_policies() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits, reference = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), reference.log_softmax(0)


def test_kl_estimates_in_expectation() -> None:
    """The expectation over all six outcomes: k1 and k3 are the KL, k2 is near; k3 is never negative."""
    logits, reference = _two_policies()
    logprobs = logits.log_softmax(0)
    kl = (logprobs.exp() * (logprobs - reference)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((logprobs.exp() * kl_estimates(logprobs, reference, estimator=estimator)).sum(), kl)
    k2 = (logprobs.exp() * kl_estimates(logprobs, reference, estimator="k2")).sum()
    assert k2 != kl
    assert (kl_estimates(logprobs, reference, estimator="k3") >= 0).all()
    assert (kl_estimates(logprobs, reference, estimator="k1") < 0).any()
    assert torch.equal(kl_estimates(logprobs, reference), kl_estimates(logprobs, reference, estimator="k3"))


def test_gradients_of_kl_estimates_in_expectation() -> None:
    """As a loss on samples: k1 pulls nowhere, k2 along KL(policy || reference), k3 along KL(reference || policy)."""
    logits, reference = _two_policies()

    def expected_gradient(estimator: str) -> Tensor:
        logprobs = logits.log_softmax(0)
        frozen = logprobs.detach().exp()
        loss = (frozen * kl_estimates(logprobs, reference, estimator=estimator)).sum()  # type: ignore[arg-type]
        return torch.autograd.grad(loss, logits)[0]

    logprobs = logits.log_softmax(0)
    forward = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)[0]
    backward = torch.autograd.grad((reference.exp() * (reference - logprobs)).sum(), logits)[0]
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(expected_gradient("k2"), forward)
    torch.testing.assert_close(expected_gradient("k3"), backward)


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ConfigError, match="KL estimator is 'k4', expected one of k1, k2, k3"):
        kl_estimates(torch.zeros(1), torch.zeros(1), estimator="k4")  # type: ignore[arg-type]


def test_weights_by_hand() -> None:
    totals = {"total_tokens": 10, "total_answers": 4, "max_tokens": 5}
    assert token_weights([2, 1], "token", **totals).tolist() == pytest.approx([0.1] * 3)
    assert token_weights([2, 1], "answer", **totals).tolist() == pytest.approx([1 / 8, 1 / 8, 1 / 4])
    assert token_weights([2, 1], "constant", **totals).tolist() == pytest.approx([1 / 20] * 3)
    with pytest.raises(ConfigError, match="averaging is 'mean', expected one of token, answer, constant"):
        token_weights([2, 1], "mean", **totals)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="an answer of 0 tokens has no mean"):
        token_weights([2, 0], "answer", **totals)


@pytest.mark.parametrize("averaging", ["token", "answer", "constant"])
def test_micro_batches_add_up(averaging: str) -> None:
    losses, lengths = torch.rand(9, generator=torch.Generator().manual_seed(2)), [3, 1, 5]
    totals = {"total_tokens": 9, "total_answers": 3, "max_tokens": 6}
    whole = (losses * token_weights(lengths, averaging, **totals)).sum()  # type: ignore[arg-type]
    parts = [
        (losses[:4] * token_weights(lengths[:2], averaging, **totals)).sum(),  # type: ignore[arg-type]
        (losses[4:] * token_weights(lengths[2:], averaging, **totals)).sum(),  # type: ignore[arg-type]
    ]
    torch.testing.assert_close(whole, parts[0] + parts[1])


def test_lengths_have_to_fit() -> None:
    assert [part.tolist() for part in split_answers(torch.arange(3), [2, 1])] == [[0, 1], [2]]
    for lengths in ([2], [2, 2], [3, 0]):
        with pytest.raises(ShapeError, match="do not fit 3 packed values"):
            split_answers(torch.arange(3), lengths)


def test_metrics_by_hand() -> None:
    """Ratios 0.7, 1, 1.5: two of three outside of 0.8 to 1.3; KL by k3 of the policy that sampled."""
    ratios = torch.tensor([0.7, 1.0, 1.5])
    found = policy_metrics(ratios.log(), torch.full((3,), 1 / 3), clip_low=0.2, clip_high=0.3)
    assert found["policy/clipped"].item() == pytest.approx(2 / 3)
    expected = sum(r - 1 - math.log(r) for r in (0.7, 1.0, 1.5)) / 3
    assert found["policy/staleness_kl"].item() == pytest.approx(expected, abs=1e-6)


def test_weighted_answers_of_a_sampler_are_in_the_mean_those_of_the_policy() -> None:
    """Over all tokens of a small vocabulary: the sampler's mean of weight times value is the policy's mean of the value."""
    policy = torch.randn(7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    sampler = (policy + 0.3 * torch.randn(7, generator=torch.Generator().manual_seed(1))).log_softmax(-1)
    values = torch.arange(7.0)
    weights = sampler_weights(policy, sampler, cap=100.0)
    assert float((sampler.exp() * weights * values).sum()) == pytest.approx(
        float((policy.exp() * values).sum()), rel=1e-5
    )
    assert float(sampler_weights(policy, sampler, cap=1.1).max()) == pytest.approx(1.1)
    assert torch.equal(sampler_weights(policy, sampler, cap=1.1), weights.clamp(max=1.1))
