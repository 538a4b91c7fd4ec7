"""What keeps routers in shape: balance, z and orthogonal loss, unweighted, and how they enter the total unseen.

Shape letters: T tokens (packed, none is padding), H hidden, E experts, K experts per token.
Source: training reference 1.3 (add-ons), 1.5 (router losses).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ernie45.errors import ConfigError
from ernie45.training.network import RouterRecord

OrthogonalMode = Literal["loss", "decoupled"]
_MIN_TOKENS = 1e-6
"""Lower bound of T where something is divided by it: a pool that no token went to costs nothing."""


@dataclass(frozen=True, kw_only=True)
class RouterLossConfig:
    """Weights of the router's losses; 0 leaves one out, and it is not computed."""

    balance: float = 1e-5
    """1e-5 in the released configurations."""
    z: float = 0.0
    orthogonal: float = 0.0
    """1e-3 in the released pre-training of 21B, 0 in tuning."""
    orthogonal_mode: OrthogonalMode = "loss"
    """`loss`: part of the gradient. `decoupled`: `balance.DecoupledOrthogonal` moves the gates behind the optimizer, by this
    weight and without its learning rate."""

    def __post_init__(self) -> None:
        for name in ("balance", "z", "orthogonal"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"router_loss.{name} is {value!r}, expected a number from 0 on (0 = off)")
        if self.orthogonal_mode not in get_args(OrthogonalMode):
            choices = ", ".join(get_args(OrthogonalMode))
            raise ConfigError(f"router_loss.orthogonal_mode is {self.orthogonal_mode!r}, expected one of {choices}")


def balance_loss(record: RouterRecord) -> Tensor:
    """`E * sum_e me_e * ce_e`, a scalar: small where probable experts are not the busy ones.

    me_e: mean probability of expert e, carries the gradient. ce_e: tokens among whose K most probable experts e is, over T.
    The correction bias has no part in it: it would hide the imbalance that this loss is to remove.
    At perfect balance K; at worst, all tokens certain of the same experts, E.
    """
    probs_TE = record.logits_TE.float().softmax(-1)
    num_tokens, num_experts = probs_TE.shape
    ids_TK = record.ids_TK
    if record.router.e_score_correction_bias is not None:
        ids_TK = probs_TE.detach().topk(record.router.num_active, dim=-1).indices
    counts_E = torch.bincount(ids_TK.flatten(), minlength=num_experts)
    tokens = max(num_tokens, _MIN_TOKENS)
    return num_experts * (probs_TE.sum(0) / tokens * (counts_E / tokens)).sum()


def z_loss(record: RouterRecord) -> Tensor:
    """`mean_t logsumexp(logits_t)^2`, a scalar: keeps logits small. With equal logits of 0 it is `ln(E)^2`."""
    squares_T = record.logits_TE.float().logsumexp(-1).square()
    return squares_T.sum() / max(len(squares_T), _MIN_TOKENS)


def orthogonal_loss(weight_EH: Tensor) -> Tensor:
    """`||W W^T - I||_F^2 / E^2` with the rows of W scaled to length 1, a scalar: 0 where all experts ask for something else.

    With all rows alike it is `1 - 1/E`. The lengths of the rows neither matter nor are pulled at.
    """
    rows_EH = normalize(weight_EH.float(), dim=-1, eps=1e-12)
    identity = torch.eye(len(rows_EH), device=rows_EH.device)
    return (rows_EH @ rows_EH.T - identity).square().mean()


def router_losses(records: Sequence[RouterRecord], config: RouterLossConfig) -> dict[str, Tensor]:
    """Unweighted losses of a pass, by the names under which they are logged: `balance_loss`, `z_loss`, `orthogonal_loss`.

    Each is the sum over routers, text and vision pools alike: in the published code every layer adds its own to the total, so
    a weight means the same in a deep network as in a flat one. Only what has a weight is there. A decoupled orthogonal loss has
    no gradient: it is there to be logged. Balance and z loss are means over the tokens of this pass, so micro-batches of a
    step each count with their share.
    """
    losses = {}
    if records and config.balance:
        losses["balance_loss"] = torch.stack([balance_loss(record) for record in records]).sum()
    if records and config.z:
        losses["z_loss"] = torch.stack([z_loss(record) for record in records]).sum()
    if records and config.orthogonal:
        weights = {id(record.router): record.router.weight for record in records}  # a gate counts once
        with torch.set_grad_enabled(config.orthogonal_mode == "loss" and torch.is_grad_enabled()):
            losses["orthogonal_loss"] = torch.stack([orthogonal_loss(weight) for weight in weights.values()]).sum()
    return losses


def weighted_router_loss(losses: Mapping[str, Tensor], config: RouterLossConfig) -> Tensor:
    """What `router_losses` adds to the total, a scalar: weight times value of each, without a decoupled orthogonal loss."""
    weights = {"balance_loss": config.balance, "z_loss": config.z}
    if config.orthogonal_mode == "loss":
        weights["orthogonal_loss"] = config.orthogonal
    parts = [weights[name] * loss for name, loss in losses.items() if name in weights]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def hidden_addon(x: Tensor) -> Tensor:
    """`x - sg(x)`: x's gradient and the value 0, so that logged losses compare with and without add-ons."""
    return x - x.detach()
