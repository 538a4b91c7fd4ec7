"""A prompt with its answers and what they are worth, on the way from the generator to what is learnt from.

Shape letters: L tokens of the answers to a prompt, one behind the other; A answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ernie45.errors import ShapeError
from ernie45.training.prompts import Prompt
from ernie45.training.rewards import Score
from ernie45.training.rollout import Completion
from ernie45.training.upo_batch import Group, sampled_branches


class Sampled(NamedTuple):
    """A prompt, its answers, and what they are worth."""

    prompt: Prompt
    answers: Sequence[Completion]
    scores: Sequence[Score]

    @property
    def rewards(self) -> list[float]:
        """Of each answer."""
        return [score.total for score in self.scores]


def group_of(sampled: Sampled, share_kept: float) -> Group:
    """What is known without another pass. Raises: ShapeError if the generator gave no log-probabilities."""
    for answer in sampled.answers:
        if len(answer.logprobs) != len(answer.ids):
            raise ShapeError(
                f"the generator gave {len(answer.logprobs)} log-probabilities with an answer of {len(answer.ids)} tokens, expected "
                "one for each"
            )
    sampler_L = torch.tensor([logprob for answer in sampled.answers for logprob in answer.logprobs])
    prompt = sampled.prompt
    return Group(
        branches=sampled_branches(prompt.ids, [answer.ids for answer in sampled.answers], prompt.origin),
        sampler_L=sampler_L,
        old_L=sampler_L,
        advantages_L=torch.zeros_like(sampler_L),
        rewards_A=torch.tensor(sampled.rewards),
        logged={"rollout/prompts_kept": share_kept, **_statistics(sampled)},
    )


def _statistics(sampled: Sampled) -> dict[str, float]:
    """Means over the answers to one prompt, by their names in the log."""
    count, rewards = len(sampled.answers), sampled.rewards
    means = {
        "rewards/score": sum(rewards) / count,
        "rewards/spread": max(rewards) - min(rewards),
        "rollout/answer_tokens": sum(len(answer.ids) for answer in sampled.answers) / count,
        "rollout/cut": sum(not answer.finished for answer in sampled.answers) / count,
        "rollout/failed_rewards": sum(score.num_failed for score in sampled.scores) / count,
    }
    for name in sampled.scores[0].parts:
        means[f"rewards/score/{name}"] = sum(score.parts[name] for score in sampled.scores) / count
    return means
