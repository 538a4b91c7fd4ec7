"""Balance by rule: the correction bias, the decoupled orthogonal step, and what the experts of a step had to do.

All three are told of every pass (`observe`) or of every step (`step`), and none needs a gradient. Routers are known by
identity: a layer that did not run, a frozen gate or a pass in another order shifts nothing to a neighbour.

Shape letters: T tokens, H hidden, E experts, K experts per token. Source: training reference 1.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ernie45.layers.moe import Router
from ernie45.training.network import RouterRecord

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over processes; called once per step, with a tensor of the same shape on each."""


def routers_of(model: nn.Module) -> tuple[Router, ...]:
    """Every router in the order of the model's modules, text pools before vision pools within a layer."""
    return tuple(module for module in model.modules() if isinstance(module, Router))


class RouterTally:
    """A row of numbers for each of some routers, added up over the passes of a step."""

    def __init__(self, routers: Sequence[Router], width: int = 0) -> None:
        """Args: width: numbers per router beyond its experts."""
        self.routers = tuple(routers)  # held, so that no other object can take over an identity
        self._place = {id(router): place for place, router in enumerate(self.routers)}
        self._width = width
        self._rows: dict[int, Tensor] = {}

    def add(self, router: Router, row: Tensor) -> None:
        """Add a row, float64. A router that is not counted is passed over."""
        place = self._place.get(id(router))
        if place is not None:
            self._rows[place] = self._rows[place] + row if place in self._rows else row

    def take(self, reduce: Reduce | None) -> list[Tensor]:
        """Rows of all routers in order, zero where nothing was added, summed over processes; and begin anew."""
        empty = [
            router.weight.new_zeros(len(router.weight) + self._width, dtype=torch.float64) for router in self.routers
        ]
        rows = [self._rows.get(place, row) for place, row in enumerate(empty)]
        self._rows = {}
        if reduce is None or not rows:
            return rows
        return list(reduce(torch.cat(rows)).split([len(row) for row in rows]))


class BiasBalance:
    """Balance without a loss: after every optimizer step `bias += rate * sign(mean usage - usage)`, per router.

    Usage is the number of tokens that an expert served, which is the choice with the bias. Routers without a bias, with a
    frozen gate, and all of them at rate 0 are left alone. The bias is a buffer of the model and saved with it; counts are
    empty between steps, so nothing else has to be saved.
    """

    def __init__(self, routers: Iterable[Router], *, rate: float = 1e-3, reduce: Reduce | None = None) -> None:
        """Args: rate: 1e-3 in the released configurations, 0 in the tuning of vision models. reduce: for many processes."""
        self._rate, self._reduce = rate, reduce
        self._tally = RouterTally([router for router in routers if rate and router.e_score_correction_bias is not None])

    def observe(self, records: Iterable[RouterRecord]) -> None:
        """Count the choices of one micro-batch."""
        for record in records:
            self._tally.add(record.router, _counts(record))

    @torch.no_grad()
    def step(self) -> None:
        """Move every bias and forget the counts. A router that no token went to does not move."""
        for router, usage_E in zip(self._tally.routers, self._tally.take(self._reduce), strict=True):
            bias_E = router.e_score_correction_bias
            assert bias_E is not None, "a router without a bias is not counted"
            if router.weight.requires_grad:
                bias_E.add_((usage_E.mean() - usage_E).sign().to(bias_E), alpha=self._rate)


class DecoupledOrthogonal:
    """The orthogonal loss behind the optimizer: `W <- W - weight * dL/dW`, without learning rate and moments.

    Frozen gates are left alone. Gates are float32 whatever the rest is, so no optimizer keeps a wider copy that would undo the step.
    """

    def __init__(self, routers: Iterable[Router], *, weight: float) -> None:
        self._gates = [router.weight for router in routers]
        self._weight = weight

    @torch.no_grad()
    def step(self) -> None:
        """Move every gate once."""
        for gate_EH in self._gates:
            if gate_EH.requires_grad and self._weight:
                gate_EH.sub_(orthogonal_gradient(gate_EH).to(gate_EH.dtype), alpha=self._weight)


def orthogonal_gradient(weight_EH: Tensor) -> Tensor:
    """Gradient of `losses.router.orthogonal_loss`, float32 (E, H), in closed form.

    With rows w of length 1, `G = 4/E^2 (W W^T - I) W` is the gradient by those; scaling takes the part along w away and
    divides by the length that the row had.
    """
    lengths_E1 = weight_EH.float().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    rows_EH = normalize(weight_EH.float(), dim=-1, eps=1e-12)
    identity = torch.eye(len(rows_EH), device=rows_EH.device)
    by_rows_EH = 4 / len(rows_EH) ** 2 * (rows_EH @ rows_EH.T - identity) @ rows_EH
    along_E1 = (rows_EH * by_rows_EH).sum(-1, keepdim=True)
    return (by_rows_EH - along_E1 * rows_EH) / lengths_E1


class ExpertLoad:
    """What the experts of a step had to do, as plain numbers for the log."""

    def __init__(self, routers: Sequence[Router], *, reduce: Reduce | None = None) -> None:
        self._tally, self._reduce = RouterTally(routers, width=2), reduce

    @torch.no_grad()
    def observe(self, records: Iterable[RouterRecord]) -> None:
        """Add one micro-batch: counts per expert, the sum of the entropies (nats), tokens."""
        for record in records:
            log_probs_TE = record.logits_TE.float().log_softmax(-1)
            entropy = -(log_probs_TE.exp() * log_probs_TE).sum(dtype=torch.float64)
            tokens = torch.full_like(entropy, len(log_probs_TE))
            self._tally.add(record.router, torch.cat((_counts(record), torch.stack((entropy, tokens)))))

    def take(self) -> dict[str, list[float] | list[list[float]] | float]:
        """Figures of the step, and begin anew. Empty without routers.

        `expert_load`: per router, each expert's share of the choices (sums to 1, or zeros where no token went).
        `router_entropy`: per router, mean entropy of the probabilities, nats, 0 to ln(E).
        `load_violation/max`, `load_violation/mean`: of a router, the busiest expert's load over the mean load, minus 1: 0 at
        perfect balance; the worst router and the mean of all that had tokens.
        """
        rows = self._tally.take(self._reduce)
        if not rows:
            return {}
        shares = [row[:-2] / row[:-2].sum().clamp(min=1) for row in rows]
        used = [share for share in shares if share.any()]
        violations = [float(share.max()) * len(share) - 1 for share in used] or [0.0]
        return {
            "expert_load": [share.tolist() for share in shares],
            "router_entropy": [float(row[-2] / row[-1].clamp(min=1)) for row in rows],
            "load_violation/max": max(violations),
            "load_violation/mean": sum(violations) / len(violations),
        }


def _counts(record: RouterRecord) -> Tensor:
    """Choices of each expert, float64 (E,): exact up to 2^53, where float32 ends at 2^24."""
    return torch.bincount(record.ids_TK.flatten(), minlength=record.logits_TE.shape[-1]).double()
