"""The average against its closed form; when it is updated, exchanged and restored."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ernie45.errors import CheckpointError, ConfigError, ShapeError
from ernie45.training.optim import Ema, EmaConfig, OptimizerConfig, build_optimizer


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_closed_form() -> None:
    """e_n = w0 + sum (1 - a^(n - i + 1)) d_i, in float64 beside it."""
    start, decay, count = drawn(40), 0.9, 25
    weight = start.clone()
    ema = Ema({"w": weight}, EmaConfig(decay=decay))
    steps = [0.1 * drawn(40, seed=i) for i in range(1, count + 1)]
    for number, step in enumerate(steps, start=1):
        weight += step
        assert ema.update(step=number, loss=1.0)
    expected = start.double() + sum((1 - decay ** (count - i)) * step.double() for i, step in enumerate(steps))
    torch.testing.assert_close(ema.state_tensors()["w"].double(), expected, rtol=0, atol=1e-6)


def test_it_starts_from_the_weights_and_is_no_alias() -> None:
    weight = drawn(5)
    before = weight.clone()
    ema = Ema({"w": weight}, EmaConfig(decay=0.5))
    weight.zero_()
    assert torch.equal(ema.state_tensors()["w"], before)


def test_steps_that_are_left_out() -> None:
    weight = torch.zeros(1)
    ema = Ema({"w": weight}, EmaConfig(decay=0.5, interval=2, loss_threshold=3.0))
    weight.fill_(1.0)
    assert not ema.update(step=1, loss=0.0)  # the interval
    assert not ema.update(step=2, loss=3.0)  # at the threshold
    assert not ema.update(step=4, loss=math.nan)
    assert ema.state_tensors()["w"].item() == 0
    assert ema.update(step=6, loss=2.9)
    assert ema.state_tensors()["w"].item() == 0.5


def test_masters_are_averaged_and_not_what_bfloat16_shows_of_them() -> None:
    """Updates of 1e-4 at weights of 1 are invisible in bfloat16."""
    model = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(weight_decay=0.0, clip=None), num_layers=1)
    ema = Ema(optimizer.masters, EmaConfig(decay=0.5))
    model.weight.grad = None
    model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step(1e-4)
    ema.update(step=1, loss=0.0)
    assert torch.equal(model.weight, torch.ones_like(model.weight))
    torch.testing.assert_close(ema.state_tensors()["weight"], torch.full((4, 4), 1 - 0.5e-4), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swap_and_back(dtype: torch.dtype) -> None:
    model = nn.Linear(1100, 1000).to(dtype)  # above one piece of the exchange
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    ema = Ema({"weight": model.weight}, EmaConfig(decay=0.5))
    average = 2 * before["weight"].float()
    ema.load_state_tensors({"weight": average})

    def fail_inside() -> None:
        with ema.swap(model):
            assert torch.equal(model.weight, average.to(dtype))
            assert torch.equal(model.bias, before["bias"])
            raise KeyError

    with pytest.raises(KeyError):  # the weights come back whatever happens
        fail_inside()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(ema.state_tensors()["weight"], average)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers


def test_swap_of_another_network_is_refused() -> None:
    ema = Ema({"other": drawn(2)}, EmaConfig(decay=0.5))
    with pytest.raises(ShapeError, match="has no parameter other"), ema.swap(nn.Linear(2, 2)):
        pass


def test_state_comes_back_bit_for_bit() -> None:
    weight = drawn(9)
    one, other = (Ema({"w": weight}, EmaConfig(decay=0.99)) for _ in range(2))
    weight += 1
    one.update(step=1, loss=0.0)
    other.load_state_tensors({name: tensor.clone() for name, tensor in one.state_tensors().items()})
    assert torch.equal(one.state_tensors()["w"], other.state_tensors()["w"])
    with pytest.raises(CheckpointError, match="names of averages differ"):
        one.load_state_tensors({"v": weight})
    with pytest.raises(CheckpointError, match=r"expected torch.float32 \(9,\)"):
        one.load_state_tensors({"w": weight[:3]})


@pytest.mark.parametrize("fields", [{"decay": 1.0}, {"decay": 0.0}, {"decay": 0.9, "interval": 0}])
def test_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        EmaConfig(**fields)  # type: ignore[arg-type]
