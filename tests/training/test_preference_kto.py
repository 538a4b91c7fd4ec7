"""KTO as an objective: against separate unpacked passes, and the same step in any number of micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.training.data.pairs import KtoExample
from ernie45.training.kto import KtoObjective
from ernie45.training.losses.kto import KtoConfig
from ernie45.training.network import TrainingNetwork
from ernie45.training.reference_policy import FrozenCopy


def example(seed: int, sizes: tuple[int, int], *, desirable: bool) -> KtoExample:
    generator = torch.Generator().manual_seed(seed)
    prompt, completion = (torch.randint(1, 101, (size,), generator=generator) for size in sizes)
    return KtoExample(
        prompt=prompt,
        completion=completion,
        learnt=torch.arange(len(completion)) != (1 if len(completion) > 3 else -1),
        desirable=desirable,
        origin=f"kto.jsonl:{seed}",
    )


EXAMPLES = [
    example(1, (3, 4), desirable=True),
    example(2, (1, 2), desirable=False),
    example(3, (5, 1), desirable=True),
    example(4, (2, 6), desirable=False),
    example(5, (4, 3), desirable=True),
]
CONFIG = KtoConfig(beta=0.4, desirable_weight=1.3, undesirable_weight=0.7)


def score(model: Any, prompt: Tensor, one: KtoExample) -> Tensor:
    logprobs = model(torch.cat((prompt, one.completion))[None])[0].log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(1, one.completion[:, None])[:, 0][one.learnt].sum()


def by_hand(model: Any, frozen: Any) -> tuple[Tensor, float]:
    """Loss and KL, as the paper writes them."""
    ratios, mismatched = [], []
    for at, one in enumerate(EXAMPLES):
        following = EXAMPLES[(at + 1) % len(EXAMPLES)]
        with torch.no_grad():
            reference = score(frozen, one.prompt, one)
            mismatched.append(float(score(model, one.prompt, following) - score(frozen, one.prompt, following)))
        ratios.append(score(model, one.prompt, one) - reference)
    kl = max(sum(mismatched) / len(mismatched), 0.0)
    losses = []
    for one, ratio in zip(EXAMPLES, ratios, strict=True):
        if one.desirable:
            losses.append(1.3 * (1 - torch.sigmoid(0.4 * (ratio - kl))))
        else:
            losses.append(0.7 * (1 - torch.sigmoid(0.4 * (kl - ratio))))
    return torch.stack(losses).mean(), kl


def step(model: Any, frozen: Any, split: list[list[KtoExample]]) -> dict[str, Tensor]:
    network = TrainingNetwork(model)
    objective = KtoObjective(CONFIG, FrozenCopy(TrainingNetwork(frozen)), network)
    batches = [objective.collate([[one] for one in examples]) for examples in split]
    totals = objective.totals(batches)
    logged: dict[str, Tensor] = {}
    for batch in batches:
        loss = objective.loss(network, batch, totals)
        loss.total.backward()
        for name, value in loss.logged.items():
            logged[name] = logged.get(name, torch.zeros(())) + value
    return logged


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("seeds", [(0, 1), (1, 0)])
def test_loss_kl_and_gradient_are_those_of_separate_passes(small_model: Any, seeds: tuple[int, int]) -> None:
    plain, model, frozen = (small_model(moe=True, seed=seed) for seed in (seeds[0], seeds[0], seeds[1]))
    expected, kl = by_hand(plain, frozen)
    expected.backward()
    logged = step(model, frozen, [EXAMPLES])
    torch.testing.assert_close(logged["loss"], expected.detach(), atol=1e-5, rtol=1e-5)
    assert float(logged["kl"]) == pytest.approx(kl, abs=1e-4)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient, atol=1e-4, rtol=2e-3, msg=name)


def test_one_of_the_two_orders_has_a_distance(small_model: Any) -> None:
    """So that the test above compares more than zeros."""
    one, other = small_model(moe=True), small_model(moe=True, seed=1)
    assert max(by_hand(one, other)[1], by_hand(other, one)[1]) > 0.01


def test_a_step_is_the_same_in_any_number_of_micro_batches(small_model: Any) -> None:
    results = []
    for split in ([EXAMPLES], [[one] for one in EXAMPLES], [EXAMPLES[:2], EXAMPLES[2:]]):
        model = small_model(moe=True, seed=1)
        results.append((step(model, small_model(moe=True), split), gradients(model)))
    for logged, found in results[1:]:
        torch.testing.assert_close(logged, results[0][0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found, results[0][1], atol=1e-4, rtol=1e-3)


def test_a_step_of_one_answer_has_nothing_to_mismatch(small_model: Any) -> None:
    with pytest.raises(ShapeError, match="two rows per step"):
        step(small_model(), small_model(), [EXAMPLES[:1]])


def test_it_learns(small_model: Any) -> None:
    model = small_model()
    network = TrainingNetwork(model)
    objective = KtoObjective(CONFIG, FrozenCopy.of(network), network)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    margins = []
    for _ in range(12):
        batch = objective.collate([EXAMPLES])
        optimizer.zero_grad()
        loss = objective.loss(network, batch, objective.totals([batch]))
        loss.total.backward()
        optimizer.step()
        margins.append(float(loss.logged["rewards/margin"]))
    assert margins[0] == pytest.approx(0, abs=1e-5)
    assert margins[-1] > 2
