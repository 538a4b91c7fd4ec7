"""Balance by rule: the bias update by hand, identity of routers, many processes, and that it really balances."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ernie45.config.model import MoeConfig
from ernie45.layers.moe import MoeBlock, Router, route
from ernie45.models.text import CausalLM
from ernie45.training.balance import BiasBalance, DecoupledOrthogonal, ExpertLoad, orthogonal_gradient, routers_of
from ernie45.training.losses.router import orthogonal_loss
from ernie45.training.network import RouterRecord


def _moe(**changes: object) -> MoeConfig:
    fields: dict = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 4, "moe_use_aux_free": True}
    return MoeConfig(**(fields | changes))


def _router(**changes: object) -> Router:
    router = Router(6, _moe(**changes))
    router.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    return router


def _record(router: Router, ids: list[list[int]]) -> RouterRecord:
    return RouterRecord(router=router, logits_TE=torch.zeros(len(ids), len(router.weight)), ids_TK=torch.tensor(ids))


def _bias(router: Router) -> list[float]:
    assert router.e_score_correction_bias is not None
    return router.e_score_correction_bias.tolist()


def test_the_bias_moves_by_hand() -> None:
    """Usage (3, 2, 2, 1) over both micro-batches, mean 2: one down, two stay, one up."""
    router = _router()
    balance = BiasBalance([router], rate=0.25)
    balance.observe([_record(router, [[0, 1], [0, 2]])])
    balance.observe([_record(router, [[0, 1], [2, 3]])])
    balance.step()
    assert _bias(router) == [-0.25, 0, 0, 0.25]


def test_counts_do_not_outlive_a_step() -> None:
    router = _router()
    balance = BiasBalance([router], rate=0.25)
    balance.observe([_record(router, [[0, 1]])])
    balance.step()
    before = _bias(router)
    balance.step()
    assert _bias(router) == before, "nothing was seen, nothing may move"
    balance.observe([_record(router, [[2, 3]])])
    balance.step()
    assert _bias(router) == [0, 0, 0, 0]


def test_at_rate_zero_nothing_moves() -> None:
    router = _router()
    balance = BiasBalance([router], rate=0.0)
    balance.observe([_record(router, [[0, 1]])])
    balance.step()
    assert _bias(router) == [0, 0, 0, 0]


def test_routers_are_known_by_identity() -> None:
    """The first is frozen, the third did not run, records come in another order: everybody's counts reach their owner."""
    frozen, one, idle, other = (_router() for _ in range(4))
    balance = BiasBalance([frozen, one, idle, other], rate=1.0)
    frozen.weight.requires_grad_(False)
    balance.observe([_record(other, [[2, 3]]), _record(frozen, [[0, 3]]), _record(one, [[0, 1]])])
    balance.step()
    assert _bias(frozen) == [0, 0, 0, 0]
    assert _bias(one) == [-1, -1, 1, 1]
    assert _bias(idle) == [0, 0, 0, 0]
    assert _bias(other) == [1, 1, -1, -1]


def test_routers_without_a_bias_and_strangers_are_passed_over() -> None:
    plain, stranger = _router(moe_use_aux_free=False), _router()
    balance = BiasBalance([plain], rate=1.0)
    balance.observe([_record(plain, [[0, 1]]), _record(stranger, [[0, 1]])])
    balance.step()
    assert plain.e_score_correction_bias is None
    assert _bias(stranger) == [0, 0, 0, 0]


def test_text_and_vision_pools_move_each_by_its_own_tokens(small_model: Callable[..., CausalLM]) -> None:
    moe = _moe(moe_vision_intermediate_size=2)
    block = MoeBlock(small_model().config, moe, torch.float32)
    assert block.vision_gate is not None
    assert routers_of(block) == (block.gate, block.vision_gate)
    balance = BiasBalance(routers_of(block), rate=1.0)
    balance.observe([_record(block.gate, [[0, 1]]), _record(block.vision_gate, [[1, 2]])])
    balance.step()
    assert _bias(block.gate) == [-1, -1, 1, 1]
    assert _bias(block.vision_gate) == [1, -1, -1, 1]


def test_routers_of_a_network(small_model: Callable[..., CausalLM]) -> None:
    model = small_model(moe=True)
    assert [id(router) for router in routers_of(model)] == [
        id(module) for name, module in model.named_modules() if name.endswith("mlp.gate")
    ]
    assert len(routers_of(model)) == 2
    assert routers_of(small_model()) == ()
    assert routers_of(nn.Linear(1, 1)) == ()


def test_processes_move_as_one() -> None:
    """Two processes with half of the tokens each, one of which has none for the second router, end where one process does."""
    batches: list[list[list[list[int]] | None]] = [[[[0, 1], [0, 2]], [[0, 1]]], [[[3, 1], [0, 3]], None]]

    def run(members: list[int], others: Tensor | None) -> tuple[Tensor, list[list[float]]]:
        seen: list[Tensor] = []

        def reduce(counts: Tensor) -> Tensor:
            seen.append(counts)
            return counts if others is None else counts + others

        routers = [_router(), _router(moe_num_experts=6)]
        balance = BiasBalance(routers, rate=0.5, reduce=reduce)
        for member in members:
            found = batches[member]
            balance.observe(
                [_record(router, ids) for router, ids in zip(routers, found, strict=True) if ids is not None]
            )
        balance.step()
        assert len(seen) == 1, "one call of the reduction per step, with the same shape everywhere"
        return seen[0], [_bias(router) for router in routers]

    alone, expected = run([0, 1], None)
    second, _ = run([1], None)
    first, found = run([0], second)
    assert found == expected
    assert torch.equal(first + second, alone)
    assert len(alone) == 4 + 6


