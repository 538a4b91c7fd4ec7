"""Muon against a plain second implementation in float64, against torch's, and against what orthogonal means."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ernie45.training.optim import MuonConfig, OptimizerConfig, build_optimizer, muon
from ernie45.training.optim.muon import orthogonal, update_scale

QKV = "layers.0.self_attn.qkv_proj.weight"
UP_GATE = "layers.0.mlp.experts.up_gate_proj"
DOWN = "layers.0.mlp.down_proj.weight"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """By singular values: an odd polynomial of a matrix acts on each of them alone."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / matrix.double().norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", [(3, 20, 30), (2, 30, 20), (1, 16, 16), (4, 1, 9)])
@pytest.mark.parametrize("steps", [1, 5])
def test_iteration_against_singular_values(shape: tuple[int, int, int], steps: int) -> None:
    x = drawn(*shape)
    expected = torch.stack([plain_orthogonal(matrix, steps) for matrix in x])
    torch.testing.assert_close(orthogonal(x, steps=steps).double(), expected, rtol=0, atol=2e-5)


def test_five_steps_make_singular_values_of_about_one() -> None:
    values = torch.linalg.svdvals(orthogonal(drawn(3, 64, 128), steps=5))
    assert 0.65 < values.min() < values.max() < 1.25
    assert torch.equal(orthogonal(torch.zeros(1, 4, 6), steps=5), torch.zeros(1, 4, 6))


class PlainMuon:
    """One matrix at a time, float64, by the formulas of the module's head."""

    def __init__(self, weight: Tensor, config: OptimizerConfig) -> None:
        self.weight, self.momentum, self.config = weight.double().clone(), torch.zeros_like(weight).double(), config

    def step(self, gradient: Tensor, lr: float) -> None:
        settings = self.config.muon
        mu, g = settings.momentum, gradient.double()
        self.momentum = mu * self.momentum + (1 - mu) * g
        ahead = mu * self.momentum + (1 - mu) * g if settings.nesterov else self.momentum
        rows, columns = self.weight.shape
        size = 0.2 * math.sqrt(max(rows, columns))
        if settings.scale == "original":
            size = math.sqrt(max(1, rows / columns))
        self.weight *= 1 - lr * self.config.weight_decay
        self.weight -= lr * size * plain_orthogonal(ahead, settings.steps)


def split(name: str, tensor: Tensor, config: MuonConfig) -> list[Tensor]:
    """The matrices of a fused parameter, by hand."""
    if name == QKV:
        return [tensor[:8], tensor[8:12], tensor[12:]] if config.split_qkv else [tensor]
    if name == UP_GATE:
        halves = [half for expert in tensor for half in (expert[:10], expert[10:])]
        return halves if config.split_up_gate else list(tensor)
    return [tensor]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nesterov": False},
        {"momentum": 0.5},
        {"steps": 3},
        {"scale": "original"},
        {"split_qkv": False},
        {"split_up_gate": False},
    ],
)
def test_against_the_plain_form(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "BATCH_VALUES", 300)  # several batches of experts
    shapes = {QKV: (16, 12), UP_GATE: (5, 20, 12), DOWN: (12, 30)}
    params = {name: nn.Parameter(drawn(*shape)) for name, shape in shapes.items()}
    config = OptimizerConfig(name="muon", muon=MuonConfig(**settings), clip=None)
    optimizer = build_optimizer(params.items(), config, num_layers=1, qkv_rows=(8, 4, 4))
    plain = {
        name: [PlainMuon(part, config) for part in split(name, parameter.detach(), config.muon)]
        for name, parameter in params.items()
    }
    for step in range(4):
        for index, (name, parameter) in enumerate(params.items()):
            parameter.grad = drawn(*parameter.shape, seed=10 * step + index)
            for one, gradient in zip(plain[name], split(name, parameter.grad, config.muon), strict=True):
                one.step(gradient, 0.02 * (step + 1))
        optimizer.step(0.02 * (step + 1))
    for name, parameter in params.items():
        for found, one in zip(split(name, parameter.detach(), config.muon), plain[name], strict=True):
            torch.testing.assert_close(found.double(), one.weight, rtol=0, atol=2e-5)
    # and the setting is no decoration: with it the weights are others than without
    if settings:
        name = UP_GATE if "split_up_gate" in settings else QKV
        usual = PlainMuon(split(name, drawn(*shapes[name]), MuonConfig())[0], OptimizerConfig(name="muon"))
        for step in range(4):
            whole = drawn(*shapes[name], seed=10 * step + list(params).index(name))
            usual.step(split(name, whole, MuonConfig())[0], 0.02 * (step + 1))
        rows = len(usual.weight)
        found = split(name, params[name].detach(), config.muon)[0][:rows]
        assert (found.double() - usual.weight).abs().max() > 1e-3


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_against_torch(scale: Any) -> None:
    """torch iterates in bfloat16, so updates agree to its 8 bits: about 1 % of an entry's size after five steps."""
    mine, theirs = nn.Parameter(drawn(48, 32)), nn.Parameter(drawn(48, 32))
    config = OptimizerConfig(name="muon", muon=MuonConfig(scale=scale), clip=None)
    optimizer = build_optimizer([(DOWN, mine)], config, num_layers=1)
    oracle = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn=scale)
    start = mine.detach().clone()
    for step in range(3):
        mine.grad, theirs.grad = drawn(48, 32, seed=step), drawn(48, 32, seed=step)
        optimizer.step(0.02)
        oracle.step()
    moved, expected = (mine - start).flatten(), (theirs - start).flatten()
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.999
    assert moved.norm().item() == pytest.approx(expected.norm().item(), rel=0.01)


