"""Branches: the layout by hand, and log-probabilities against the plain network on each whole sequence alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.training.branches import AnswerIds, BranchBatch, Branches, branch_logprobs, in_chunks
from ernie45.training.network import TrainingNetwork


def answer(ids: list[int], learnt: list[int] | None = None) -> AnswerIds:
    marks = [1] * len(ids) if learnt is None else learnt
    return AnswerIds(ids=torch.tensor(ids, dtype=torch.int64), learnt=torch.tensor(marks, dtype=torch.bool))


def item(prompt: list[int], *answers: AnswerIds, origin: str = "") -> Branches:
    return Branches(prompt_ids=torch.tensor(prompt, dtype=torch.int64), answers=answers, origin=origin)


ITEMS = [
    item([1, 2, 3], answer([4, 5, 6]), answer([7]), origin="a:1"),
    item([8], answer([9, 10, 11, 12], [1, 0, 0, 1]), answer([13, 14, 15], [0, 1, 0]), answer([16, 17, 18, 19])),
]


def test_the_layout() -> None:
    batch = BranchBatch.of_items(ITEMS)
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 5, 8, 9, 10, 11, 13, 16, 17, 18]
    assert batch.lengths == (3, 2, 1, 3, 1, 3)
    assert batch.parents == (None, 0, None, 2, 2, 2)
    # the first tokens 4 and 7 are both predicted by the prompt's last token, at row 2; 9 and 16 by row 5
    assert batch.rows_L.tolist() == [2, 3, 4, 2, 5, 8, 9, 5, 10, 11, 12]
    assert batch.labels_L.tolist() == [4, 5, 6, 7, 9, 12, 14, 16, 17, 18, 19]
    assert batch.counts == (3, 1, 2, 1, 4)
    assert (batch.num_tokens, batch.num_learnt) == (13, 11)
    assert batch.view().positions().tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 1, 1, 2, 3]


def test_sums() -> None:
    batch = BranchBatch.of_items(ITEMS)
    assert batch.sums(torch.arange(11.0)).tolist() == [3, 3, 9, 6, 34]
    assert batch.counts_A.tolist() == [3, 1, 2, 1, 4]


def test_what_has_nothing_to_score_is_refused_with_its_origin() -> None:
    for make, message in (
        (lambda: item([1], answer([2, 3], [0, 0]), origin="f.jsonl:7"), "f.jsonl:7: answer 0 has no token that counts"),
        (
            lambda: item([1], answer([1]), answer([]), origin="f.jsonl:8"),
            "f.jsonl:8: answer 1 has no token that counts",
        ),
        (lambda: item([], answer([2]), origin="f.jsonl:9"), "f.jsonl:9: the prompt is"),
        (lambda: item([1], origin="f.jsonl:10"), "f.jsonl:10: the prompt has no answers"),
        (lambda: BranchBatch.of_items([]), "at least one"),
        (lambda: item([1], answer([1, 2], [1])), "as many marks"),
    ):
        with pytest.raises(ShapeError, match=message):
            make()


def test_keys_name_the_content() -> None:
    same = item([1, 2, 3], answer([4, 5, 6]), answer([7]), origin="elsewhere:9")
    assert same.key() == ITEMS[0].key()
    others = [
        item([1, 2], answer([3, 4, 5, 6]), answer([7])),
        item([1, 2, 3], answer([4, 5, 6], [1, 1, 0]), answer([7])),
        item([1, 2, 3], answer([7]), answer([4, 5, 6])),
    ]
    assert len({same.key(), *(other.key() for other in others)}) == 4


def test_chunks_keep_the_order() -> None:
    sizes = [[len(one.prompt_ids) for one in chunk] for chunk in in_chunks([*ITEMS, *ITEMS], 19)]
    assert sizes == [[3, 1], [3, 1]]
    assert [len(chunk) for chunk in in_chunks([*ITEMS, *ITEMS], 1)] == [1, 1, 1, 1]
    assert in_chunks([], 5) == []


def alone(model: Any, one: Branches) -> Tensor:
    """Log-probabilities of each answer's scored tokens, each answer in a pass of its own."""
    found = []
    for answer_ids in one.answers:
        ids = torch.cat((one.prompt_ids, answer_ids.ids))
        logprobs = model(ids[None])[0].log_softmax(-1)
        targets = logprobs[len(one.prompt_ids) - 1 : -1].gather(1, answer_ids.ids[:, None])[:, 0]
        found.append(targets[answer_ids.learnt])
    return torch.cat(found)


@pytest.mark.parametrize("moe", [False, True])
def test_logprobs_and_gradients_are_those_of_separate_passes(small_model: Any, moe: bool) -> None:
    plain, model = small_model(moe=moe), small_model(moe=moe)
    expected = torch.cat([alone(plain, one) for one in ITEMS])
    batch = BranchBatch.of_items(ITEMS)
    found = branch_logprobs(TrainingNetwork(model), batch)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    factors = torch.linspace(-1, 1, len(found))
    (found * factors).sum().backward()
    (expected * factors).sum().backward()
    gradients = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name].grad, parameter.grad, atol=2e-4, rtol=1e-3)


def test_an_answer_does_not_see_the_other(small_model: Any) -> None:
    network = TrainingNetwork(small_model())
    both = branch_logprobs(network, BranchBatch.of_items(ITEMS[:1]))
    changed = item([1, 2, 3], answer([4, 5, 6]), answer([50]))
    torch.testing.assert_close(branch_logprobs(network, BranchBatch.of_items([changed]))[:3], both[:3], atol=0, rtol=0)
