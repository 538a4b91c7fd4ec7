"""The token-balanced loss: a learnt token weighs the same, however much of its row is not learnt.

The usual mean divides a row's loss by the tokens that it learns, so a three-word answer below a large image weighs as much as
a long text. Here rows are divided by all of their positions. Source: training reference 1.4, formula and code form.

Shape letters: T tokens (packed).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ernie45.errors import ShapeError


def token_balanced_mean(losses_T: Tensor, learnt_T: Tensor, lengths: Sequence[int]) -> Tensor:
    """The formula: mean over samples of `sum over learnt positions / all positions` of the sample. A scalar.

    Args: losses_T: cross-entropy of each position. learnt_T: bool; other positions count but cost nothing. lengths: positions
        of each sample, T in all.
    Raises: ShapeError if lengths do not add up to T, or one is below 1.
    """
    if sum(lengths) != len(losses_T) or losses_T.shape != learnt_T.shape or min(lengths, default=0) < 1:
        raise ShapeError(
            f"samples of {list(lengths)} positions do not fit losses {tuple(losses_T.shape)} and marks "
            f"{tuple(learnt_T.shape)}: lengths are at least 1 and add up to T"
        )
    per_token = torch.cat([losses_T.new_full((length,), 1 / length) for length in lengths])
    return (losses_T * per_token).masked_fill(~learnt_T, 0).sum() / len(lengths)


def token_balanced_sum(loss_sum: Tensor, *, num_learnt: int, num_positions: int) -> Tensor:
    """The code form: the gradient of `loss_sum / num_positions`, the value of `loss_sum / num_learnt`. A scalar.

    With full rows it is the formula; the value stays the ordinary mean, so that logs compare with and without.
    Args: loss_sum: sum of cross-entropy over learnt positions of a micro-batch. num_learnt, num_positions: of the whole step
        (rows times the longest row for the latter), so that the shares of micro-batches add up.
    Raises: ShapeError if a number is below 1, or fewer positions than learnt ones are given.
    """
    if not 1 <= num_learnt <= num_positions:
        raise ShapeError(f"{num_learnt} learnt of {num_positions} positions: expected 1 <= learnt <= positions")
    balanced = loss_sum / num_positions
    return balanced - balanced.detach() + loss_sum.detach() / num_learnt
