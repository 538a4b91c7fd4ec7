"""Recomputation: the same bits, less memory for every operation that can be named, and a budget that is kept and used."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ernie45.config.model import MoeConfig
from ernie45.errors import CapacityError, ConfigError
from ernie45.models.text import CausalLM
from ernie45.training.batch import Batch, Document
from ernie45.training.head import lm_loss_sum
from ernie45.training.memory import LiveMemory
from ernie45.training.network import TrainingNetwork
from ernie45.training.recompute import OPERATIONS, Cost, RecomputeConfig, choices, choose

NONE = RecomputeConfig()
POLICIES = [
    RecomputeConfig(policy="full"),
    *(RecomputeConfig(policy="selective", selective=(name,)) for name in OPERATIONS),
    RecomputeConfig(policy="selective", selective=("norm", "attention")),
    RecomputeConfig(policy="selective", selective=("norm", "experts", "mlp")),
    RecomputeConfig(policy="selective", selective=("norm", "attention", "experts", "mlp")),
]


def _name(config: RecomputeConfig) -> str:
    return "+".join(config.selective) or config.policy


def _batch(lengths: tuple[int, ...] = (20, 7, 20), num_mtp: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(0)
    documents = [
        Document(ids=torch.randint(101, (n + 2,), generator=generator), learnt=torch.arange(n + 2) > 0, num_unread=2)
        for n in lengths
    ]
    return Batch.of_rows([documents], num_mtp=num_mtp)


def _loss(net: TrainingNetwork, batch: Batch) -> Tensor:
    """Everything that a pass gives takes part: head, prediction block, routers."""
    found = net.run(batch, num_mtp=1)
    loss = lm_loss_sum(net, found.hidden_TH, batch.labels_DT[0]) / batch.num_learnt
    loss = loss + 0.3 * lm_loss_sum(net, found.mtp_TH[0], batch.labels_DT[1], mtp=True)
    return loss + 1e-3 * sum(record.logits_TE.logsumexp(-1).square().mean() for record in found.routers)


def _gradients(model: CausalLM, config: RecomputeConfig) -> tuple[Tensor, dict[str, Tensor]]:
    net, batch = TrainingNetwork(model, recompute=config), _batch()
    torch.manual_seed(5)
    loss = _loss(net, batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _kept(net: TrainingNetwork, batch: Batch) -> int:
    with torch.no_grad():
        net.run(batch)  # which rows form which document is found once and kept
    with LiveMemory() as memory:
        found = net.run(batch, num_mtp=1)
        size = sum(memory.live_bytes().values())
    del found
    return size


@pytest.mark.parametrize("config", POLICIES, ids=_name)
def test_gradients_have_the_same_bits(small_model: Callable[..., CausalLM], config: RecomputeConfig) -> None:
    expected_loss, expected = _gradients(small_model(moe=True, mtp=1), NONE)
    loss, gradients = _gradients(small_model(moe=True, mtp=1), config)
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("config", POLICIES, ids=_name)
def test_random_numbers_are_drawn_again(small_model: Callable[..., CausalLM], config: RecomputeConfig) -> None:
    """A leaf that drops values, as an adapter may, drops the same ones."""

    def model() -> CausalLM:
        built = small_model(moe=True, mtp=1).train()
        for layer in (*built.model.layers, *built.model.mtp_block):
            layer.self_attn.core = _Dropping(layer.self_attn.qkv_proj.out_features, 96)
        return built

    expected_loss, expected = _gradients(model(), NONE)
    loss, gradients = _gradients(model(), config)
    assert torch.equal(loss, expected_loss)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name


class _Dropping(nn.Module):
    """Takes the place of the attention core: drops some of the queries and gives them out."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.width_in, self.width_out = width_in, width_out

    def forward(self, qkv_TX: Tensor, rotation: Tensor, view: Any) -> Tensor:
        assert qkv_TX.shape[1] == self.width_in
        return nn.functional.dropout(qkv_TX, 0.5)[:, : self.width_out].tanh()


