"""The embedding of a network whose head reads the same table: its gradient goes into the head's instead of a second table.

Both read the table through one node of the graph, which gets their gradients separately: the head's is dense, the embedding's are the
rows that were read, and these are added to that in place. autograd by itself would clear, fill and add a second table, which takes
0.1 s of a step of 2.5 s where memory is fresh (64 MB).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TrainingEmbedding(nn.Embedding):
    """`nn.Embedding`, tied."""

    _for_head: _Shared | None = None

    def forward(self, input: Tensor) -> Tensor:
        """ids, int64 (T,) -> (T, H)."""
        if not self.weight.requires_grad or not torch.is_grad_enabled():
            return F.embedding(input, self.weight)
        for_head, for_rows = _Tied.apply(self.weight)  # type: ignore[no-untyped-call]
        self._for_head = _Shared(for_head)
        return F.embedding(input, for_rows, sparse=True)

    def for_head(self) -> Tensor:
        """The table as the head of the pass that is under way reads it."""
        shared, self._for_head = self._for_head, None
        table = None if shared is None else shared.table
        # A pass without a head may lie long ago, and the parameter may have new memory since.
        return self.weight if table is None or table.data_ptr() != self.weight.data_ptr() else table


class _Shared:
    """Belongs to a pass and not to the module: a copy of the module has none."""

    def __init__(self, table: Tensor | None) -> None:
        self.table = table

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return _Shared(None)


class _Tied(torch.autograd.Function):
    """The table twice: for a dense gradient and for a sparse one."""

    @staticmethod
    def forward(ctx: Any, table_VH: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return table_VH.detach(), table_VH.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        dense, rows = grads
        if dense is None:
            return None if rows is None else rows.to_dense()
        # Nobody else has the dense one: what the head returns is its own.
        return dense if rows is None else dense.add_(rows) if dense.is_contiguous() else dense + rows
