"""What one forward and backward pass takes: documents, packed behind each other, and what each of their tokens shall learn.

Shape letters: T tokens (packed), D prediction depths (1 for the head alone, one more for every MTP block), n tokens of a document.
Source: training reference 1.3 (shifts of the MTP blocks), 3.2 (packing: positions restart, documents do not see each other).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.layers.cache import AttentionView

IGNORED = -100
"""Label of a position that learns nothing."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A sequence whose tokens see those before them and nothing else."""

    ids: Tensor
    """int64 (n,)."""
    learnt: Tensor
    """bool (n,): whether the token is a target. The first token of a document never is: nothing stands before it."""
    num_unread: int = 1
    """How many of the last tokens are targets alone: 1, or more where a longer text was cut and an MTP block looks further."""
    targets: Tensor | None = None
    """int64 (n,): what is learnt at each place where that is not what the network reads there, such as the end token in place of
    the mark between turns. None: `ids`."""
    origin: str = ""
    """Where it comes from, as `file:line`, for messages."""

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or self.ids.dtype != torch.int64 or self.learnt.shape != self.ids.shape:
            raise ShapeError(
                f"a document has ids {tuple(self.ids.shape)} of {self.ids.dtype} and marks {tuple(self.learnt.shape)}, "
                "expected int64 (n,) and as many marks"
            )
        if self.targets is not None and (self.targets.dtype != torch.int64 or self.targets.shape != self.ids.shape):
            raise ShapeError(
                f"targets are {tuple(self.targets.shape)} of {self.targets.dtype}, expected int64 as many as ids"
            )
        if not 1 <= self.num_unread < len(self.ids):
            raise ShapeError(f"a document of {len(self.ids)} tokens cannot leave {self.num_unread} of them unread")

    @property
    def num_inputs(self) -> int:
        """Tokens that the network reads."""
        return len(self.ids) - self.num_unread


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed documents of one pass; positions restart in each."""

    tokens_T: Tensor
    """int64."""
    lengths: tuple[int, ...]
    """Tokens of each document, T in all."""
    ahead_DT: Tensor
    """int64: row d holds the token d + 1 places further in the same document, 0 beyond its end."""
    labels_DT: Tensor
    """int64: row 0 is what the head learns at each position, row d what MTP block d learns; `IGNORED` elsewhere."""
    num_rows: int
    """Packed rows: the constant of the token-balanced loss counts them."""
    origins: tuple[str, ...] = ()

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[Document]], *, num_mtp: int = 0) -> Batch:
        """Put rows behind each other. Raises: ShapeError without documents."""
        documents = [document for row in rows for document in row]
        if not documents:
            raise ShapeError("a batch needs at least one document")
        shifted = [_shifted(document, num_mtp + 1) for document in documents]
        return cls(
            tokens_T=torch.cat([document.ids[: document.num_inputs] for document in documents]),
            lengths=tuple(document.num_inputs for document in documents),
            ahead_DT=torch.cat([ahead for ahead, _ in shifted], dim=1),
            labels_DT=torch.cat([labels for _, labels in shifted], dim=1),
            num_rows=len(rows),
            origins=tuple(document.origin for document in documents),
        )

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.tokens_T)

    @property
    def num_learnt(self) -> int:
        """Positions at which the head learns."""
        return int((self.labels_DT[0] != IGNORED).sum())

    def view(self) -> AttentionView:
        """The documents as the network wants them."""
        return AttentionView(lengths=self.lengths)


def _shifted(document: Document, depths: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels 1 to `depths` places ahead of every input, (D, inputs) each."""
    size = document.num_inputs
    ahead = _windows(document.ids, size, depths)
    targets = ahead if document.targets is None else _windows(document.targets, size, depths)
    return ahead, targets.masked_fill(~_windows(document.learnt, size, depths), IGNORED)


def _windows(values: Tensor, size: int, depths: int) -> Tensor:
    """What stands 1 to `depths` places ahead of the first `size` values, 0 beyond the end."""
    padded = torch.cat((values, values.new_zeros(depths)))
    return torch.stack([padded[depth : depth + size] for depth in range(1, depths + 1)])
