"""The router: choice, weights and the order by expert, against the trainable layer and by hand."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.kernels.choice import kernels
from ernie45.kernels.router import Routing, route, route_reference
from ernie45.layers import moe

TOLERANCE: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-5}


def inputs(tokens: int, hidden: int, experts: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, gate = (
        torch.randn(tokens, hidden, generator=generator),
        torch.randn(experts, hidden, generator=generator) * hidden**-0.5,
    )
    return x, gate, 0.05 * torch.randn(experts, generator=generator)


def same_bits(a: Routing, b: Routing) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check_order(routing: Routing, num_experts: int) -> None:
    """The arrays by expert hold exactly what the arrays by token say."""
    entries = [
        (expert, token, weight)
        for token, (ids, weights) in enumerate(zip(routing.ids_TK.tolist(), routing.weights_TK.tolist(), strict=True))
        for expert, weight in zip(ids, weights, strict=True)
    ]
    entries.sort(key=lambda entry: entry[:2])
    assert routing.counts_E.tolist() == [sum(entry[0] == expert for entry in entries) for expert in range(num_experts)]
    assert routing.tokens.tolist() == [entry[1] for entry in entries]
    assert routing.token_weights.tolist() == [entry[2] for entry in entries]


@pytest.mark.parametrize("choice", ["native", "reference"])
@pytest.mark.parametrize(
    ("tokens", "hidden", "experts", "active"), [(1, 2560, 64, 6), (9, 48, 8, 3), (40, 50, 17, 17), (3, 7, 1, 1)]
)
@pytest.mark.parametrize("biased", [True, False])
def test_choice_is_that_of_the_layer(
    extension: ModuleType, choice: str, tokens: int, hidden: int, experts: int, active: int, biased: bool
) -> None:
    x, gate, bias = inputs(tokens, hidden, experts)
    with kernels(choice):  # type: ignore[arg-type]
        routing = route(x, gate, bias if biased else None, active, 1e-12)
    weights, ids = moe.route(x @ gate.T, bias if biased else None, active, 1e-12)
    assert torch.equal(routing.ids_TK.long(), ids)
    torch.testing.assert_close(routing.weights_TK, weights, **TOLERANCE)
    check_order(routing, experts)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bits_depend_on_nothing_but_the_token(extension: ModuleType, isas: list[str], data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 70))
    active, tokens = data.draw(st.integers(1, min(experts, 8))), data.draw(st.integers(0, 40))
    x, gate, bias = inputs(tokens, data.draw(st.integers(1, 200)), experts, data.draw(st.integers(0, 9)))
    results = []
    for index, name in enumerate(isas):
        extension.set_isa(name)
        extension.set_num_threads(index + 1)
        results.append(route(x, gate, bias, active, 1e-12))
    assert all(same_bits(results[0], result) for result in results)
    check_order(results[0], experts)
    alone = [route(x[i : i + 1], gate, bias, active, 1e-12).weights_TK for i in range(tokens)]
    assert torch.equal(torch.cat([torch.empty(0, active), *alone]), results[0].weights_TK)
    expected = route_reference(x, gate, bias, active, 1e-12)
    agree = (results[0].ids_TK == expected.ids_TK).all(1)  # near ties may differ by the order of the sums
    assert agree.float().mean() > 0.9 or tokens < 5
    torch.testing.assert_close(results[0].weights_TK[agree], expected.weights_TK[agree], **TOLERANCE)


@pytest.mark.parametrize("choice", ["native", "reference"])
def test_ties_go_to_the_lowest_id(extension: ModuleType, choice: str) -> None:
    with kernels(choice):  # type: ignore[arg-type]
        routing = route(torch.ones(3, 16), torch.zeros(8, 16), None, 4, 1e-12)
        steered = route(torch.ones(1, 16), torch.zeros(8, 16), torch.tensor([0.0, 0, 1, 0, 0, 2, 0, 1]), 4, 1e-12)
    assert routing.ids_TK.tolist() == [[0, 1, 2, 3]] * 3
    assert routing.weights_TK.tolist() == [[0.25] * 4] * 3
    assert steered.ids_TK.tolist() == [[5, 2, 7, 0]]
    assert steered.weights_TK.tolist() == [[0.25] * 4], "the bias steers the choice, not the weights"


def test_lower_bound_of_the_sum(isa: str) -> None:
    """Four equal experts, one chosen: probability 1/4 over max(1/4, 1/2)."""
    routing = route(torch.ones(1, 16), torch.zeros(4, 16), None, 1, 0.5)
    assert routing.weights_TK.tolist() == [[0.5]]


def test_a_nan_still_gives_distinct_experts_of_the_model(isa: str) -> None:
    x, gate, bias = inputs(2, 32, 8)
    x[0, 5] = torch.nan
    routing = route(x, gate, bias, 4, 1e-12)
    assert sorted(set(routing.ids_TK[0].tolist())) == [0, 1, 2, 3]
    assert routing.weights_TK[0].isnan().all()
    assert routing.weights_TK[1].isfinite().all()


def test_wrong_inputs_are_refused() -> None:
    x, gate, bias = inputs(4, 32, 8)
    for arguments in (
        (x[0], gate, bias, 2),
        (x.double(), gate, bias, 2),
        (x[:, :5], gate, bias, 2),
        (x.T.contiguous().T, gate, bias, 2),
        (x, gate.bfloat16(), bias, 2),
        (x, gate, bias[:3], 2),
        (x, gate, bias, 9),
        (x, gate, bias, 0),
    ):
        with pytest.raises(ShapeError, match=r"\[route\]"):
            route(*arguments, 1e-12)
