"""The sampler against its definition: a slow sorter written from the documented order, and statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.engine.params import SamplingParams
from ernie45.engine.sampling import penalise, sample, token_logprob
from ernie45.errors import RequestError
from ernie45.kernels.choice import kernels
from ernie45.kernels.native import status
from ernie45.kernels.sampling import draw, uniform


def _kept(probs: list[float], params: SamplingParams) -> dict[int, float]:
    """min_p, then top_k, then top_p, in plain Python over sorted tokens."""
    tokens = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    tokens = [i for i in tokens if probs[i] >= params.min_p * max(probs)]
    if params.top_k > 0:
        tokens = tokens[: params.top_k]
    total, mass, nucleus = sum(probs[i] for i in tokens), 0.0, []
    for i in tokens:
        nucleus.append(i)
        mass += probs[i]
        if mass >= params.top_p * total:
            break
    kept = nucleus if params.top_p < 1 else tokens
    share = sum(probs[i] for i in kept)
    return {i: probs[i] / share for i in kept}


@given(
    logits=st.lists(st.integers(-6, 6).map(lambda n: n / 2 + n**3 * 1e-3), min_size=2, max_size=30),
    top_k=st.integers(-1, 12), top_p=st.sampled_from([1.0, 0.95, 0.61, 0.3, 0.05]),
    min_p=st.sampled_from([0.0, 0.1, 0.5]),
    temperature=st.sampled_from([1.0, 0.6, 1.7]), seed=st.integers(0, 2**62), step=st.integers(0, 50),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_draws_follow_the_documented_order(
    logits: list[float], top_k: int, top_p: float, min_p: float, temperature: float, seed: int, step: int
) -> None:
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    tensor = torch.tensor(logits)
    scaled = [(x - max(tensor.tolist())) / temperature for x in tensor.tolist()]
    total = sum(math.exp(x) for x in scaled)
    kept = _kept([math.exp(x) / total for x in scaled], params)
    target, mass, expected = uniform(seed, step), 0.0, max(kept)
    margin = 1.0
    for i in sorted(kept):
        mass += kept[i]
        margin = min(margin, abs(mass - target))
        if mass > target:
            expected = i
            break
    drawn = sample(tensor, params, seed=seed, prompt=[0], output=[0] * step)
    assert drawn in kept
    # at an exact border between two tokens the last bit of a sum decides
    assert drawn == expected or margin < 1e-9


def test_uniform_depends_on_seed_and_step_alone() -> None:
    assert uniform(1, 2) == uniform(1, 2)
    drawn = {uniform(seed, step) for seed in range(20) for step in range(20)}
    assert len(drawn) == 400
    assert 0 <= min(drawn) < max(drawn) < 1
    assert abs(sum(drawn) / 400 - 0.5) < 0.05


@pytest.mark.parametrize("choice", ["native", "reference"])
def test_without_filters_the_draw_is_the_kernel_s(choice: Any) -> None:
    """Of any dtype and strides, at the step that the output's length is; a temperature near 0 counts as the least."""
    if choice == "native" and not status().available:
        pytest.skip("there is one path only")
    wide = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with kernels(choice):
        for logits in (wide[:, 1], wide[:, 1].bfloat16(), wide.float()[:, 1]):
            plain = logits.float().contiguous()
            for temperature in (0.7, 1e-9):
                drawn = [
                    sample(logits, SamplingParams(temperature=temperature), seed=9, prompt=[0], output=[0] * step)
                    for step in range(20)
                ]
                assert drawn == [draw(plain, max(temperature, 1e-6), 9, step) for step in range(20)]
                assert len(set(drawn)) > 5 or temperature < 1e-6
            expected = float(plain.double().log_softmax(-1)[4])
            for num_top in (0, 2):
                assert token_logprob(logits, 4, num_top).logprob == pytest.approx(expected, abs=1e-6)
            assert token_logprob(logits, 4, 0).top == ()