def test_every_operation_keeps_less(small_model: Callable[..., CausalLM]) -> None:
    batch = _batch()
    kept = {
        _name(config): _kept(TrainingNetwork(small_model(moe=True, mtp=1), recompute=config), batch)
        for config in (NONE, *POLICIES)
    }
    tokens, hidden = batch.num_tokens, 48
    layers = 4
    assert kept["none"] - kept["norm"] == 4 * tokens * hidden * 2 * layers
    assert kept["none"] - kept["experts"] == 4 * tokens * 3 * 2 * 24 * 2, "3 of 8 experts of width 24 in 2 layers"
    assert kept["none"] - kept["mlp"] == 4 * tokens * 2 * (48 * 2 + 80 * 2), "shared 48 in 2 layers, dense 80 in 2"
    projection = (6 + 2 * 2) * 16
    attended = 6 * 16
    saved = 4 * tokens * (hidden + projection + attended) * layers
    assert kept["none"] - kept["attention"] >= saved
    assert kept["norm+attention"] < min(kept["norm"], kept["attention"])
    assert kept["full"] == kept["layer"] < kept["norm+attention+experts+mlp"] < kept["norm+attention"]


def test_recomputation_leaves_evaluation_alone(small_model: Callable[..., CausalLM]) -> None:
    net, batch = TrainingNetwork(small_model(moe=True, mtp=1), recompute=RecomputeConfig(policy="full")), _batch()
    with torch.no_grad():
        found = net.run(batch, num_mtp=1)
    assert not found.hidden_TH.requires_grad


def _cost(names: str, kept: int, ms: float) -> Cost:
    return Cost(operations=frozenset(names.split()), kept_bytes=kept, extra_ms=ms)


def test_choices_of_a_layer_by_hand() -> None:
    """The first norm is part of both `norm` and `attention`; experts save on top of whatever else is chosen."""
    kept = {"": 100, "norm": 90, "attention": 60, "norm+attention": 55, "experts": 70, "mlp": 100, "layer": 5}
    times = {"norm1": 1.0, "norm2": 2.0, "attention": 10.0, "experts": 7.0, "mlp": 0.0, "layer": 30.0}
    found = {
        "+".join(sorted(c.operations)): (c.kept_bytes, c.extra_ms)
        for c in choices(kept, times, ("norm", "attention", "experts"))
    }
    assert found == {
        "": (100, 0.0),
        "norm": (90, 3.0),
        "attention": (60, 11.0),
        "experts": (70, 7.0),
        "attention+norm": (55, 13.0),
        "experts+norm": (60, 10.0),
        "attention+experts": (30, 18.0),
        "attention+experts+norm": (25, 20.0),
        "layer": (5, 30.0),
    }


def test_the_cheapest_bytes_go_first() -> None:
    layer = [_cost("", 100, 0.0), _cost("norm", 80, 1.0), _cost("attention", 50, 10.0), _cost("layer", 10, 40.0)]
    assert [c.operations for c in choose([layer, layer], 20, 220)] == [frozenset(), frozenset()]
    assert sorted(c.extra_ms for c in choose([layer, layer], 20, 200)) == [0.0, 1.0]
    assert [c.extra_ms for c in choose([layer, layer], 20, 180)] == [1.0, 1.0]
    assert sorted(c.extra_ms for c in choose([layer, layer], 20, 150)) == [1.0, 10.0]
    assert [c.extra_ms for c in choose([layer, layer], 20, 40)] == [40.0, 40.0]
    with pytest.raises(CapacityError, match="at least 40 bytes.*the budget is 39"):
        choose([layer, layer], 20, 39)


