"""The two small matrices beside a frozen one: what they add, and what the frozen matrix becomes with them.

The network fuses q, k and v, and gate and up. One adapter of a fused matrix shares its A between the parts; an adapter that
came from elsewhere has an A per part. Both are the same thing here: blocks, each of which maps its own ranks to its own rows.

Shape letters: T tokens, N rows (outputs), K columns (inputs), R ranks of all blocks, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernie45.errors import ShapeError
from ernie45.training.lora.config import scale_of


@dataclass(frozen=True, kw_only=True)
class Block:
    """Ranks that write into a range of rows."""

    rows: tuple[int, int]
    """First row and the one after the last."""
    ranks: tuple[int, int]
    alpha: float
    rslora: bool = False

    @property
    def rank(self) -> int:
        """How many."""
        return self.ranks[1] - self.ranks[0]

    @property
    def scale(self) -> float:
        """Of the product B A."""
        return scale_of(self.alpha, self.rank, self.rslora)


class LowRank(nn.Module):
    """A (R, K) and B (N, R) in float32, or (E, R, K) and (E, N, R) for experts; B begins as zero, so nothing changes at first."""

    def __init__(
        self,
        rows: int,
        columns: int,
        blocks: Sequence[Block],
        *,
        num_experts: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        """Args: blocks: ordered by rows and by ranks, without gaps between ranks.
        Raises: ShapeError for other blocks.
        """
        super().__init__()
        self.rows, self.blocks = rows, tuple(blocks)
        self.dropout, self.num_experts = dropout, num_experts
        self._check_blocks()
        lead = () if num_experts is None else (num_experts,)
        self.lora_A = nn.Parameter(torch.empty(*lead, self.rank, columns))
        self.lora_B = nn.Parameter(torch.zeros(*lead, rows, self.rank))
        self.register_parameter("magnitude", None)

    magnitude: nn.Parameter | None
    """With DoRA: the length of every row, float32 (N,)."""

    @property
    def rank(self) -> int:
        """R."""
        return self.blocks[-1].ranks[1]

    def initialize(self, generator: torch.Generator) -> None:
        """Draw A uniformly within 1 / sqrt(K), as linear layers begin."""
        bound = self.lora_A.shape[-1] ** -0.5
        drawn = torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(drawn)

    def learn_magnitude(self, weight_NK: Tensor) -> None:
        """Make it DoRA, starting from the lengths that the rows of the frozen matrix have."""
        lengths = torch.linalg.vector_norm(weight_NK.detach().float(), dim=1)
        self.magnitude = nn.Parameter(lengths)

    def forward(self, x_TK: Tensor) -> Tensor:
        """What is added to the frozen layer's output without DoRA, float32 (T, N)."""
        return self.product(x_TK, self.lora_A, self.lora_B)

    def of_experts(self) -> list[tuple[Tensor, Tensor]]:
        """Each expert's A and B, for `product`. Taken apart at once: the gradients are then put together once as well."""
        return list(zip(self.lora_A.unbind(0), self.lora_B.unbind(0), strict=True))

    def product(self, x_TK: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """The same with the A and B of one expert."""
        ranks_TR = F.linear(x_TK.to(down.dtype), down)
        parts, end = [], 0
        for block in self.blocks:
            if block.rows[0] > end:
                parts.append(ranks_TR.new_zeros(len(x_TK), block.rows[0] - end))
            first, last = block.ranks
            parts.append(F.linear(ranks_TR[:, first:last], up[slice(*block.rows), first:last]) * block.scale)
            end = block.rows[1]
        if end < self.rows:
            parts.append(ranks_TR.new_zeros(len(x_TK), self.rows - end))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def merged(self, weight_NK: Tensor, *, first_row: int = 0, expert: int | None = None) -> Tensor:
        """The frozen matrix with the adapter inside, float32; `weight_NK` may be its rows from `first_row` on alone."""
        total_NK = self.added(weight_NK, first_row=first_row, expert=expert)
        if self.magnitude is None:
            return total_NK
        magnitude_N = self.magnitude[first_row : first_row + len(weight_NK)]
        return total_NK * (magnitude_N / torch.linalg.vector_norm(total_NK, dim=1))[:, None]

    def added(self, weight_NK: Tensor, *, first_row: int = 0, expert: int | None = None) -> Tensor:
        """The sum of the matrix, or of its rows from `first_row` on, and the scaled product B A; float32."""
        down, up = (self.lora_A, self.lora_B) if expert is None else (self.lora_A[expert], self.lora_B[expert])
        return weight_NK.float() + self._scaled(up)[first_row : first_row + len(weight_NK)] @ down.float()

    def dropped(self, x_TK: Tensor) -> Tensor:
        """The input as the adapter sees it."""
        return F.dropout(x_TK, self.dropout, self.training)

    def _scaled(self, up_NR: Tensor) -> Tensor:
        """B with the scales inside, and zero where no block is."""
        out = torch.zeros_like(up_NR, dtype=torch.float32)
        for block in self.blocks:
            here = slice(*block.rows), slice(*block.ranks)
            out[here] = up_NR[here].float() * block.scale
        return out

    def _check_blocks(self) -> None:
        row, rank = 0, 0
        for block in self.blocks:
            if not (row <= block.rows[0] < block.rows[1] <= self.rows and rank == block.ranks[0] < block.ranks[1]):
                raise ShapeError(
                    f"adapter block of rows {block.rows} and ranks {block.ranks} behind row {row} and rank {rank} of a "
                    f"matrix with {self.rows} rows: expected blocks in order"
                )
            row, rank = block.rows[1], block.ranks[1]
        if not self.blocks:
            raise ShapeError("an adapter needs at least one block")
