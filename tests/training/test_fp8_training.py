"""A network that trains in fp8 learns as it does in float32 and bfloat16: loss beside loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ernie45.models.text import CausalLM
from ernie45.training.fp8 import Fp8Config, use_fp8
from ernie45.training.fp8.matmul import why_no_scaled_mm
from ernie45.training.optim import OptimizerConfig, build_optimizer

STEPS = 40


def batch(step: int) -> Tensor:
    """Rows that count up from a random start in random strides: something to learn in forty steps."""
    generator = torch.Generator().manual_seed(step % 4)
    start = torch.randint(0, 50, (8, 1), generator=generator)
    stride = torch.randint(1, 4, (8, 1), generator=generator)
    return (start + stride * torch.arange(17)) % 101


def losses(model: CausalLM) -> list[float]:
    model.train()
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(), num_layers=3)
    found = []
    for step in range(STEPS):
        ids = batch(step)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step(3e-3)
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_loss_follows_that_of_wider_dtypes(small_model: Callable[..., CausalLM]) -> None:
    """Within 0.05 nats of float32 in the mean of the last ten steps, and within 0.2 at every step; it falls by more than 2."""

    def build(dtype: torch.dtype = torch.float32) -> CausalLM:
        return small_model(moe=True, dtype=dtype, hidden_size=160, intermediate_size=136)

    exact = torch.tensor(losses(build()))
    narrow = torch.tensor(losses(build(torch.bfloat16)))
    model = build(torch.bfloat16)
    use_fp8(model)
    found = torch.tensor(losses(model))
    assert exact[0] - exact[-1] > 2
    assert (found - exact).abs().max() < 0.2
    assert abs(found[-10:].mean() - exact[-10:].mean()) < 0.05
    assert abs(found[-10:].mean() - narrow[-10:].mean()) < 0.05
    assert not torch.equal(found, narrow)


@pytest.mark.skipif(bool(why_no_scaled_mm(torch.device("cpu"))), reason="torch._scaled_mm does not run here")
def test_the_device_gives_emulations_gradients(small_model: Callable[..., CausalLM]) -> None:
    grads = {}
    for backend in ("emulate", "scaled_mm"):
        model = small_model(moe=True)
        use_fp8(model, Fp8Config(backend=backend))  # type: ignore[arg-type]
        ids = batch(0)
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        grads[backend] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    # sums in another order may round an activation to the neighbour in fp8
    assert torch.cosine_similarity(grads["emulate"], grads["scaled_mm"], dim=0) > 0.9999


def test_recomputed_layers_give_the_same_gradients(small_model: Callable[..., CausalLM]) -> None:
    from torch.utils.checkpoint import checkpoint

    grads = []
    for again in (False, True):
        model = small_model(moe=True)
        use_fp8(model)
        if again:
            for layer in model.model.layers:
                plain = layer.forward
                layer.forward = lambda *arguments, plain=plain: checkpoint(plain, *arguments, use_reentrant=False)
        ids = batch(0)
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(*grads)
