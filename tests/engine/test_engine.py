"""The engine against the reference generator, token for token, and its own promises: one end for every request, books that
balance after every step, the same answer in every company.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ernie45
from ernie45 import SamplingParams
from ernie45.engine.config import EngineConfig
from ernie45.engine.drafts import NgramSpeculation
from ernie45.engine.engine import Engine
from ernie45.errors import CapacityError, ConfigError, RequestError
from ernie45.processing.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SMALL = EngineConfig(max_model_len=128, page_size=16, max_num_seqs=8)
NETWORKS = ["dense", "moe", "packed-dense", "packed-moe"]


def reference(model: Any, tokenizer: Tokenizer, prompt: Sequence[int], params: SamplingParams) -> list[Any]:
    """What the reference generator gives, in the context that the engine has."""
    return list(ernie45.generate(model, tokenizer, list(prompt), params))


MIX = {
    "prompts": st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 60), st.integers(0, 12)), min_size=1, max_size=7
    ),  # seed (few: prefixes repeat), length, step of arrival
    "params": st.lists(
        st.sampled_from(
            [
                SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
                SamplingParams(seed=1, max_tokens=15, ignore_eos=True, logprobs=2),
                SamplingParams(seed=2, temperature=0.6, top_p=0.8, max_tokens=30),
                SamplingParams(seed=3, top_k=5, repetition_penalty=1.4, max_tokens=11, min_tokens=6, stop=("a", "Q!")),
                SamplingParams(seed=4, temperature=0.5, min_p=0.05, frequency_penalty=0.4, max_tokens=25),
                SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
            ]
        ),
        min_size=7,
        max_size=7,
    ),
    "chunk": st.sampled_from([3, 16, 64]),
    "beside": st.sampled_from([1, 7, 32]),
    "spare_pages": st.sampled_from([0, 2, 40]),
    "max_num_seqs": st.sampled_from([1, 3, 8]),
    "prefix_cache": st.booleans(),
    "speculate": st.booleans(),
    "aborts": st.lists(st.tuples(st.integers(0, 6), st.integers(1, 20)), max_size=2),
}


@pytest.mark.parametrize("name", NETWORKS)
@given(mix=st.fixed_dictionaries(MIX))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mix_gives_every_request_what_the_generator_gives_it(
    network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any, name: str, mix: dict[str, Any]
) -> None:
    model = network(name)
    page_bytes = 16 * 2 * 3 * 2 * 16 * (2 if name.startswith("packed") else 4)
    config = EngineConfig(
        max_model_len=112,
        page_size=16,
        kv_cache_memory=(7 + mix["spare_pages"]) * page_bytes,
        max_num_seqs=mix["max_num_seqs"],
        max_step_tokens=mix["chunk"],
        max_step_tokens_beside_decodes=mix["beside"],
        prefix_cache=mix["prefix_cache"],
        speculation=NgramSpeculation(min_ngram=1) if mix["speculate"] else None,
    )
    driver = drive(Engine(model, tokenizer, config))
    assert driver.engine.stats().pages.total == 7 + mix["spare_pages"]
    requests = {
        f"r{i}": (tokens(seed, length), params, arrival)
        for i, ((seed, length, arrival), params) in enumerate(zip(mix["prompts"], mix["params"], strict=False))
    }
    for step in range(22):
        for key, (prompt, params, arrival) in requests.items():
            if arrival == step:
                driver.add(key, prompt, params, tenant=key[-1:], cache_salt="")
        for which, when in mix["aborts"]:
            if when == step:
                driver.engine.abort(f"r{which}")
        driver.step()
    driver.run()
    assert driver.ends.keys() == requests.keys()
    for key, (prompt, params, _) in requests.items():
        expected = reference(model, tokenizer, prompt, params)
        found = driver.outputs.get((key, 0), [])
        if driver.ends[key].kind == "aborted":
            assert [piece.ids for piece in found] == [piece.ids for piece in expected[: len(found)]]
            continue
        assert driver.ends[key].kind == "finished"
        assert [(p.ids, p.text, p.finish_reason, p.stop_reason) for p in found] == [
            (p.ids, p.text, p.finish_reason, p.stop_reason) for p in expected
        ]
        for mine, theirs in zip(found, expected, strict=True):
            for a, b in zip(mine.logprobs, theirs.logprobs, strict=True):
                assert a.id == b.id
                assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
        usage = driver.ends[key].usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len(expected))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_thirty_two_together_give_what_each_gives_alone(
    network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any, name: str, kv_dtype: str
) -> None:
    """To the bit with packed weights; plain ones are torch's products, whose last bit depends on the batch."""
    model = network(name)
    if not name.startswith("packed") and kv_dtype != "float32":
        pytest.skip("rounding keys and values makes much of a last bit")
    config = EngineConfig(max_model_len=64, page_size=16, max_num_seqs=32, kv_dtype=kv_dtype, prefix_cache=False)
    params = [
        SamplingParams(seed=i, temperature=i % 3 / 2, max_tokens=6, ignore_eos=True, logprobs=0) for i in range(32)
    ]
    prompts = [tokens(i, 1 + 3 * i % 50) for i in range(32)]
    together = drive(Engine(model, tokenizer, config))
    for i in range(32):
        together.add(str(i), prompts[i], params[i])
    together.run()
    alone = drive(Engine(model, tokenizer, replace(config, max_num_seqs=1, max_step_tokens=17, page_size=32)))
    for i in reversed(range(32)):
        alone.add(str(i), prompts[i], params[i])
    alone.run()
    for i in range(32):
        mine, theirs = together.completion(str(i)), alone.completion(str(i))
        assert mine.ids == theirs.ids
        exact = name.startswith("packed")
        assert [p.logprob for p in mine.logprobs] == (
            [p.logprob for p in theirs.logprobs]
            if exact
            else pytest.approx([p.logprob for p in theirs.logprobs], abs=1e-5)
        )
