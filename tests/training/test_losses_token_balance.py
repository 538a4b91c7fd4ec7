"""The token-balanced loss: hand numbers, both forms against each other, and what it reduces to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie45.errors import ShapeError
from ernie45.training.losses.token_balance import token_balanced_mean, token_balanced_sum


def test_by_hand() -> None:
    """Samples of 4 positions (2 learnt, 1 + 3) and of 2 (1 learnt, 5): (4/4 + 5/2) / 2 = 1.75; the usual form has (2 + 5) / 2."""
    losses = torch.tensor([9.0, 1.0, 9.0, 3.0, 5.0, 9.0])
    learnt = torch.tensor([False, True, False, True, True, False])
    torch.testing.assert_close(token_balanced_mean(losses, learnt, [4, 2]), torch.tensor(1.75))


def test_with_everything_learnt_and_rows_alike_it_is_the_ordinary_mean() -> None:
    losses = torch.rand(12, generator=torch.Generator().manual_seed(0))
    learnt = torch.ones(12, dtype=torch.bool)
    torch.testing.assert_close(token_balanced_mean(losses, learnt, [4, 4, 4]), losses.mean())


def test_a_learnt_token_weighs_the_same_next_to_anything() -> None:
    """The usual mean per sample gives the lone token in the first row the weight of three in the second."""
    losses = torch.ones(8, requires_grad=True)
    learnt = torch.tensor([True, False, False, False, True, True, True, False])
    token_balanced_mean(losses, learnt, [4, 4]).backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == [1 / 8, 0, 0, 0, 1 / 8, 1 / 8, 1 / 8, 0]


@given(st.lists(st.booleans(), min_size=12, max_size=12).filter(any))
def test_the_code_form_is_the_formula_on_full_rows_and_shows_the_ordinary_mean(marks: list[bool]) -> None:
    losses = torch.linspace(0.5, 3, 12, requires_grad=True)
    learnt = torch.tensor(marks)
    total = losses[learnt].sum()
    loss = token_balanced_sum(total, num_learnt=sum(marks), num_positions=12)
    torch.testing.assert_close(loss, losses[learnt].mean())
    (found,) = torch.autograd.grad(loss, losses)
    (expected,) = torch.autograd.grad(token_balanced_mean(losses, learnt, [4, 4, 4]), losses)
    torch.testing.assert_close(found, expected)


def test_shares_of_micro_batches_add_up() -> None:
    losses = torch.rand(10, generator=torch.Generator().manual_seed(1), requires_grad=True)
    whole = token_balanced_sum(losses.sum(), num_learnt=10, num_positions=16)
    parts = [token_balanced_sum(part.sum(), num_learnt=10, num_positions=16) for part in losses.split(4)]
    torch.testing.assert_close(whole, torch.stack(parts).sum())
    (found,) = torch.autograd.grad(torch.stack(parts).sum(), losses)
    torch.testing.assert_close(found, torch.full((10,), 1 / 16))


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match="17 learnt of 16 positions"):
        token_balanced_sum(torch.ones(()), num_learnt=17, num_positions=16)
    with pytest.raises(ShapeError, match="0 learnt of 16"):
        token_balanced_sum(torch.ones(()), num_learnt=0, num_positions=16)
    marks = torch.ones(5, dtype=torch.bool)
    for lengths in ([4], [6], [5, 0], []):
        with pytest.raises(ShapeError, match="lengths are at least 1 and add up to T"):
            token_balanced_mean(torch.ones(5), marks, lengths)