def test_choices_are_near_the_best_of_all() -> None:
    """Against all combinations, on random layers: never over the budget, and at most one step of one layer worse."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        layers = []
        for _ in range(3):
            saved, ms = torch.rand(2, 4, generator=generator).tolist()
            layers.append(
                [_cost("", 1000, 0.0), *(_cost("norm", int(1000 * (1 - s)), t) for s, t in zip(saved, ms, strict=True))]
            )
        totals = [
            (sum(c.kept_bytes for c in combo), sum(c.extra_ms for c in combo)) for combo in itertools.product(*layers)
        ]
        budget = int(min(size for size, _ in totals) + 0.4 * (3000 - min(size for size, _ in totals)))
        chosen = choose(layers, 0, budget)
        best = min(ms for size, ms in totals if size <= budget)
        assert sum(c.kept_bytes for c in chosen) <= budget
        assert sum(c.extra_ms for c in chosen) <= best + max(c.extra_ms for layer in layers for c in layer)


def _deep(small_model: Callable[..., CausalLM]) -> CausalLM:
    experts = MoeConfig(
        moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_num_shared_experts=1, moe_layer_start_index=1
    )
    return small_model(num_hidden_layers=12, num_nextn_predict_layers=1, moe=experts)


def test_auto_keeps_a_budget_and_uses_it(small_model: Callable[..., CausalLM]) -> None:
    """Within 5 % below, wherever between the two ends the budget lies; gradients as without."""
    batch = _batch((40, 11, 40))
    most = _kept(TrainingNetwork(_deep(small_model)), batch)
    least = _kept(TrainingNetwork(_deep(small_model), recompute=RecomputeConfig(policy="full")), batch)
    model = _deep(small_model)
    _loss(TrainingNetwork(model), batch).backward()
    for share in (0.1, 0.5, 0.9):
        budget = int(least + share * (most - least))
        net = TrainingNetwork(_deep(small_model), recompute=RecomputeConfig(policy="auto", budget_bytes=budget))
        _loss(net, batch).backward()
        assert net.plan is not None
        assert 0.95 * budget <= net.plan.kept_bytes <= budget
        assert net.plan.kept_bytes == _kept(net, batch)
        assert net.plan.kept_without_bytes == most
        assert len(net.plan.operations) == 13
        for (name, one), other in zip(net.model.named_parameters(), model.parameters(), strict=True):
            if one.grad is None or other.grad is None:
                assert one.grad is other.grad, name
            else:
                assert torch.equal(one.grad, other.grad), name


def test_auto_computes_nothing_again_where_all_fits(small_model: Callable[..., CausalLM]) -> None:
    net = TrainingNetwork(small_model(moe=True, mtp=1), recompute=RecomputeConfig(policy="auto", budget_bytes=1 << 30))
    batch = _batch()
    with torch.no_grad():
        net.run(batch)
    assert net.plan is None, "a pass without gradients keeps nothing to measure"
    net.run(batch)
    assert net.plan is not None
    assert set(net.plan.operations) == {frozenset()}
    assert net.plan.extra_ms == 0.0


def test_a_budget_that_cannot_be_kept_is_refused(small_model: Callable[..., CausalLM]) -> None:
    net = TrainingNetwork(small_model(moe=True), recompute=RecomputeConfig(policy="auto", budget_bytes=1000))
    with pytest.raises(CapacityError, match="the budget is 1000"):
        net.run(_batch(num_mtp=0))


def test_operations_that_a_network_has_not_are_refused(small_model: Callable[..., CausalLM]) -> None:
    with pytest.raises(ConfigError, match="'experts' is in no layer"):
        TrainingNetwork(small_model(), recompute=RecomputeConfig(policy="selective", selective=("experts",)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "some"}, "policy is 'some'"),
        ({"policy": "selective"}, "name some with policy 'selective'"),
        ({"selective": ("norm",)}, "none with any other"),
        ({"policy": "selective", "selective": ("norms",)}, "'norms' is unknown"),
        ({"policy": "auto"}, "give a budget"),
        ({"policy": "full", "budget_bytes": 10}, "give a budget"),
        ({"policy": "auto", "budget_bytes": 0}, "budget_bytes is 0"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RecomputeConfig(**fields)


@pytest.mark.parametrize("config", [NONE, *POLICIES], ids=_name)
def test_a_pass_that_nobody_holds_is_freed_at_once(
    small_model: Callable[..., CausalLM], config: RecomputeConfig
) -> None:
    """Without waiting for the garbage collector: a graph that holds itself would fill the memory."""
    net, batch = TrainingNetwork(small_model(moe=True, mtp=1), recompute=config), _batch()
    net.run(batch, num_mtp=1)
    gc.collect()
    gc.disable()
    try:
        with LiveMemory() as memory:
            found = net.run(batch, num_mtp=1)
            del found
            assert sum(memory.live_bytes().values()) == 0
    finally:
        gc.enable()
