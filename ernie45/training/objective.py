"""What a training method is to the loop: how its rows become batches, and what of a batch is made smaller.

The loop knows nothing of losses. It asks for the totals of a step first, so that a step gives the same loss in however many
micro-batches it is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

Item_contra = TypeVar("Item_contra", contravariant=True)
Item_co = TypeVar("Item_co", covariant=True)
B = TypeVar("B")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of one micro-batch, as its share of the step's."""

    total: Tensor
    """Scalar with gradient: everything that is made smaller. The step's gradient is the sum over micro-batches."""
    logged: Mapping[str, Tensor]
    """Scalars without gradient, by name (`loss`, `mtp_loss`, ..): the step's value is the sum over micro-batches. `loss` is
    the LM or preference loss alone, without add-ons, so that runs with and without them compare."""


class Objective(Protocol[Item_contra, B]):
    """A method: pre-training, SFT, DPO, UPO."""

    def collate(self, rows: Sequence[Sequence[Item_contra]]) -> B:
        """Make one micro-batch of packed rows."""

    def totals(self, batches: Sequence[B]) -> Any:
        """What the shares of a step's micro-batches are taken of, such as the number of tokens that learn."""

    def loss(self, network: Any, batch: B, totals: Any) -> Loss:
        """One micro-batch's share of the step's loss. `network`: a `training.network.TrainingNetwork`."""

    def num_tokens(self, batch: B) -> int:
        """Tokens that the network reads in this batch, for tokens per second."""


class RowStream(Protocol[Item_co]):
    """Endless packed rows in an order that follows from the configuration alone."""

    def next_row(self) -> Sequence[Item_co]:
        """The next row. Raises: StopIteration never; data that ends starts again in a new order."""

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON values; small."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Raises: CheckpointError if the state belongs to other data."""
