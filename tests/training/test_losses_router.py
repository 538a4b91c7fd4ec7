"""Router losses against hand numbers and loops, and that each option acts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ernie45.config.model import MoeConfig
from ernie45.errors import ConfigError
from ernie45.layers.moe import Router, route
from ernie45.training.losses.router import (
    RouterLossConfig,
    balance_loss,
    hidden_addon,
    orthogonal_loss,
    router_losses,
    weighted_router_loss,
    z_loss,
)
from ernie45.training.network import RouterRecord


def _router(num_experts: int, num_active: int, *, hidden: int = 6, aux_free: bool = False) -> Router:
    router = Router(
        hidden,
        MoeConfig(moe_num_experts=num_experts, moe_k=num_active, moe_intermediate_size=4, moe_use_aux_free=aux_free),
    )
    router.weight.data.normal_(generator=torch.Generator().manual_seed(num_experts))
    return router


def _record(logits: Tensor, num_active: int = 1, bias: Tensor | None = None) -> RouterRecord:
    router = _router(logits.shape[-1], num_active, aux_free=bias is not None)
    if bias is not None:
        router.e_score_correction_bias = bias
    _, ids = route(logits.detach(), bias, num_active, router.norm_min)
    return RouterRecord(router=router, logits_TE=logits, ids_TK=ids)


def test_balance_by_hand() -> None:
    """Three tokens, two experts: me = (0.6, 0.4), ce = (2/3, 1/3), 2 * (0.4 + 0.4/3) = 16/15."""
    probs = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8]])
    torch.testing.assert_close(balance_loss(_record(probs.log())), torch.tensor(16 / 15))


@pytest.mark.parametrize("num_active", [1, 2, 3])
def test_balance_is_k_where_all_experts_serve_alike_and_e_where_the_same_serve_all(num_active: int) -> None:
    experts = torch.arange(6)
    # token t prefers experts t, t+1, .. in turn: every expert is chosen as often, and equally likely on average
    logits = torch.stack([-((experts - token) % 6).float() for token in range(6)])
    torch.testing.assert_close(balance_loss(_record(logits, num_active)), torch.tensor(float(num_active)))
    certain = torch.zeros(6, 6)
    certain[:, :num_active] = 100
    torch.testing.assert_close(balance_loss(_record(certain, num_active)), torch.tensor(6.0))


def test_balance_counts_what_would_be_chosen_without_the_bias() -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    biased = _record(logits, 2, bias=torch.tensor([9.0, 8.0, 0.0, 0.0]))
    assert (biased.ids_TK < 2).all(), "the bias has to decide, or this proves nothing"
    torch.testing.assert_close(balance_loss(biased), balance_loss(_record(logits, 2)))


def test_balance_takes_the_choice_from_the_record_where_there_is_no_bias() -> None:
    logits = torch.zeros(4, 4)
    router = _router(4, 1)
    record = RouterRecord(router=router, logits_TE=logits, ids_TK=torch.arange(4)[:, None])
    torch.testing.assert_close(balance_loss(record), torch.tensor(1.0))


def test_gradient_of_balance_passes_through_probabilities_alone() -> None:
    """That of `E * sum_e me_e * ce_e` with ce held, and finite differences where no choice changes."""
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    (found,) = torch.autograd.grad(balance_loss(_record(logits, 2)), logits)
    probs = logits.softmax(-1)
    counts = torch.zeros(5)
    for token in probs.topk(2).indices:
        counts[token] += 1
    (expected,) = torch.autograd.grad(
        5 * sum((probs[:, e].mean() * counts[e] / 7 for e in range(5)), torch.zeros(())), logits
    )
    torch.testing.assert_close(found, expected)
    nudge = 1e-2 * torch.randn(7, 5, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(
            (logits + nudge).topk(2).indices.sort().values, (logits - nudge).topk(2).indices.sort().values
        )
        change = balance_loss(_record(logits + nudge, 2)) - balance_loss(_record(logits - nudge, 2))
    torch.testing.assert_close(change, 2 * (found * nudge).sum(), atol=1e-5, rtol=1e-2)


def test_z_by_hand() -> None:
    logits = torch.tensor([[math.log(1.0), math.log(2.0)], [math.log(5.0), math.log(4.0)]])
    expected = (math.log(3) ** 2 + math.log(9) ** 2) / 2
    torch.testing.assert_close(z_loss(_record(logits)), torch.tensor(expected))
    torch.testing.assert_close(z_loss(_record(torch.zeros(3, 8))), torch.tensor(math.log(8) ** 2))


def test_orthogonal_by_hand() -> None:
    """Rows (3, 4), (4, 3), (0, 2): cosines 24/25, 4/5, 3/5; each stands twice in the 3 x 3 table."""
    weight = torch.tensor([[3.0, 4.0], [4.0, 3.0], [0.0, 2.0]])
    expected = 2 * ((24 / 25) ** 2 + (4 / 5) ** 2 + (3 / 5) ** 2) / 9
    torch.testing.assert_close(orthogonal_loss(weight), torch.tensor(expected))
    torch.testing.assert_close(orthogonal_loss(7 * torch.eye(4, 6)), torch.tensor(0.0))
    torch.testing.assert_close(orthogonal_loss(torch.ones(5, 3)), torch.tensor(1 - 1 / 5))


def test_a_pool_without_tokens_costs_nothing_and_has_a_gradient() -> None:
    logits = torch.zeros(0, 4, requires_grad=True)
    for loss in (balance_loss(_record(logits)), z_loss(_record(logits))):
        assert loss.item() == 0
        loss.backward()


def _two_records() -> list[RouterRecord]:
    generator = torch.Generator().manual_seed(3)
    records = []
    for num_experts in (4, 6):
        router = _router(num_experts, 2)
        x = torch.randn(9, 6, generator=generator)
        logits = x @ router.weight.T
        records.append(RouterRecord(router=router, logits_TE=logits, ids_TK=logits.topk(2).indices))
    return records


def test_losses_are_sums_over_routers_and_only_what_has_a_weight() -> None:
    records = _two_records()
    config = RouterLossConfig(balance=0.1, z=0.2, orthogonal=0.3)
    losses = router_losses(records, config)
    torch.testing.assert_close(losses["balance_loss"], balance_loss(records[0]) + balance_loss(records[1]))
    torch.testing.assert_close(losses["z_loss"], z_loss(records[0]) + z_loss(records[1]))
    both = orthogonal_loss(records[0].router.weight) + orthogonal_loss(records[1].router.weight)
    torch.testing.assert_close(losses["orthogonal_loss"], both)
    total = 0.1 * losses["balance_loss"] + 0.2 * losses["z_loss"] + 0.3 * losses["orthogonal_loss"]
    torch.testing.assert_close(weighted_router_loss(losses, config), total)
    assert router_losses(records, RouterLossConfig(balance=0)) == {}
    assert list(router_losses(records, RouterLossConfig())) == ["balance_loss"]
    assert weighted_router_loss({}, RouterLossConfig()).item() == 0
    assert router_losses([], config) == {}


def test_a_router_that_ran_twice_is_made_orthogonal_once() -> None:
    record = _two_records()[0]
    config = RouterLossConfig(orthogonal=1.0)
    losses = router_losses([record, record], config)
    torch.testing.assert_close(losses["orthogonal_loss"], orthogonal_loss(record.router.weight))


def test_a_decoupled_orthogonal_loss_is_logged_and_not_learnt() -> None:
    records = _two_records()
    coupled = RouterLossConfig(balance=0, orthogonal=0.5)
    decoupled = RouterLossConfig(balance=0, orthogonal=0.5, orthogonal_mode="decoupled")
    losses = router_losses(records, decoupled)
    assert losses["orthogonal_loss"].item() == router_losses(records, coupled)["orthogonal_loss"].item()
    assert not losses["orthogonal_loss"].requires_grad
    assert weighted_router_loss(losses, decoupled).item() == 0
    weighted_router_loss(router_losses(records, coupled), coupled).backward()
    assert all(record.router.weight.grad is not None for record in records)


def test_a_hidden_addon_moves_weights_and_not_the_value() -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    loss = weight.square()
    total = loss + hidden_addon(5 * weight)
    assert total.item() == loss.item()
    total.backward()
    assert weight.grad is not None
    assert weight.grad.item() == 2 * 3 + 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"balance": -1.0}, "router_loss.balance is -1.0, expected a number from 0"),
        ({"z": math.nan}, "router_loss.z is nan"),
        ({"orthogonal": True}, "router_loss.orthogonal is True"),
        ({"orthogonal_mode": "later"}, "'later', expected one of loss, decoupled"),
    ],
)
def test_a_wrong_configuration_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RouterLossConfig(**fields)
