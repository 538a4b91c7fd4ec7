"""AdamW against torch's own, bit for bit where everything is float32 and within the stated errors where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ernie45.training.optim import Optimizer, OptimizerConfig, adamw, build_optimizer

SHAPES = {"layers.0.a.weight": (33, 17), "layers.0.norm.weight": (33,), "layers.1.experts.up_gate_proj": (3, 10, 7)}


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def gradient_of(parameter: Tensor, seed: int) -> Tensor:
    return torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)).to(parameter.dtype)


def torch_adamw(params: dict[str, nn.Parameter], fused: bool, **settings: Any) -> torch.optim.AdamW:
    groups = [
        {"params": [params[name]], "weight_decay": 0.0 if "norm" in name else settings["weight_decay"]}
        for name in params
    ]
    return torch.optim.AdamW(groups, **settings, fused=fused)


def run(params: dict[str, nn.Parameter], optimizer: Optimizer | torch.optim.AdamW, steps: int) -> None:
    for step in range(steps):
        for index, parameter in enumerate(params.values()):
            grad = gradient_of(parameter, 100 * step + index)
            (parameter * grad).sum().backward()  # through autograd, so that hooks see it
        if isinstance(optimizer, Optimizer):
            optimizer.step(1e-2 / (1 + step))
        else:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step)
            optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("fused", "tolerance"), [(True, 0.0), (False, 1e-7)])
def test_same_as_torch(fused: bool, tolerance: float) -> None:
    mine, theirs = parameters(), parameters()
    config = OptimizerConfig(betas=(0.8, 0.97), eps=1e-6, weight_decay=0.3, clip=None)
    run(mine, build_optimizer(mine.items(), config, num_layers=2), 20)
    run(theirs, torch_adamw(theirs, fused, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.3), 20)
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=tolerance * 10, atol=tolerance)


@pytest.mark.parametrize(
    "changes",
    [{"betas": (0.5, 0.95)}, {"betas": (0.9, 0.5)}, {"eps": 1e-2}, {"weight_decay": 0.0}, {"clip": 0.01}],
)
def test_every_setting_changes_something(changes: dict[str, Any]) -> None:
    one, other = parameters(), parameters()
    run(one, build_optimizer(one.items(), OptimizerConfig(), num_layers=2), 3)
    run(other, build_optimizer(other.items(), OptimizerConfig(**changes), num_layers=2), 3)
    name = "layers.0.a.weight"
    assert (one[name] - other[name]).abs().max() > 1e-4


def test_a_rate_is_the_steps_times_the_parameters_own() -> None:
    """The first step of Adam has the size of its rate."""
    params = {
        name: nn.Parameter(torch.zeros(2, 2)) for name in ("layers.0.mlp.gate.weight", "layers.0.mlp.down_proj.weight")
    }
    optimizer = build_optimizer(params.items(), OptimizerConfig(gate_lr_ratio=0.01), num_layers=1)
    for parameter in params.values():
        parameter.grad = torch.ones(2, 2)
    optimizer.step(0.5)
    assert params["layers.0.mlp.gate.weight"][0, 0].item() == pytest.approx(-0.005)
    assert params["layers.0.mlp.down_proj.weight"][0, 0].item() == pytest.approx(-0.5)


def test_a_parameter_without_gradient_stays_and_does_not_age() -> None:
    params = parameters()
    names = list(params)
    optimizer = build_optimizer(params.items(), OptimizerConfig(), num_layers=2)
    before = params[names[1]].detach().clone()
    params[names[0]].grad = torch.ones_like(params[names[0]])
    optimizer.step(0.1)
    assert torch.equal(params[names[1]], before)
    state = optimizer.state_tensors()
    assert [state[f"{name}.updates"].item() for name in names] == [1, 0, 0]


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_narrow_moments_stay_near_float32(state_dtype: Any) -> None:
    """Descent of a quadratic in 40 steps: same direction, and the same distance travelled within 5 %."""
    ends = {}
    for dtype in ("float32", state_dtype):
        weight = nn.Parameter(torch.zeros(64, 64))
        target = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
        config = OptimizerConfig(weight_decay=0.0, state_dtype=dtype, clip=None)
        optimizer = build_optimizer([("w", weight)], config, num_layers=1)
        for _ in range(40):
            weight.grad = (weight - target).detach()
            optimizer.step(0.02)
        ends[dtype] = weight.detach().flatten()
    wide, narrow = ends["float32"], ends[state_dtype]
    assert not torch.equal(wide, narrow)
    assert torch.cosine_similarity(wide, narrow, dim=0) > 0.995
    assert narrow.norm().item() == pytest.approx(wide.norm().item(), rel=0.05)


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers are drawn in another order, so the comparison is in bfloat16 numbers that need none: powers of two."""
    ends = []
    for piece in (1 << 20, 256):
        monkeypatch.setattr(adamw, "PIECE", piece)
        weight = nn.Parameter(torch.zeros(1000))
        optimizer = build_optimizer(
            [("w", weight)], OptimizerConfig(betas=(0.5, 0.5), state_dtype="bfloat16", clip=None), num_layers=1
        )
        for _ in range(3):
            weight.grad = torch.ones(1000)
            optimizer.step(0.25)
        ends.append(weight.detach().clone())
        assert optimizer.state_tensors()["w.updates"].item() == 3
    assert torch.equal(*ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_allocates_nothing_of_the_size_of_the_model(dtype: torch.dtype) -> None:
    """Peak of torch's own allocations during a step, from its profiler: below a tenth of the parameters."""
    params = {f"layers.{i}.w": nn.Parameter(torch.zeros(512, 512, dtype=dtype)) for i in range(12)}
    optimizer = build_optimizer(params.items(), OptimizerConfig(), num_layers=12)
    for parameter in params.values():
        (parameter * 2).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step(1e-3)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert allocated < 0.1 * 12 * 512 * 512 * 4
