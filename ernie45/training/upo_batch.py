"""What reinforcement learning learns from: a prompt with its sampled answers, and batches of such groups with pairs beside them.

Shape letters: L scored tokens (of all answers, one behind the other), P those of sampled answers, A answers, B pairs.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ernie45.errors import CheckpointError
from ernie45.training.branches import AnswerIds, BranchBatch, Branches
from ernie45.training.data.pairs import PreferencePair
from ernie45.training.preference import pair_branches, score_gaps

_TENSORS = ("sampler_L", "old_L", "advantages_L", "rewards_A", "reference_L", "values_L", "returns_L")
_NUMPY = {torch.float32: np.float32, torch.int64: np.int64}


@dataclass(frozen=True, kw_only=True)
class Group:
    """The answers to one prompt, and what was known of them when they were sampled."""

    branches: Branches
    sampler_L: Tensor
    """float32: log-probabilities as the generator had them."""
    old_L: Tensor
    """float32: log-probabilities that ratios are taken against."""
    advantages_L: Tensor
    """float32."""
    rewards_A: Tensor
    """float32, as the rewards gave them."""
    reference_L: Tensor | None = None
    """float32: log-probabilities under the reference; None where nobody asks."""
    values_L: Tensor | None = None
    """float32: the critic's values before each token; None without a critic."""
    returns_L: Tensor | None = None
    """float32: what the critic shall say."""
    pair: tuple[int, int] | None = None
    """The chosen and the rejected answer of the preference part."""
    staleness: int = 0
    """Steps since the answers were sampled."""
    logged: Mapping[str, float] = field(default_factory=dict)
    """For the log; a step logs the mean over its groups."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each answer."""
        return [len(answer.ids) for answer in self.branches.answers]


@dataclass(frozen=True, kw_only=True)
class UpoBatch:
    """Groups, and pairs of a data set behind them, of one pass."""

    packed: BranchBatch
    groups: tuple[Group, ...]
    chosen_B: Tensor
    """int64: answers of the batch."""
    rejected_B: Tensor
    offline: BranchBatch | None
    """The pairs of the data set alone, for the reference."""
    score_gap_B: Tensor
    """float32: distance of the rewards or scores of each pair."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sampled answer."""
        return self.packed.counts[: sum(len(group.branches.answers) for group in self.groups)]

    @property
    def num_policy_tokens(self) -> int:
        """P."""
        return sum(self.lengths)

    @property
    def num_chosen_tokens(self) -> int:
        """Scored tokens of chosen answers."""
        return sum(self.packed.counts[place] for place in self.chosen_B.tolist())

    def gathered(self, name: str) -> Tensor:
        """A tensor of all groups, (P,)."""
        return torch.cat([getattr(group, name) for group in self.groups])


def collate_groups(rows: Sequence[Sequence[Group | PreferencePair]]) -> UpoBatch:
    """Pack rows behind each other: all groups, then all pairs of the data set."""
    items = [item for row in rows for item in row]
    groups = tuple(item for item in items if isinstance(item, Group))
    offline = [item for item in items if isinstance(item, PreferencePair)]
    pairs = [pair_branches(pair) for pair in offline]
    chosen, rejected, gaps = _online_pairs(groups)
    first = sum(len(group.branches.answers) for group in groups)
    chosen += [first + 2 * place for place in range(len(pairs))]
    rejected += [first + 2 * place + 1 for place in range(len(pairs))]
    gaps.append(score_gaps(offline))
    return UpoBatch(
        packed=BranchBatch.of_items([*(group.branches for group in groups), *pairs], num_rows=len(rows)),
        groups=groups,
        chosen_B=torch.tensor(chosen, dtype=torch.int64),
        rejected_B=torch.tensor(rejected, dtype=torch.int64),
        offline=BranchBatch.of_items(pairs) if pairs else None,
        score_gap_B=torch.cat(gaps),
    )


def _online_pairs(groups: Sequence[Group]) -> tuple[list[int], list[int], list[Tensor]]:
    chosen: list[int] = []
    rejected: list[int] = []
    gaps: list[Tensor] = []
    first = 0
    for group in groups:
        if group.pair is not None:
            best, worst = group.pair
            chosen.append(first + best)
            rejected.append(first + worst)
            gaps.append(group.rewards_A[best, None] - group.rewards_A[worst])
        first += len(group.branches.answers)
    return chosen, rejected, gaps


def sampled_branches(prompt: Sequence[int], answers: Sequence[Sequence[int]], origin: str) -> Branches:
    """A prompt with sampled answers, every token of which counts."""
    ids = [torch.tensor(answer, dtype=torch.int64) for answer in answers]
    return Branches(
        prompt_ids=torch.tensor(prompt, dtype=torch.int64),
        answers=tuple(AnswerIds(ids=one, learnt=torch.ones(len(one), dtype=torch.bool)) for one in ids),
        origin=origin,
    )


def encode_group(group: Group) -> dict[str, Any]:
    """A group as JSON values, bit by bit."""
    tensors = {name: getattr(group, name) for name in _TENSORS}
    answers = [answer.ids for answer in group.branches.answers]
    return {
        "prompt": _encode(group.branches.prompt_ids),
        "answers": [_encode(ids) for ids in answers],
        "origin": group.branches.origin,
        "tensors": {name: _encode(tensor) for name, tensor in tensors.items() if tensor is not None},
        "pair": None if group.pair is None else list(group.pair),
        "logged": dict(group.logged),
    }


def decode_group(state: Mapping[str, Any]) -> Group:
    """The group that `encode_group` wrote. Raises: CheckpointError."""
    try:
        tensors: dict[str, Any] = {name: _decode(text, torch.float32) for name, text in state["tensors"].items()}
        prompt = _decode(state["prompt"], torch.int64).tolist()
        answers = [_decode(text, torch.int64).tolist() for text in state["answers"]]
        pair = state["pair"]
        return Group(
            branches=sampled_branches(prompt, answers, state["origin"]),
            pair=None if pair is None else (int(pair[0]), int(pair[1])),
            logged=dict(state["logged"]),
            **tensors,
        )
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's rollout cannot be read: {error}") from error


def _encode(tensor: Tensor) -> str:
    array = tensor.detach().cpu().numpy()
    assert array.dtype in _NUMPY.values(), f"a group holds {array.dtype}"
    return base64.b64encode(array.tobytes()).decode("ascii")


def _decode(text: str, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text, validate=True), dtype=_NUMPY[dtype]).copy())
