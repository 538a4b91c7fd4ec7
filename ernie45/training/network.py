"""The network as training sees it: the one definition, with leaves that keep what the router's losses need.

Shape letters: T tokens, H hidden, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ernie45.layers.moe import Router


@dataclass(frozen=True, kw_only=True)
class RouterRecord:
    """What one router did in one pass."""

    router: Router
    logits_TE: Tensor
    """float32, with gradient."""
    ids_TK: Tensor
    """int64: the experts that were used, chosen with the correction bias."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What came out of one pass through the network."""

    hidden_TH: Tensor
    """The residual stream before the final norm."""
    mtp_TH: tuple[Tensor, ...]
    """The same of every MTP block that was asked for."""
    routers: tuple[RouterRecord, ...]
    """Of every MoE layer in order, empty for a dense model."""
