"""The optimizer as the loop uses it: masters, float32 sums of gradients, clipping, state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernie45.errors import CheckpointError, ConfigError, TrainingError
from ernie45.models.text import CausalLM
from ernie45.training.optim import Optimizer, OptimizerConfig, build_optimizer
from ernie45.training.optim.gradients import add_main_gradient

QKV_ROWS = (96, 32, 32)


def tokens(seed: int, rows: int = 2) -> Tensor:
    return torch.randint(0, 101, (rows, 12), generator=torch.Generator().manual_seed(seed))


def loss_of(model: CausalLM, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())


def train(model: CausalLM, optimizer: Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(model, tokens(step))
        loss.backward()
        optimizer.step(3e-3)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_going_on_gives_the_same_bits(
    small_model: Callable[..., CausalLM], name: Any, state_dtype: Any, dtype: torch.dtype
) -> None:
    config = OptimizerConfig(name=name, state_dtype=state_dtype)

    def fresh() -> tuple[CausalLM, Optimizer]:
        model = small_model(moe=True, dtype=dtype).train()
        return model, build_optimizer(model.named_parameters(), config, num_layers=3, qkv_rows=QKV_ROWS)

    whole, optimizer = fresh()
    expected = train(whole, optimizer, range(5))

    first, optimizer = fresh()
    losses = train(first, optimizer, range(3))
    weights = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    state = {key: tensor.clone() for key, tensor in optimizer.state_tensors().items()}

    second, optimizer = fresh()
    second.load_state_dict(weights)
    optimizer.load_state_tensors(state)
    losses += train(second, optimizer, range(3, 5))
    assert losses == expected
    assert all(torch.equal(tensor, whole.state_dict()[key]) for key, tensor in second.state_dict().items())


def test_masters_hold_what_bfloat16_cannot() -> None:
    """A thousand updates of 1e-5 at a weight of 1: lost one by one in bfloat16, 0.01 in the master."""
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = build_optimizer([("w", weight)], OptimizerConfig(clip=None), num_layers=1)
    for _ in range(1000):
        (weight * 1.0).sum().backward()
        optimizer.step(1e-5)
        optimizer.zero_grad()
    assert optimizer.masters["w"].dtype == torch.float32
    torch.testing.assert_close(optimizer.masters["w"], torch.full((8,), 0.99), rtol=0, atol=1e-4)
    assert torch.equal(weight, optimizer.masters["w"].bfloat16())


def test_without_masters_updates_survive_in_the_mean() -> None:
    weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    config = OptimizerConfig(clip=None, weight_decay=0.0, master_weights=False)
    optimizer = build_optimizer([("w", weight)], config, num_layers=1)
    for _ in range(200):
        (weight * 1.0).sum().backward()
        optimizer.step(1e-4)
        optimizer.zero_grad()
    assert not [name for name in optimizer.state_tensors() if name.endswith("master")]
    assert weight.float().mean().item() == pytest.approx(0.98, abs=0.002)
    with pytest.raises(ConfigError, match="only float32 and bfloat16"):
        build_optimizer([("w", nn.Parameter(torch.ones(2).half()))], config, num_layers=1)


def test_gradients_add_up_in_float32() -> None:
    """1 + 256 x 1/256: bfloat16 drops every summand."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = build_optimizer([("w", weight)], OptimizerConfig(clip=None), num_layers=1)
    for share in [1.0] + [1 / 256] * 256:
        (weight * share).sum().backward()
        assert weight.grad is None
    assert torch.equal(optimizer.gradients()["w"], torch.full((3,), 2.0))
    assert add_main_gradient(weight, torch.full((3,), 0.1))
    torch.testing.assert_close(optimizer.gradients()["w"], torch.full((3,), 2.1))
    optimizer.zero_grad()
    assert optimizer.gradients() == {}


