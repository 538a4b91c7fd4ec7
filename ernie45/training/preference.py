"""Preference tuning as an objective: pairs of answers to one prompt, and the losses of the DPO family.

One packed pass holds prompt, chosen and rejected answer of every pair; the prompt is computed once (`branches.py`).

Shape letters: L scored tokens, A answers (chosen and rejected in turn), B pairs. Source: training reference 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ernie45.errors import ConfigError
from ernie45.training.branches import AnswerIds, BranchBatch, Branches, branch_logprobs
from ernie45.training.data.pairs import PreferencePair
from ernie45.training.losses.preference import (
    PairScores,
    PreferenceConfig,
    answer_scores,
    combine,
    preference_losses,
    preference_metrics,
)
from ernie45.training.objective import Loss
from ernie45.training.reference_policy import Reference


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Pairs of one pass."""

    packed: BranchBatch
    """Prompts with two answers each, the chosen one first."""
    score_gap_B: Tensor
    """float32: score of the chosen minus that of the rejected answer."""

    @property
    def num_pairs(self) -> int:
        """B."""
        return len(self.packed.items)

    @property
    def num_chosen_tokens(self) -> int:
        """Scored tokens of chosen answers."""
        return sum(self.packed.counts[::2])


@dataclass(frozen=True, kw_only=True)
class PairTotals:
    """What the shares of a step are taken of."""

    num_pairs: int
    num_chosen_tokens: int


class PreferenceObjective:
    """DPO and its relatives.

    The loss of a step does not depend on the micro-batches it is computed in, but for `kto_pair`, whose pairs are measured against
    the other pairs of their micro-batch.
    """

    def __init__(self, config: PreferenceConfig, reference: Reference | None = None) -> None:
        """Raises: ConfigError if the method needs a reference and none is given, or the other way round."""
        if config.uses_reference != (reference is not None):
            need = (
                "needs a reference policy"
                if config.uses_reference
                else "does not read the reference policy that is given"
            )
            raise ConfigError(f"loss_type {config.loss_type} with reference_free {config.reference_free} {need}")
        self.config, self.reference = config, reference

    def collate(self, rows: Sequence[Sequence[PreferencePair]]) -> PairBatch:
        """Pack pairs behind each other. Raises: ShapeError, with its origin, for a pair with an answer that has nothing to score."""
        pairs = [pair for row in rows for pair in row]
        packed = BranchBatch.of_items([pair_branches(pair) for pair in pairs], num_rows=len(rows))
        return PairBatch(packed=packed, score_gap_B=score_gaps(pairs))

    def totals(self, batches: Sequence[PairBatch]) -> PairTotals:
        """Pairs and chosen tokens of the step."""
        return PairTotals(
            num_pairs=sum(batch.num_pairs for batch in batches),
            num_chosen_tokens=sum(batch.num_chosen_tokens for batch in batches),
        )

    def loss(self, network: Any, batch: PairBatch, totals: PairTotals) -> Loss:
        """One micro-batch's share."""
        packed = batch.packed
        sums_A = packed.sums(branch_logprobs(network, packed))
        scores = pair_scores(
            sums_A,
            packed.counts_A,
            None if self.reference is None else self.reference.sums(packed),
            self.config,
            score_gap_B=batch.score_gap_B,
        )
        total, preference, likelihood = combine(
            preference_losses(scores, self.config),
            sums_A[0::2].sum(),
            self.config,
            num_pairs=totals.num_pairs,
            num_chosen_tokens=totals.num_chosen_tokens,
        )
        metrics = preference_metrics(scores, self.config, num_pairs=totals.num_pairs)
        return Loss(total=total, logged={"loss": preference, "sft_loss": likelihood, **metrics})

    def num_tokens(self, batch: PairBatch) -> int:
        """Tokens that the network reads; the reference's are not counted."""
        return batch.packed.num_tokens


def pair_branches(pair: PreferencePair) -> Branches:
    """A pair as a prompt with two answers. Raises: ShapeError, with the origin, for an answer that has nothing to score."""
    answers = (
        AnswerIds(ids=pair.chosen, learnt=pair.chosen_learnt),
        AnswerIds(ids=pair.rejected, learnt=pair.rejected_learnt),
    )
    return Branches(prompt_ids=pair.prompt, answers=answers, origin=pair.origin)


def pair_scores(
    sums_A: Tensor,
    counts_A: Tensor,
    reference_A: Tensor | None,
    config: PreferenceConfig,
    *,
    score_gap_B: Tensor | None = None,
) -> PairScores:
    """What the losses compare. Args: sums_A, counts_A, reference_A: log-probabilities, scored tokens and the reference's
    log-probabilities of chosen and rejected answers in turn.
    """
    counts_A = counts_A.to(sums_A.device)
    lengths = counts_A[0::2], counts_A[1::2]
    chosen, rejected = answer_scores(sums_A[0::2], sums_A[1::2], *lengths, config)
    if reference_A is None:
        return PairScores(chosen=chosen, rejected=rejected, score_gap=score_gap_B)
    reference_c, reference_r = answer_scores(reference_A[0::2], reference_A[1::2], *lengths, config)
    return PairScores(
        chosen=chosen,
        rejected=rejected,
        reference_chosen=reference_c,
        reference_rejected=reference_r,
        score_gap=score_gap_B,
    )


def score_gaps(pairs: Sequence[PreferencePair]) -> Tensor:
    """How much better the chosen answers are, float32 (B,)."""
    return torch.tensor([pair.score_chosen - pair.score_rejected for pair in pairs], dtype=torch.float32)