def test_the_update_balances_a_lopsided_router() -> None:
    """Tokens that all prefer the same experts are spread by the bias alone; the weights of the gate do not move."""
    generator = torch.Generator().manual_seed(0)
    router = _router(moe_num_experts=8)
    logits = torch.randn(512, 8, generator=generator) + torch.linspace(2, 0, 8)
    balance, load = BiasBalance([router], rate=0.01), ExpertLoad([router])
    violations = []
    for _ in range(150):
        _, ids = route(logits, router.e_score_correction_bias, 2, router.norm_min)
        record = RouterRecord(router=router, logits_TE=logits, ids_TK=ids)
        load.observe([record])
        violations.append(load.take()["load_violation/max"])
        balance.observe([record])
        balance.step()
    assert isinstance(violations[0], float)
    assert violations[0] > 1.0
    assert isinstance(violations[-1], float)
    assert violations[-1] < 0.15


def test_usage_is_counted_exactly_beyond_what_float32_can() -> None:
    router = _router()
    balance = BiasBalance([router], rate=1.0, reduce=lambda counts: counts + 2**26)
    balance.observe([_record(router, [[0, 1]])])
    balance.step()
    assert _bias(router) == [-1, -1, 1, 1]


def test_the_closed_form_of_the_orthogonal_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 6), (7, 3), (1, 5)):
        weight = torch.randn(shape, generator=generator, requires_grad=True)
        (expected,) = torch.autograd.grad(orthogonal_loss(weight), weight)
        torch.testing.assert_close(orthogonal_gradient(weight.detach()), expected, atol=1e-6, rtol=1e-4)


def test_a_row_of_zeros_has_no_orthogonal_gradient() -> None:
    weight = torch.tensor([[0.0, 0.0], [3.0, 4.0], [4.0, 3.0]])
    gradient = orthogonal_gradient(weight)
    assert gradient.isfinite().all()
    assert gradient[0].tolist() == [0, 0]


def test_the_decoupled_step_by_hand() -> None:
    """`W - weight * dL/dW`, whatever the gradient of the rest says; frozen gates stay."""
    router, frozen = _router(), _router()
    frozen.weight.requires_grad_(False)
    before = router.weight.detach().clone()
    (gradient,) = torch.autograd.grad(orthogonal_loss(router.weight), router.weight)
    router.weight.grad = torch.full_like(before, 100.0)
    DecoupledOrthogonal([router, frozen], weight=0.5).step()
    torch.testing.assert_close(router.weight.detach(), before - 0.5 * gradient)
    assert torch.equal(frozen.weight, before)
    after = router.weight.detach().clone()
    DecoupledOrthogonal([router], weight=0.0).step()
    assert torch.equal(router.weight, after)


def test_repeated_steps_make_experts_orthogonal() -> None:
    router = _router()
    step = DecoupledOrthogonal([router], weight=0.5)
    first = orthogonal_loss(router.weight).item()
    for _ in range(200):
        step.step()
    assert orthogonal_loss(router.weight).item() < 0.01 * first


def test_load_by_hand() -> None:
    """Usage (3, 2, 2, 1) of 8: the busiest has 3 where the mean is 2. Entropy of equal logits is ln 4, of a certain one 0."""
    router, idle = _router(), _router()
    load = ExpertLoad([router, idle])
    load.observe([_record(router, [[0, 1], [0, 2]])])
    certain = torch.tensor([[1000.0, 0, 0, 0], [0, 0, 0, 0]])
    load.observe([RouterRecord(router=router, logits_TE=certain, ids_TK=torch.tensor([[0, 1], [2, 3]]))])
    found = load.take()
    assert found["expert_load"] == [[3 / 8, 2 / 8, 2 / 8, 1 / 8], [0, 0, 0, 0]]
    assert found["router_entropy"] == pytest.approx([0.75 * math.log(4), 0])
    assert found["load_violation/max"] == pytest.approx(0.5)
    assert found["load_violation/mean"] == pytest.approx(0.5)
    again = load.take()
    assert again["load_violation/max"] == 0
    assert again["expert_load"] == [[0, 0, 0, 0]] * 2


def test_load_of_two_routers_has_the_worst_and_the_mean() -> None:
    one, other = _router(), _router()
    load = ExpertLoad([one, other])
    load.observe([_record(one, [[0, 1], [2, 3]]), _record(other, [[0, 1], [0, 1]])])
    found = load.take()
    assert found["load_violation/max"] == pytest.approx(1.0)
    assert found["load_violation/mean"] == pytest.approx(0.5)


def test_load_of_many_processes_is_summed_and_a_dense_model_has_none() -> None:
    router = _router()
    load = ExpertLoad([router], reduce=lambda row: row + torch.tensor([0, 0, 1, 1, math.log(2), 1]).to(row))
    load.observe([_record(router, [[0, 1]])])
    found = load.take()
    assert found["expert_load"] == [[0.25] * 4]
    assert found["router_entropy"] == pytest.approx([(math.log(4) + math.log(2)) / 2])
    assert ExpertLoad([]).take() == {}
