"""Prompts with several answers each, packed so that every prompt is computed once.

    prompt a | answer a1 | answer a2 | prompt b | answer b1 | ..        each answer sees its prompt and itself, nothing else

The first token of each answer is predicted by the last position of its prompt, which all of them share. So what an answer's tokens
learn from is gathered: the row of the prompt's last token, then the answer's own rows. Tokens behind the last one that counts are
not read, and neither is the last one itself.

Shape letters: T packed tokens, L scored tokens (of all answers, one behind the other), A answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.training.batch import Batch
from ernie45.training.head import label_logprobs
from ernie45.training.leaves.attention import BranchedView


@dataclass(frozen=True, kw_only=True)
class AnswerIds:
    """One continuation of a prompt."""

    ids: Tensor
    """int64 (n,)."""
    learnt: Tensor
    """bool (n,): tokens whose log-probability counts; others, such as a user's turn in between, are only read."""


@dataclass(frozen=True, kw_only=True)
class Branches:
    """A prompt and its answers."""

    prompt_ids: Tensor
    """int64 (p,)."""
    answers: tuple[AnswerIds, ...]
    origin: str = ""
    """Where it comes from, as `file:line`, for messages."""

    def __post_init__(self) -> None:
        where = self.origin or "a prompt without origin"
        if self.prompt_ids.ndim != 1 or self.prompt_ids.dtype != torch.int64 or not len(self.prompt_ids):
            raise ShapeError(
                f"{where}: the prompt is {tuple(self.prompt_ids.shape)} of {self.prompt_ids.dtype}, expected int64 (p,), not empty"
            )
        if not self.answers:
            raise ShapeError(f"{where}: the prompt has no answers")
        for number, answer in enumerate(self.answers):
            if answer.ids.ndim != 1 or answer.ids.dtype != torch.int64 or answer.learnt.shape != answer.ids.shape:
                raise ShapeError(
                    f"{where}: answer {number} has ids {tuple(answer.ids.shape)} of {answer.ids.dtype} and marks "
                    f"{tuple(answer.learnt.shape)}, expected int64 (n,) and as many marks"
                )
            if not answer.learnt.any():
                raise ShapeError(
                    f"{where}: answer {number} has no token that counts, so it has no probability to learn from: "
                    "leave the row out"
                )

    def key(self) -> bytes:
        """16 bytes that name the content, wherever it was read from."""
        digest = blake2b(digest_size=16)
        for ids, learnt in ((self.prompt_ids, None), *((answer.ids, answer.learnt) for answer in self.answers)):
            digest.update(len(ids).to_bytes(8, "little") + ids.numpy().tobytes())
            if learnt is not None:
                digest.update(learnt.numpy().tobytes())
        return digest.digest()


@dataclass(frozen=True, kw_only=True)
class BranchBatch(Batch):
    """Packed prompts with their answers; what `TrainingNetwork.run` takes. The head learns at gathered rows (`rows_L`), not at
    the packed ones: a prompt's last row has a label for every answer. So `labels_DT` and `ahead_DT` have no rows."""

    parents: tuple[int | None, ...]
    """For each sequence the one that it goes on from."""
    rows_L: Tensor
    """int64: the packed row whose hidden state predicts each scored token; by answer."""
    labels_L: Tensor
    """int64: the scored tokens."""
    counts: tuple[int, ...]
    """Scored tokens of each answer, L in all."""
    items: tuple[Branches, ...]
    """What was packed, in order."""

    @classmethod
    def of_items(cls, items: Sequence[Branches], *, num_rows: int = 1) -> BranchBatch:
        """Put prompts and answers behind each other. Raises: ShapeError without any."""
        if not items:
            raise ShapeError("a batch needs at least one prompt with answers")
        packed = _Packed()
        for item in items:
            packed.add(item)
        tokens_T = torch.cat(packed.tokens)
        nothing = tokens_T.new_empty((0, len(tokens_T)))
        return cls(
            tokens_T=tokens_T,
            lengths=tuple(len(tokens) for tokens in packed.tokens),
            ahead_DT=nothing,
            labels_DT=nothing,
            num_rows=num_rows,
            origins=tuple(item.origin for item in items),
            parents=tuple(packed.parents),
            rows_L=torch.cat(packed.rows),
            labels_L=torch.cat(packed.labels),
            counts=tuple(len(rows) for rows in packed.rows),
            items=tuple(items),
        )

    @property
    def num_learnt(self) -> int:
        """L."""
        return len(self.labels_L)

    def view(self) -> BranchedView:
        """The tree as the network wants it."""
        return BranchedView(lengths=self.lengths, parents=self.parents)

    @cached_property
    def counts_A(self) -> Tensor:  # noqa: N802  # letters are shapes
        """`counts` as float32."""
        return torch.tensor(self.counts, dtype=torch.float32)

    def sums(self, values_L: Tensor) -> Tensor:
        """Sum over each answer's tokens, (L,) -> (A,); differentiable."""
        # Answer by answer and not by index_add: sums do not depend on what else is in the batch.
        return torch.stack([part.sum() for part in values_L.split(self.counts)])


class _Packed:
    """Sequences under construction."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.parents: list[int | None] = []
        self.rows: list[Tensor] = []
        self.labels: list[Tensor] = []
        self._num_tokens = 0

    def add(self, item: Branches) -> None:
        prompt, prompt_end = len(self.tokens), self._num_tokens + len(item.prompt_ids)
        self._append(item.prompt_ids, None)
        for answer in item.answers:
            scored = answer.learnt.nonzero().flatten()
            # Token i of the answer is predicted by its token i - 1, token 0 by the prompt's last.
            rows = self._num_tokens + scored - 1
            self.rows.append(torch.where(scored == 0, prompt_end - 1, rows))
            self.labels.append(answer.ids[scored])
            num_read = int(scored[-1])
            if num_read:
                self._append(answer.ids[:num_read], prompt)

    def _append(self, tokens: Tensor, parent: int | None) -> None:
        self.tokens.append(tokens)
        self.parents.append(parent)
        self._num_tokens += len(tokens)


def branch_logprobs(network: Any, batch: BranchBatch) -> Tensor:
    """Log-probability of each scored token, float32 (L,), with gradient where it is recorded.

    Args: network: a `training.network.TrainingNetwork`.
    """
    hidden_TH = network.run(batch).hidden_TH
    return label_logprobs(network, hidden_TH.index_select(0, batch.rows_L), batch.labels_L)


@contextmanager
def measuring(network: Any) -> Iterator[None]:
    """Within the block nothing is learnt: no gradient is recorded, and no adapter drops anything."""
    model = network.model
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def in_chunks(items: Iterable[Branches], max_tokens: int) -> list[list[Branches]]:
    """Items in order, in lists of at most `max_tokens` tokens that are read; one item alone may have more."""
    chunks: list[list[Branches]] = []
    room = -1
    for item in items:
        size = len(item.prompt_ids) + sum(len(answer.ids) for answer in item.answers)
        if size > room:
            chunks.append([])
            room = max_tokens
        chunks[-1].append(item)
        room -= size
    return chunks
