"""Rollouts on demand: prompts go in, groups of judged answers come out, as an endless stream of rows.

A row is one group; how many of them make a step is the loop's choice. When the last row of a rollout is taken, the next call

    1. hands the weights to the generator; 2. draws prompts and samples answers; 3. judges them; 4. leaves out prompts that teach
    nothing and draws others; 5. computes log-probabilities, values and the reference's log-probabilities, without gradient; 6. gives
    credit to tokens; 7. picks pairs.

So answers are as old as the steps since then. A checkpoint between two rollouts holds no answers at all; one within a rollout holds
them, so that a run goes on exactly, whatever the weights have become meanwhile.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ernie45.errors import ConfigError
from ernie45.training.branches import BranchBatch, in_chunks, measuring
from ernie45.training.data.pairs import PreferencePair
from ernie45.training.objective import RowStream
from ernie45.training.prompts import Prompt, derived_seed
from ernie45.training.reference_policy import TokenReference
from ernie45.training.rewards import Judged, Rewards
from ernie45.training.rollout import Generator
from ernie45.training.upo_batch import Group, decode_group, encode_group
from ernie45.training.upo_config import RolloutConfig, UpoConfig
from ernie45.training.upo_credit import group_numbers, with_advantages, with_pairs
from ernie45.training.upo_sampled import Sampled, group_of
from ernie45.training.values import logprobs_and_values


class UpoRows:
    """The stream that `UpoObjective` learns from."""

    def __init__(
        self,
        config: UpoConfig,
        rollout: RolloutConfig,
        *,
        network: Any,
        generator: Generator,
        prompts: RowStream[Prompt],
        rewards: Rewards,
        rows_per_step: int,
        seed: int = 0,
        critic: nn.Module | None = None,
        reference: TokenReference | None = None,
        pairs: RowStream[PreferencePair] | None = None,
    ) -> None:
        """Args: network: the `TrainingNetwork` that learns. prompts: one per row. rows_per_step: groups that the loop takes per
        optimizer step. critic: the objective's, with advantages: gae. reference: where the configuration asks for one. pairs: with
        pair_source: offline.
        Raises: ConfigError if one of the last three is missing, or given for nothing.
        """
        _check_parts(config, critic=critic, reference=reference, pairs=pairs)
        _check_counts(config, rollout, rows_per_step)
        self.config, self.rollout = config, rollout
        self._network, self._generator, self._prompts, self._rewards = network, generator, prompts, rewards
        self._critic, self._reference, self._pairs = critic, reference, pairs
        self._rows_per_step, self._seed = rows_per_step, seed
        self._num_rollouts = self._served = self._num_rows = self._num_pairs = 0
        self._groups: list[Group] = []

    def next_row(self) -> Sequence[Group | PreferencePair]:
        """The next group, and the pairs of a data set that go with it."""
        if self._is_over:
            self._groups, self._served = self._gather(), 0
            self._num_rollouts += 1
        group = replace(self._groups[self._place()], staleness=self._served // self._rows_per_step)
        self._served += 1
        self._num_rows += 1
        return (group, *self._offline_pairs())

    def state(self) -> dict[str, Any]:
        """See `RowStream`. Within a rollout about 40 bytes per token of it."""
        return {
            "prompts": dict(self._prompts.state()),
            "pairs": None if self._pairs is None else dict(self._pairs.state()),
            "num_rollouts": self._num_rollouts,
            "num_rows": self._num_rows,
            "num_pairs": self._num_pairs,
            "served": 0 if self._is_over else self._served,
            "groups": [] if self._is_over else [encode_group(group) for group in self._groups],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `RowStream`."""
        self._prompts.restore(state["prompts"])
        if self._pairs is not None:
            self._pairs.restore(state["pairs"])
        self._num_rollouts, self._served = int(state["num_rollouts"]), int(state["served"])
        self._num_rows, self._num_pairs = int(state["num_rows"]), int(state["num_pairs"])
        self._groups = [decode_group(group) for group in state["groups"]]

    @property
    def _is_over(self) -> bool:
        return self._served == len(self._groups) * self.rollout.num_epochs

    def _place(self) -> int:
        """Which group comes now: every epoch in an order of its own."""
        epoch, at = divmod(self._served, len(self._groups))
        order = list(range(len(self._groups)))
        random.Random(derived_seed(self._seed, self._num_rollouts, epoch)).shuffle(order)
        return order[at]

    def _offline_pairs(self) -> list[PreferencePair]:
        """As many as keep the ratio; a row of the data set is taken whole."""
        found: list[PreferencePair] = []
        if self._pairs is None:
            return found
        while self._num_pairs + len(found) < int(self._num_rows * self.config.pair_ratio):
            found += self._pairs.next_row()
        self._num_pairs += len(found)
        return found

    def _gather(self) -> list[Group]:
        """One rollout."""
        self._generator.sync(self._network.model)
        sampled, share_kept = self._draw(self._rows_per_step * self.rollout.num_minibatches)
        groups = self._with_passes([group_of(one, share_kept) for one in sampled])
        if self.config.policy:
            subsets = [one.prompt.subset for one in sampled]
            groups = with_advantages(groups, subsets if self.rollout.normalize_rewards else None, self.config)
        return with_pairs(groups, self.config) if self.config.has_online_pairs else groups

    def _draw(self, wanted: int) -> tuple[list[Sampled], float]:
        """Prompts with judged answers, and which share of the drawn ones was kept."""
        kept: list[Sampled] = []
        left_out: list[Sampled] = []
        for draw in range(self.rollout.max_draws):
            sampled = self._sample(wanted - len(kept), derived_seed(self._seed, self._num_rollouts, draw, 1))
            for one, teaches in zip(sampled, self._teach(sampled), strict=True):
                (kept if teaches else left_out).append(one)
            if len(kept) >= wanted:
                break
        share = len(kept) / (len(kept) + len(left_out))
        return (kept + left_out)[:wanted], share

    def _sample(self, count: int, seed: int) -> list[Sampled]:
        """Judged answers to the next prompts."""
        prompts = [prompt for _ in range(count) for prompt in self._prompts.next_row()]
        answers = self._generator.generate(
            [prompt.ids for prompt in prompts],
            n=self.rollout.num_answers,
            max_tokens=self.rollout.max_tokens,
            temperature=self.rollout.temperature,
            seed=seed,
        )
        judged = [
            Judged(prompt=prompt.text, answer=answer.text, row=prompt.row, origin=prompt.origin)
            for prompt, several in zip(prompts, answers, strict=True)
            for answer in several
        ]
        scores = iter(self._rewards.score(judged))
        return [
            Sampled(prompt, several, [next(scores) for _ in several])
            for prompt, several in zip(prompts, answers, strict=True)
        ]

    def _teach(self, sampled: Sequence[Sampled]) -> list[bool]:
        """Whether a prompt is kept."""
        if self.rollout.prompt_filter is None:
            return [True] * len(sampled)
        rewards = torch.tensor([reward for one in sampled for reward in one.rewards])
        numbers = group_numbers(len(one.answers) for one in sampled)
        return [verdict == "kept" for verdict in self.rollout.prompt_filter.verdicts(rewards, numbers)]

    def _with_passes(self, groups: Sequence[Group]) -> list[Group]:
        """Log-probabilities and values as they are now, and the reference's."""
        done: list[Group] = []
        for chunk in in_chunks([group.branches for group in groups], self.rollout.max_pass_tokens):
            here = groups[len(done) : len(done) + len(chunk)]
            found = self._computed(BranchBatch.of_items(chunk))
            sizes = [sum(group.lengths) for group in here]
            parts = {name: tensor.split(sizes) for name, tensor in found.items()}
            for place, group in enumerate(here):
                own: dict[str, Any] = {name: several[place] for name, several in parts.items()}
                done.append(replace(group, **own))
        return done

    def _computed(self, batch: BranchBatch) -> dict[str, Tensor]:
        """What is asked of the networks, by its name in `Group`."""
        found: dict[str, Tensor] = {}
        asks_policy = self.config.policy and self.rollout.old_logprobs == "policy"
        if asks_policy or self._critic is not None:
            with measuring(self._network):
                logprobs_L, values_L = logprobs_and_values(self._network, batch, self._critic)
            if asks_policy:
                found["old_L"] = logprobs_L
            if values_L is not None:
                found["values_L"] = values_L
        if self._reference is not None:
            found["reference_L"] = self._reference.logprobs(batch)
        return found


def _check_parts(config: UpoConfig, **parts: object) -> None:
    offline = config.has_offline_pairs
    wanted = {
        "critic": (config.has_critic, "advantages: gae needs it, and nothing else does"),
        "reference": (config.asks_reference, "kl_weight needs it, and online pairs whose loss has a reference"),
        "pairs": (offline, "pair_source: offline needs them, and nothing else does"),
    }
    for name, part in parts.items():
        needed, why = wanted[name]
        if needed != (part is not None):
            raise ConfigError(f"{name}: {'missing' if needed else 'given for nothing'}; {why}")


def _check_counts(config: UpoConfig, rollout: RolloutConfig, rows_per_step: int) -> None:
    if rows_per_step < 1:
        raise ConfigError(f"rows_per_step is {rows_per_step}, expected 1 or more")
    compares = (config.policy and config.advantages == "group") or config.has_online_pairs
    if compares and rollout.num_answers < 2:
        raise ConfigError("num_answers is 1, but answers to a prompt are compared with each other: take 2 or more")