def test_frequencies_match_the_distribution() -> None:
    """Chi-squared over 20000 draws of a small vocabulary, filters on."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -5.0])
    params = SamplingParams(top_k=5, top_p=0.97, temperature=0.9)
    scaled = (logits / 0.9).double().softmax(-1).tolist()
    kept = _kept(scaled, params)
    counts = dict.fromkeys(range(6), 0)
    for step in range(20000):
        counts[sample(logits, params, seed=step, prompt=[0], output=[])] += 1
    assert all(counts[i] == 0 for i in range(6) if i not in kept)
    chi_squared = sum((counts[i] - 20000 * p) ** 2 / (20000 * p) for i, p in kept.items())
    assert chi_squared < 25, "beyond any plausible chance for at most four degrees of freedom"


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits = torch.zeros(1000)
    logits[[700, 3, 999]] = 5.0
    assert sample(logits, SamplingParams(temperature=0), seed=0, prompt=[0], output=[]) == 3


def test_a_large_nucleus_is_found_beyond_the_first_thousand() -> None:
    logits = torch.zeros(5000)
    params = SamplingParams(top_p=0.9)
    drawn = {sample(logits, params, seed=s, prompt=[0], output=[]) for s in range(300)}
    assert max(drawn) > 3500
    assert max(drawn) < 4500


def test_penalties_by_hand() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5])
    repetition = penalise(logits, SamplingParams(repetition_penalty=2.0), prompt=[0], output=[1, 1])
    assert repetition.tolist() == [1.0, -4.0, 1.0, 0.5]
    counted = penalise(
        logits, SamplingParams(frequency_penalty=0.5, presence_penalty=0.25), prompt=[0], output=[1, 1, 2]
    )
    assert counted.tolist() == [2.0, -3.25, 0.25, 0.5]
    untouched = penalise(logits, SamplingParams(), prompt=[0, 1], output=[1, 1])
    assert torch.equal(untouched, logits)


def test_a_mask_may_be_longer_than_the_logits() -> None:
    """A vocabulary can name ids that the network has no row for."""
    logits = torch.tensor([3.0, 2.0, 1.0])
    allowed = torch.tensor([False, True, True, True])
    assert sample(logits, SamplingParams(temperature=0), seed=0, prompt=[0], output=[], allowed_V=allowed) == 1


def test_banned_tokens_are_never_chosen() -> None:
    logits = torch.tensor([5.0, 1.0, 0.0])
    for params in (SamplingParams(temperature=0), SamplingParams()):
        assert {sample(logits, params, seed=s, prompt=[0], output=[], banned=[0]) for s in range(50)} <= {1, 2}


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    found = token_logprob(logits, 0, 2)
    total = math.log(sum(math.exp(x) for x in (1, 2, 3)))
    assert found.logprob == pytest.approx(1 - total, abs=1e-6)
    assert [i for i, _ in found.top] == [2, 1]
    assert found.top[0][1] == pytest.approx(3 - total, abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    with pytest.raises(RequestError, match="not finite"):
        sample(torch.tensor([0.0, bad]), SamplingParams(), seed=0, prompt=[0], output=[])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected a number from 0 to 100"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -2}, "top_k is -2"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected a number from 0.001 to 100$"),
        ({"presence_penalty": 3}, "presence_penalty is 3"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3"),
        ({"max_tokens": 0}, "max_tokens is 0, expected a whole number from 1 to 2147483648$"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5, expected a whole number"),
        ({"min_tokens": True}, "min_tokens is True, expected a whole number"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens 4 exceeds max_tokens 3"),
        ({"seed": -1}, "seed is -1, expected a whole number from 0 to 9223372036854775807$"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"stop": ("",)}, "stop holds 1 entries"),
        ({"stop": ("a",) * 65}, "stop holds 65 entries"),
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**fields)


def test_one_stop_string_may_be_given_bare() -> None:
    assert SamplingParams(stop="\n").stop == ("\n",)  # type: ignore[arg-type]
