"""KTO as an objective: answers that are good or bad each by itself.

How far the policy has gone from the reference is measured on mismatched answers: every prompt of a step with the answer to the next
one. That takes no gradient, so it is done for the whole step before its first micro-batch: the loss is the same in however many
micro-batches.

Shape letters: L scored tokens, N answers. Source: training reference 3.4; losses in `losses/kto.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.training.branches import AnswerIds, BranchBatch, Branches, branch_logprobs, measuring
from ernie45.training.data.pairs import KtoExample
from ernie45.training.losses.kto import KtoConfig, kl_estimate, kto_losses, kto_metrics
from ernie45.training.objective import Loss
from ernie45.training.reference_policy import TokenReference


@dataclass(frozen=True, kw_only=True)
class KtoBatch:
    """Judged answers of one pass."""

    packed: BranchBatch
    """Prompts with one answer each."""
    good_N: Tensor
    """bool."""


@dataclass(frozen=True, kw_only=True)
class KtoTotals:
    """What the shares of a step are taken of."""

    num_good: int
    num_bad: int
    kl: Tensor
    """Distance of policy and reference, a scalar without gradient."""

    @property
    def num_answers(self) -> int:
        """Both kinds."""
        return self.num_good + self.num_bad


class KtoObjective:
    """KTO. The reference has to compute: nobody has seen the mismatched answers before."""

    def __init__(self, config: KtoConfig, reference: TokenReference, network: Any) -> None:
        """Args: network: the `TrainingNetwork` that learns; the distance is measured on it before a step."""
        self.config, self.reference, self._network = config, reference, network

    def collate(self, rows: Sequence[Sequence[KtoExample]]) -> KtoBatch:
        """Pack answers behind each other. Raises: ShapeError, with its origin, for one that has nothing to score."""
        examples = [example for row in rows for example in row]
        packed = BranchBatch.of_items([_branches(example) for example in examples], num_rows=len(rows))
        return KtoBatch(packed=packed, good_N=torch.tensor([example.desirable for example in examples]))

    def totals(self, batches: Sequence[KtoBatch]) -> KtoTotals:
        """Counts of the step, and the distance of policy and reference. Raises: ShapeError for a step of one answer."""
        good_N = torch.cat([batch.good_N for batch in batches])
        mismatched = _mismatched(batches)
        with measuring(self._network):
            policy = torch.cat([batch.sums(branch_logprobs(self._network, batch)) for batch in mismatched])
        reference = torch.cat([self.reference.sums(batch) for batch in mismatched])
        num_good = int(good_N.sum())
        return KtoTotals(num_good=num_good, num_bad=len(good_N) - num_good, kl=kl_estimate(policy, reference))

    def loss(self, network: Any, batch: KtoBatch, totals: KtoTotals) -> Loss:
        """One micro-batch's share."""
        policy_N = batch.packed.sums(branch_logprobs(network, batch.packed))
        reference_N = self.reference.sums(batch.packed)
        losses_N = kto_losses(policy_N, reference_N, batch.good_N, totals.kl, self.config)
        total = losses_N.sum() / totals.num_answers
        metrics = kto_metrics(
            policy_N, reference_N, batch.good_N, self.config, num_good=totals.num_good, num_bad=totals.num_bad
        )
        share = len(batch.good_N) / totals.num_answers
        return Loss(total=total, logged={"loss": total.detach(), "kl": totals.kl * share, **metrics})

    def num_tokens(self, batch: KtoBatch) -> int:
        """Tokens that the network reads with a gradient."""
        return batch.packed.num_tokens


def _branches(example: KtoExample) -> Branches:
    answer = AnswerIds(ids=example.completion, learnt=example.learnt)
    return Branches(prompt_ids=example.prompt, answers=(answer,), origin=example.origin)


def _mismatched(batches: Sequence[KtoBatch]) -> list[BranchBatch]:
    """Every prompt of a step with the answer to the next one, in batches as large as the given ones."""
    items = [item for batch in batches for item in batch.packed.items]
    if len(items) < 2:
        raise ShapeError(
            "a step of KTO has one answer, and no other prompt to mismatch it with: take two rows per step or more"
        )
    following = [*items[1:], items[0]]
    mixed = [
        Branches(prompt_ids=item.prompt_ids, answers=other.answers, origin=item.origin)
        for item, other in zip(items, following, strict=True)
    ]
    sizes = [len(batch.packed.items) for batch in batches]
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return [BranchBatch.of_items(mixed[start : start + size]) for start, size in zip(starts, sizes, strict=True)]