def test_a_closed_optimizer_leaves_the_parameters_as_they_were() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    build_optimizer([("w", weight)], OptimizerConfig(), num_layers=1).close()
    (weight * 1.0).sum().backward()
    assert weight.grad is not None
    assert not add_main_gradient(weight, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_against_torch(small_model: Callable[..., CausalLM], dtype: torch.dtype) -> None:
    """The embedding is the head as well: its gradient counts once."""
    mine, theirs = (small_model(moe=True, dtype=dtype).train() for _ in range(2))
    optimizer = build_optimizer(mine.named_parameters(), OptimizerConfig(clip=0.25), num_layers=3)
    for model in (mine, theirs):
        loss_of(model, tokens(0)).backward()
    theirs_float = {name: p.grad.float() for name, p in theirs.named_parameters() if p.grad is not None}
    stand_ins = [nn.Parameter(torch.zeros_like(grad)) for grad in theirs_float.values()]
    for stand_in, grad in zip(stand_ins, theirs_float.values(), strict=True):
        stand_in.grad = grad
    expected = nn.utils.clip_grad_norm_(stand_ins, 0.25).item()
    assert optimizer.clip() == pytest.approx(expected, rel=1e-6)
    assert expected > 0.25
    assert optimizer.clip() == pytest.approx(expected, rel=1e-6)  # again, without another scaling
    found = optimizer.gradients()
    assert found.keys() == theirs_float.keys()
    for name, stand_in in zip(theirs_float, stand_ins, strict=True):
        torch.testing.assert_close(found[name], stand_in.grad)


def test_small_gradients_and_no_limit_are_left_alone() -> None:
    for clip in (None, 100.0):
        weight = nn.Parameter(torch.zeros(2))
        weight.grad = torch.tensor([3.0, 4.0])
        optimizer = build_optimizer([("w", weight)], OptimizerConfig(clip=clip), num_layers=1)
        assert optimizer.clip() == 5.0
        assert weight.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_moves_when_a_gradient_is_not_finite(bad: float) -> None:
    params = {name: nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for name in "ab"}
    optimizer = build_optimizer(params.items(), OptimizerConfig(), num_layers=1)
    before = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    (params["a"] * torch.tensor([1.0, bad, 1.0]) + params["b"]).sum().backward()
    assert not math.isfinite(optimizer.clip())
    assert optimizer.gradients()["b"].tolist() == [1, 1, 1]
    with pytest.raises(TrainingError, match="nothing was moved"):
        optimizer.step(0.1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.state_tensors().items())
    assert all(torch.equal(parameter, torch.ones(3).bfloat16()) for parameter in params.values())
    optimizer.zero_grad()
    params["b"].sum().backward()
    optimizer.step(0.1)  # and goes on when it is forgotten
    assert not torch.equal(params["b"], torch.ones(3).bfloat16())


def test_a_step_clips_by_itself() -> None:
    """With Adam's state empty the first step hides the gradient's size; the moment shows it."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = build_optimizer([("w", weight)], OptimizerConfig(clip=1.0, betas=(0.5, 0.5)), num_layers=1)
    weight.grad = torch.tensor([10.0])
    optimizer.step(0.1)
    assert optimizer.state_tensors()["w.exp_avg"].item() == pytest.approx(0.5, rel=1e-5)


def test_frozen_parameters_are_left_out() -> None:
    """As with an adapter: the base wants no gradient."""
    base, factor = nn.Parameter(torch.ones(2, 2), requires_grad=False), nn.Parameter(torch.ones(2, 2))
    named = [("layers.0.q.weight", base), ("layers.0.q.lora_B", factor)]
    optimizer = build_optimizer(named, OptimizerConfig(lora_plus_scale=2.0), num_layers=1)
    assert optimizer.masters.keys() == {"layers.0.q.lora_B"}
    factor.grad = torch.ones(2, 2)
    optimizer.step(0.1)
    assert factor[0, 0].item() == pytest.approx(1 - 0.2 * 0.1 - 0.2)
    with pytest.raises(ConfigError, match="nothing to optimize"):
        build_optimizer(named[:1], OptimizerConfig(), num_layers=1)


def test_a_parameter_twice_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigError, match="given twice"):
        build_optimizer([("a", weight), ("b", weight)], OptimizerConfig(), num_layers=1)


def test_states_of_others_are_refused() -> None:
    def optimizer(size: int, **fields: Any) -> Optimizer:
        return build_optimizer([("w", nn.Parameter(torch.ones(size)))], OptimizerConfig(**fields), num_layers=1)

    mine = optimizer(4)
    with pytest.raises(CheckpointError, match="has 2 unknown ones"):
        mine.load_state_tensors(optimizer(4, state_dtype="int8").state_tensors())
    with pytest.raises(CheckpointError, match=r"expected torch.float32 \(4,\)"):
        mine.load_state_tensors(optimizer(3).state_tensors())
    with pytest.raises(CheckpointError, match=r"w.exp_avg is torch.bfloat16"):
        mine.load_state_tensors(optimizer(4, state_dtype="bfloat16").state_tensors())
    with pytest.raises(CheckpointError, match="lacks 3 tensors"):
        mine.load_state_tensors({})


def test_bytes_of_the_state() -> None:
    """Per parameter: 8 with float32 moments, 4 with bfloat16, 2 and a scale per 256 with int8."""
    sizes = {}
    for state_dtype in ("float32", "bfloat16", "int8"):
        weight = nn.Parameter(torch.zeros(256 * 100))
        optimizer = build_optimizer([("w", weight)], OptimizerConfig(state_dtype=state_dtype), num_layers=1)
        state = optimizer.state_tensors()
        sizes[state_dtype] = sum(tensor.nbytes for name, tensor in state.items() if not name.endswith("updates"))
    assert sizes == {"float32": 8 * 25600, "bfloat16": 4 * 25600, "int8": 2 * 25600 + 2 * 4 * 100}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "sgd"}, "expected one of adamw, muon"),
        ({"state_dtype": "int4"}, "expected one of float32, bfloat16, int8"),
        ({"betas": (0.9, 1.0)}, "expected 0 to below 1 each"),
        ({"lr": 0.0}, "lr is 0.0, expected above 0"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"layerwise_lr_decay_bound": 1.5}, "expected above 0 up to 1"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**fields)


def test_muons_settings_without_muon_are_refused() -> None:
    from ernie45.training.optim import MuonConfig

    with pytest.raises(ConfigError, match="set name to 'muon'"):
        OptimizerConfig(muon=MuonConfig(steps=3))
    with pytest.raises(ConfigError, match="steps are 0"):
        MuonConfig(steps=0)
    with pytest.raises(ConfigError, match="momentum is 1"):
        MuonConfig(momentum=1)
    with pytest.raises(ConfigError, match="expected one of match_rms_adamw, original"):
        MuonConfig(scale="other")  # type: ignore[arg-type]
