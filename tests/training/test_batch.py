"""Documents packed into a batch: what is read, what is learnt, by every head."""

from __future__ import annotations

import pytest
import torch

from ernie45.errors import ShapeError
from ernie45.training.batch import IGNORED, Batch, Document

N = IGNORED


def document(ids: list[int], learnt: list[int], num_unread: int = 1) -> Document:
    return Document(ids=torch.tensor(ids), learnt=torch.tensor(learnt).bool(), num_unread=num_unread)


def test_shifts_stay_inside_their_document() -> None:
    rows = [[document([1, 2, 3, 4], [0, 0, 1, 1]), document([5, 6], [0, 1])], [document([7, 8, 9], [0, 1, 0])]]
    batch = Batch.of_rows(rows, num_mtp=1)
    assert batch.tokens_T.tolist() == [1, 2, 3, 5, 7, 8]
    assert batch.lengths == (3, 1, 2)
    assert batch.num_rows == 2
    assert batch.ahead_DT.tolist() == [[2, 3, 4, 6, 8, 9], [3, 4, 0, 0, 9, 0]]
    assert batch.labels_DT.tolist() == [[N, 3, 4, 6, 8, N], [3, 4, N, N, N, N]]
    assert (batch.num_tokens, batch.num_learnt) == (6, 4)
    assert batch.view().positions().tolist() == [0, 1, 2, 0, 0, 1]


def test_unread_tokens_are_targets_of_the_blocks() -> None:
    """A text that was cut lends the blocks the tokens behind the cut: every input learns at every depth."""
    batch = Batch.of_rows([[document([1, 2, 3, 4, 5], [1] * 5, num_unread=2)]], num_mtp=1)
    assert batch.tokens_T.tolist() == [1, 2, 3]
    assert batch.labels_DT.tolist() == [[2, 3, 4], [3, 4, 5]]


def test_without_blocks_there_is_one_depth() -> None:
    batch = Batch.of_rows([[document([1, 2, 3], [0, 1, 1])]])
    assert batch.labels_DT.tolist() == [[2, 3]]


def test_bad_documents_are_refused() -> None:
    with pytest.raises(ShapeError, match="cannot leave 1 of them unread"):
        document([1], [0])
    with pytest.raises(ShapeError, match="cannot leave 3"):
        document([1, 2, 3], [0, 1, 1], num_unread=3)
    with pytest.raises(ShapeError, match="expected int64"):
        Document(ids=torch.tensor([1.0, 2.0]), learnt=torch.ones(2).bool())
    with pytest.raises(ShapeError, match="as many marks"):
        Document(ids=torch.tensor([1, 2]), learnt=torch.ones(3).bool())
    with pytest.raises(ShapeError, match="at least one document"):
        Batch.of_rows([[]])
