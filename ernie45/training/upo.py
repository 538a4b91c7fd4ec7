"""UPO as an objective: PPO or GRPO and a preference loss in one pass over one batch.

`L = L_policy + lambda * L_preference`, with L_policy = clipped ratios + value_weight * value loss + kl_weight * KL - entropy_weight *
entropy. At lambda 0 it is PPO (or GRPO), with the policy part off it is DPO, each bit by bit. Pairs of sampled answers cost nothing
beside the pass that the policy part needs anyway.

Shape letters: L scored tokens, P those of sampled answers (the first ones), A answers, B pairs. Source: training reference 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ernie45.errors import ConfigError
from ernie45.training.data.pairs import PreferencePair
from ernie45.training.head import label_logprobs_and_entropy
from ernie45.training.losses.policy import (
    clipped_policy_losses,
    clipped_value_losses,
    kl_estimates,
    policy_metrics,
    sampler_weights,
    sequence_log_ratios,
    token_log_ratios,
    token_weights,
)
from ernie45.training.losses.preference import combine, preference_losses, preference_metrics
from ernie45.training.losses.upo import upo_loss
from ernie45.training.objective import Loss
from ernie45.training.preference import pair_scores
from ernie45.training.reference_policy import Reference
from ernie45.training.upo_batch import Group, UpoBatch, collate_groups
from ernie45.training.upo_config import RolloutConfig, UpoConfig
from ernie45.training.values import Critic, values_of


@dataclass(frozen=True, kw_only=True)
class UpoTotals:
    """What the shares of a step are taken of."""

    num_groups: int
    num_answers: int
    num_tokens: int
    """Of sampled answers."""
    num_pairs: int
    num_chosen_tokens: int


class UpoObjective:
    """PPO, GRPO, and either with preferences."""

    def __init__(
        self, config: UpoConfig, rollout: RolloutConfig, *, hidden_size: int, reference: Reference | None = None
    ) -> None:
        """Args: hidden_size: of the network, for the critic. reference: for pairs of a data set, if their loss has one.

        Raises: ConfigError if such a reference is missing, and for a correction for the sampler where there is nothing to correct.
        """
        offline = config.has_offline_pairs
        if offline and config.preference.uses_reference and reference is None:
            raise ConfigError(
                f"pairs of a data set with loss_type {config.preference.loss_type} need a reference policy"
            )
        if config.sampler_ratio_cap is not None and rollout.old_logprobs == "sampler":
            raise ConfigError(
                f"sampler_ratio_cap is {config.sampler_ratio_cap}, but with old_logprobs: sampler ratios are against the sampler "
                "already: leave one of the two out"
            )
        self.config, self.rollout, self.reference = config, rollout, reference
        self.critic = Critic(hidden_size) if config.has_critic else None
        """Trains along: its parameters belong into the optimizer and its state into the checkpoint."""

    def collate(self, rows: Sequence[Sequence[Group | PreferencePair]]) -> UpoBatch:
        """Pack groups, and pairs behind them."""
        return collate_groups(rows)

    def totals(self, batches: Sequence[UpoBatch]) -> UpoTotals:
        """Counts of the step."""
        return UpoTotals(
            num_groups=sum(len(batch.groups) for batch in batches),
            num_answers=sum(len(batch.lengths) for batch in batches),
            num_tokens=sum(batch.num_policy_tokens for batch in batches),
            num_pairs=sum(len(batch.chosen_B) for batch in batches),
            num_chosen_tokens=sum(batch.num_chosen_tokens for batch in batches),
        )

    def loss(self, network: Any, batch: UpoBatch, totals: UpoTotals) -> Loss:
        """One micro-batch's share."""
        packed = batch.packed
        hidden_LH = network.run(packed).hidden_TH.index_select(0, packed.rows_L)
        logprobs_L, entropy_L = label_logprobs_and_entropy(network, hidden_LH, packed.labels_L)
        logged = _group_means(batch, totals)
        policy = preference = None
        if self.config.policy and batch.groups:
            num = batch.num_policy_tokens
            values_P = None if self.critic is None else values_of(network, self.critic, hidden_LH[:num])
            policy, parts = self._policy_part(batch, totals, logprobs_L[:num], entropy_L[:num], values_P)
            logged |= parts
        if self.config.preference_weight and len(batch.chosen_B):
            preference, parts = self._preference_part(batch, totals, packed.sums(logprobs_L))
            logged |= parts
        if policy is None and preference is None:  # no pair in this micro-batch, and nothing else is learnt
            return Loss(total=torch.zeros((), requires_grad=True), logged=logged)
        total = upo_loss(policy, preference, weight=self.config.preference_weight)
        return Loss(total=total, logged=logged)

    def num_tokens(self, batch: UpoBatch) -> int:
        """Tokens that the network reads with a gradient."""
        return batch.packed.num_tokens

    def _policy_part(
        self, batch: UpoBatch, totals: UpoTotals, logprobs_P: Tensor, entropy_P: Tensor, values_P: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        weights_P = token_weights(
            batch.lengths,
            config.averaging,
            total_tokens=totals.num_tokens,
            total_answers=totals.num_answers,
            max_tokens=self.rollout.max_tokens,
        )
        old_P = batch.gathered("old_L")
        by_answer = config.ratio_of == "sequence"
        ratios_P = (
            sequence_log_ratios(logprobs_P, old_P, batch.lengths) if by_answer else token_log_ratios(logprobs_P, old_P)
        )
        clips = {"clip_low": config.clip_low, "clip_high": config.clip_high}
        losses_P = clipped_policy_losses(ratios_P, batch.gathered("advantages_L"), **clips)
        even_P = torch.full_like(weights_P, 1 / totals.num_tokens)
        logged: dict[str, Tensor] = {}
        if config.sampler_ratio_cap is not None:
            corrections_P = sampler_weights(old_P, batch.gathered("sampler_L"), cap=config.sampler_ratio_cap)
            losses_P = losses_P * corrections_P
            logged["policy/sampler_ratio"] = (corrections_P * even_P).sum()
        total = (losses_P * weights_P).sum()
        logged["loss"] = total.detach()
        terms = self._terms(batch, logprobs_P, entropy_P, values_P)
        for name, (weight, values) in terms.items():
            term = (values * weights_P).sum()
            logged[name] = term.detach()
            # A term of weight 0 is only logged.
            total = total + weight * term if weight else total
        logged |= policy_metrics(ratios_P, even_P, **clips)
        logged["policy/sampler_kl"] = _sampler_kl(logprobs_P.detach(), batch.gathered("sampler_L"), even_P)
        return total, logged

    def _terms(
        self, batch: UpoBatch, logprobs_P: Tensor, entropy_P: Tensor, values_P: Tensor | None
    ) -> dict[str, tuple[float, Tensor]]:
        """What is added to the policy loss: weight and values per token, by name in the log."""
        config = self.config
        terms = {"policy/entropy": (-config.entropy_weight, entropy_P)}
        if values_P is not None:
            old_P, returns_P = batch.gathered("values_L"), batch.gathered("returns_L")
            losses_P = clipped_value_losses(values_P, old_P, returns_P, clip=config.value_clip)
            terms["value_loss"] = (config.value_weight, losses_P)
        if config.kl_weight:
            in_loss = config.kl_in == "loss"
            distances_P = kl_estimates(logprobs_P, batch.gathered("reference_L"), estimator=config.kl_estimator)
            terms["policy/reference_kl"] = (config.kl_weight if in_loss else 0.0, distances_P)
        return terms

    def _preference_part(self, batch: UpoBatch, totals: UpoTotals, sums_A: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config.preference
        pairs_2B = torch.stack((batch.chosen_B, batch.rejected_B), dim=1).flatten()
        reference_A = self._reference_sums(batch) if config.uses_reference else None
        scores = pair_scores(
            sums_A[pairs_2B],
            batch.packed.counts_A[pairs_2B],
            None if reference_A is None else reference_A[pairs_2B],
            config,
            score_gap_B=batch.score_gap_B,
        )
        total, preference, likelihood = combine(
            preference_losses(scores, config),
            sums_A[batch.chosen_B].sum(),
            config,
            num_pairs=totals.num_pairs,
            num_chosen_tokens=totals.num_chosen_tokens,
        )
        name = "preference_loss" if self.config.policy else "loss"
        logged = {name: preference, "sft_loss": likelihood}
        return total, logged | preference_metrics(scores, config, num_pairs=totals.num_pairs)

    def _reference_sums(self, batch: UpoBatch) -> Tensor:
        """Log-probabilities of all answers under the reference, (A,); 0 for sampled answers that are in no pair."""
        parts = [torch.zeros(len(batch.lengths))]
        if self.config.has_online_pairs:
            parts = [torch.stack([one.sum() for one in batch.gathered("reference_L").split(batch.lengths)])]
        if batch.offline is not None:
            assert self.reference is not None, "the constructor has asked for it"
            parts.append(self.reference.sums(batch.offline))
        return torch.cat(parts)


def _group_means(batch: UpoBatch, totals: UpoTotals) -> dict[str, Tensor]:
    """Shares of the step's means over groups."""
    means: dict[str, Tensor] = {}
    for group in batch.groups:
        for name, value in {**group.logged, "policy/staleness_steps": group.staleness}.items():
            means[name] = means.get(name, torch.zeros(())) + value / totals.num_groups
    return means


def _sampler_kl(logprobs_P: Tensor, sampler_P: Tensor, weights_P: Tensor) -> Tensor:
    """KL(policy now || policy that sampled), from the sampler's tokens: `r log r - (r - 1)` has its mean and is never negative."""
    log_ratios_P = token_log_ratios(logprobs_P, sampler_P)
    ratios_P = log_ratios_P.exp()
    return ((ratios_P * log_ratios_P - (ratios_P - 1)) * weights_P).sum()