def test_the_rest_is_adamws() -> None:
    """Embedding and norm move as with adamw alone; the state shows who has what."""

    def params() -> dict[str, nn.Parameter]:
        names = {"embed_tokens.weight": (6, 4), "norm.weight": (4,), DOWN: (4, 8)}
        return {name: nn.Parameter(drawn(*shape)) for name, shape in names.items()}

    both, alone = params(), params()
    muon_optimizer = build_optimizer(both.items(), OptimizerConfig(name="muon", clip=None), num_layers=1)
    adamw_optimizer = build_optimizer(alone.items(), OptimizerConfig(clip=None), num_layers=1)
    for name in both:
        both[name].grad = drawn(*both[name].shape, seed=1)
        alone[name].grad = drawn(*both[name].shape, seed=1)
    muon_optimizer.step(0.1)
    adamw_optimizer.step(0.1)
    assert torch.equal(both["embed_tokens.weight"], alone["embed_tokens.weight"])
    assert torch.equal(both["norm.weight"], alone["norm.weight"])
    assert not torch.equal(both[DOWN], alone[DOWN])
    assert sorted(name.removeprefix(DOWN) for name in muon_optimizer.state_tensors() if name.startswith(DOWN)) == [
        ".momentum",
        ".updates",
    ]


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_narrow_momentum_gives_nearly_the_same_update(state_dtype: Any) -> None:
    moved = {}
    for dtype in ("float32", state_dtype):
        weight = nn.Parameter(torch.zeros(40, 60))
        config = OptimizerConfig(name="muon", state_dtype=dtype, clip=None)
        optimizer = build_optimizer([(DOWN, weight)], config, num_layers=1)
        for step in range(5):
            weight.grad = drawn(40, 60, seed=step)
            optimizer.step(0.01)
        moved[dtype] = weight.detach().flatten()
    assert not torch.equal(moved["float32"], moved[state_dtype])
    assert torch.cosine_similarity(moved["float32"], moved[state_dtype], dim=0) > 0.99


def test_update_size_matches_adamws() -> None:
    """An orthogonal R x C matrix has root mean square 1 / sqrt(max(R, C)); Adam's updates have about 0.2."""
    for rows, columns in ((64, 256), (256, 64)):
        update = update_scale(rows, columns, "match_rms_adamw") * orthogonal(drawn(1, rows, columns), steps=5)
        assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.15)
    assert update_scale(32, 8, "original") == 2
    assert update_scale(8, 32, "original") == 1
