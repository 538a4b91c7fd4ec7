"""The engine against the reference generator, token for token, and its own promises: one end for every request, books that
balance after every step, the same answer in every company.
"""

from __future__ import annotations

import threading
import time
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
from ernie45.engine.drafts import MtpSpeculation, NgramSpeculation
from ernie45.engine.engine import Engine
from ernie45.errors import CapacityError, ConfigError, RequestError
from ernie45.layers.cache import AttentionView
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
    "speculation": st.sampled_from([None, NgramSpeculation(min_ngram=1), MtpSpeculation(max_tokens=3)]),
    "aborts": st.lists(st.tuples(st.integers(0, 6), st.integers(1, 20)), max_size=2),
}


@pytest.mark.parametrize("name", NETWORKS)
@given(mix=st.fixed_dictionaries(MIX))
# Always the same examples: in plain networks a last bit of torch's products could move one of a million tokens.
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mix_gives_every_request_what_the_generator_gives_it(
    network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any, name: str, mix: dict[str, Any]
) -> None:
    model = network(name)
    layers = 4 if isinstance(mix["speculation"], MtpSpeculation) else 3
    page_bytes = 16 * 2 * layers * 2 * 16 * (2 if name.startswith("packed") else 4)
    config = EngineConfig(
        max_model_len=112,
        page_size=16,
        kv_cache_memory=(7 + mix["spare_pages"]) * page_bytes,
        max_num_seqs=mix["max_num_seqs"],
        max_step_tokens=mix["chunk"],
        max_step_tokens_beside_decodes=mix["beside"],
        prefix_cache=mix["prefix_cache"],
        speculation=mix["speculation"],
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


def test_under_pressure_sequences_are_interrupted_and_nothing_changes(
    network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any
) -> None:
    model = network("moe")
    config = replace(
        SMALL, kv_cache_memory=10 * 16 * 2 * 3 * 2 * 16 * 4, max_step_tokens=9, max_step_tokens_beside_decodes=5
    )
    driver = drive(Engine(model, tokenizer, config))
    prompts = [tokens(i, 40 + i) for i in range(6)]
    params = SamplingParams(seed=5, max_tokens=40, ignore_eos=True, prompt_logprobs=0)
    for i, prompt in enumerate(prompts):  # each takes the pages of the one before, some in the middle of its prompt
        driver.add(str(i), prompt, params, priority=i)
        for _ in range(5 * i):
            driver.step()
    driver.run()
    assert driver.engine.stats().preemptions > 3
    for i, prompt in enumerate(prompts):
        expected = reference(model, tokenizer, prompt, replace(params, prompt_logprobs=None))
        assert driver.completion(str(i)) == replace(driver.completion(str(i)), ids=tuple(p.ids[0] for p in expected))
        assert len(driver.scores[str(i)].logprobs) == len(prompt) - 1


def test_prefixes_of_prompts_and_outputs_are_found(network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any) -> None:
    model = network("packed-moe")
    driver = drive(Engine(model, tokenizer, SMALL))
    prompt = tokens(1, 40)
    driver.add("first", prompt, GREEDY)
    driver.run()
    turn = [*prompt, *driver.ids("first"), *tokens(2, 5)]
    driver.add("second", turn, GREEDY)
    driver.add("same", prompt, GREEDY)
    driver.run()
    assert [driver.ends[name].usage.cached_tokens for name in ("first", "same", "second")] == [0, 32, 48]
    assert driver.ids("same") == driver.ids("first")
    assert driver.ids("second") == [i for p in reference(model, tokenizer, turn, GREEDY) for i in p.ids]
    assert driver.engine.stats().cached_tokens == 80
    driver.engine.forget_prefixes()
    driver.add("forgotten", prompt, GREEDY)
    driver.run()
    assert driver.ends["forgotten"].usage.cached_tokens == 0
    off = drive(Engine(model, tokenizer, replace(SMALL, prefix_cache=False)))
    for name in ("one", "two"):
        off.add(name, prompt, GREEDY)
        off.run()
        assert off.ends[name].usage.cached_tokens == 0


def test_tenants_do_not_see_each_others_prefixes(network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any) -> None:
    driver = drive(Engine(network("dense"), tokenizer, SMALL))
    prompt = tokens(1, 40)
    for name, fields in (
        ("a", {"tenant": "A"}), ("a again", {"tenant": "A"}), ("b", {"tenant": "B"}), ("salted", {"tenant": "A", "cache_salt": "x"}),
        ("b with A's salt", {"tenant": "B", "cache_salt": "A"}),
    ):  # fmt: skip
        driver.add(name, prompt, GREEDY, **fields)
        driver.run()
    cached = {name: end.usage.cached_tokens for name, end in driver.ends.items()}
    assert cached == {"a": 0, "a again": 32, "b": 0, "salted": 0, "b with A's salt": 32}


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_guesses_save_steps_and_change_nothing(
    network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any, temperature: float
) -> None:
    model = network("packed-dense")
    motif = tokens(4, 6)
    params = SamplingParams(
        temperature=temperature, seed=1, max_tokens=60, ignore_eos=True, logit_bias=dict.fromkeys(motif, 6.0)
    )
    runs = {}
    for name, speculation in (("plain", None), ("guessing", NgramSpeculation(max_tokens=5, min_ngram=1))):
        driver = drive(Engine(model, tokenizer, replace(SMALL, speculation=speculation)))
        driver.add("x", motif * 3, params)
        runs[name] = driver.run()
    assert runs["plain"].outputs == runs["guessing"].outputs
    plain, guessing = (runs[name].engine.stats() for name in ("plain", "guessing"))
    assert plain.acceptance_rate is None
    assert guessing.acceptance_rate is not None
    assert 0 < guessing.acceptance_rate <= 1
    assert guessing.steps == plain.steps - guessing.accepted_tokens
    usage = runs["guessing"].ends["x"].usage
    assert (usage.drafted_tokens, usage.accepted_tokens) == (guessing.drafted_tokens, guessing.accepted_tokens)


@pytest.mark.parametrize("name", ["moe", "packed-dense"])
def test_the_prediction_block_guesses_what_it_guesses_of_the_whole_sequence(
    network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any, name: str
) -> None:
    """Prompts in pieces, several sequences, guesses that are mostly wrong: its pages hold what a single pass gives."""
    model = network(name)
    config = replace(SMALL, speculation=MtpSpeculation(max_tokens=2), max_step_tokens=11, kv_dtype="float32")
    driver = drive(Engine(model, tokenizer, config))
    for i in range(3):
        driver.add(str(i), tokens(i, 9 * i + 4), replace(GREEDY, max_tokens=8 + i))
    compared = 0
    while driver.engine.has_work:
        driver.step()
        for job in driver.engine._scheduler.running:
            if not job.drafts:
                continue
            ids, num = torch.tensor(job.tokens), len(job.tokens) - 1
            view = AttentionView(lengths=(num,))
            with torch.inference_mode():
                hidden = model.hidden(ids[:num], view)
                states = model.model.mtp(hidden, ids[1:], torch.arange(num), view)
                first = int(model.mtp_logits(states[-1:]).argmax())
            assert job.drafts[0] == first
            compared += 1
    assert compared > 20
    assert driver.engine.stats().drafted_tokens > compared


def test_a_prediction_block_that_is_right_saves_steps(
    small_model: Any, tokenizer: Tokenizer, tokens: Any, drive: Any
) -> None:
    """Layers that add nothing make the next token a function of the last; a block that copies then guesses it."""
    model = small_model(mtp=1, seed=5)
    with torch.no_grad():
        for layer in (*model.model.layers, *model.model.mtp_block):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        width = model.config.hidden_size
        model.model.mtp_linear_proj[0].weight.copy_(torch.cat((torch.eye(width), torch.zeros(width, width)), dim=1))
    for count, most_steps in ((1, 1 + 12), (3, 1 + 7)):  # 24 tokens behind the first; guesses end where a page does
        driver = drive(Engine(model, tokenizer, replace(SMALL, speculation=MtpSpeculation(max_tokens=count))))
        driver.add("x", tokens(1, 20), replace(GREEDY, max_tokens=25))
        driver.run()
        assert driver.ids("x") == [
            i for p in reference(model, tokenizer, tokens(1, 20), replace(GREEDY, max_tokens=25)) for i in p.ids
        ]
        stats = driver.engine.stats()
        assert stats.acceptance_rate == 1
        assert stats.steps <= most_steps


def test_prompt_log_probabilities_with_and_without_a_known_prefix(
    network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any
) -> None:
    model = network("moe")
    driver = drive(Engine(model, tokenizer, replace(SMALL, max_step_tokens=13)))
    prompt = tokens(1, 50)
    driver.add("fills the cache", prompt, GREEDY)
    driver.run()
    for name in ("one", "two"):
        driver.add(name, prompt, replace(GREEDY, prompt_logprobs=3, n=2))
    driver.add("short", prompt[:1], replace(GREEDY, prompt_logprobs=3))
    driver.run()
    with torch.inference_mode():
        expected = model(torch.tensor([prompt]))[0, :, : tokenizer.vocab_size].log_softmax(-1)
    for name in ("one", "two"):
        scores = driver.scores[name].logprobs
        assert [score.id for score in scores] == prompt[1:]
        for at, score in enumerate(scores):
            assert score.logprob == pytest.approx(float(expected[at, prompt[at + 1]]), abs=1e-4)
            assert score.top[0][1] == pytest.approx(float(expected[at].max()), abs=1e-4)
            assert len(score.top) == 3
        assert driver.ids(name) == driver.ids(name, 1) == driver.ids("fills the cache")
    assert "short" not in driver.scores


def test_a_prompt_interrupted_while_it_is_scored_is_scored_once(
    network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any
) -> None:
    model, prompt = network("packed-moe"), tokens(1, 60)
    found = []
    for interrupted in (False, True):
        driver = drive(Engine(model, tokenizer, replace(SMALL, max_num_seqs=1, max_step_tokens=9)))
        driver.add("x", prompt, replace(GREEDY, prompt_logprobs=2))
        for _ in range(3):
            driver.step()
        if interrupted:
            driver.add("urgent", tokens(2, 10), GREEDY, priority=1)
        driver.run()
        assert driver.engine.stats().preemptions == interrupted
        found.append((driver.scores["x"].logprobs, driver.outputs["x", 0]))
    assert found[0] == found[1]
    assert len(found[0][0]) == 59


def test_choices_are_what_their_seeds_give(network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any) -> None:
    model, prompt = network("packed-moe"), tokens(3, 35)
    driver = drive(Engine(model, tokenizer, SMALL))
    params = SamplingParams(seed=11, n=3, max_tokens=9, ignore_eos=True)
    driver.add("x", prompt, params)
    driver.run()
    for index in range(3):
        alone = reference(model, tokenizer, prompt, SamplingParams(seed=11 + index, max_tokens=9, ignore_eos=True))
        assert driver.ids("x", index) == [i for piece in alone for i in piece.ids]
    assert driver.ends["x"].usage.completion_tokens == 27
    assert len({tuple(driver.ids("x", index)) for index in range(3)}) == 3


def test_best_of_returns_the_most_probable_choices(network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any) -> None:
    model, prompt = network("dense"), tokens(3, 10)
    driver = drive(Engine(model, tokenizer, SMALL))
    params = SamplingParams(seed=11, n=2, best_of=6, max_tokens=9, logprobs=0)
    driver.add("x", prompt, params)
    driver.run()
    everything = [
        reference(model, tokenizer, prompt, replace(params, seed=11 + i, n=1, best_of=None)) for i in range(6)
    ]

    def mean(pieces: Any) -> float:
        return sum(p.logprobs[0].logprob for p in pieces) / len(pieces)

    best = sorted(everything, key=mean, reverse=True)[:2]
    assert [driver.ids("x", i) for i in range(2)] == [[i for p in pieces for i in p.ids] for pieces in best]
    assert driver.completion("x").finish_reason is not None
    assert ("x", 2) not in driver.outputs
    assert driver.ends["x"].usage.completion_tokens == sum(len(pieces) for pieces in everything)


def test_an_abort_gives_the_pages_back_at_once(network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any) -> None:
    driver = drive(Engine(network("dense"), tokenizer, replace(SMALL, max_num_seqs=2)))
    for name in ("running", "other", "waiting"):
        driver.add(name, tokens(1, 30), replace(GREEDY, max_tokens=30))
    for _ in range(3):
        driver.step()
    before = driver.engine.stats().pages.in_use
    assert driver.engine.abort("running")
    assert driver.engine.stats().pages.in_use < before
    assert driver.engine.abort("waiting")
    assert not driver.engine.abort("waiting"), "it has ended"
    assert not driver.engine.abort("nobody")
    driver.run()
    assert {name: end.kind for name, end in driver.ends.items()} == {
        "running": "aborted", "waiting": "aborted", "other": "finished",
    }  # fmt: skip
    assert driver.ends["waiting"].usage.completion_tokens == 0
    assert driver.ends["running"].usage.completion_tokens == len(driver.ids("running")) > 0


def test_a_paused_engine_computes_nothing_and_goes_on_as_if_nothing_was(
    network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any
) -> None:
    model, prompt = network("dense"), tokens(1, 30)
    now = [0.0]
    driver = drive(Engine(model, tokenizer, SMALL, clock=lambda: now[0]))
    driver.add("x", prompt, GREEDY)
    driver.add("hurried", prompt, GREEDY, timeout_s=10)
    driver.step()
    driver.step()
    driver.engine.pause()
    assert driver.engine.paused
    assert not driver.engine.has_work
    before = driver.ids("x")
    driver.add("late", prompt, GREEDY)
    now[0] = 11.0
    driver.step()
    assert driver.ids("x") == before
    assert driver.ends["hurried"].kind == "failed"
    driver.engine.resume()
    driver.run()
    assert (
        driver.ids("x") == driver.ids("late") == [i for p in reference(model, tokenizer, prompt, GREEDY) for i in p.ids]
    )


def test_time_runs_out_for_the_whole_request(network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any) -> None:
    now = [100.0]
    driver = drive(Engine(network("dense"), tokenizer, SMALL, clock=lambda: now[0]))
    driver.add("x", tokens(1, 30), replace(GREEDY, n=3, temperature=1.0), timeout_s=2.5)
    driver.add("patient", tokens(1, 30), GREEDY)
    driver.step()
    now[0] = 102.5
    driver.run()
    assert (driver.ends["x"].kind, driver.ends["x"].reason) == (
        "failed", "the request did not end within its timeout of 2.5 s",
    )  # fmt: skip
    assert driver.ends["patient"].kind == "finished"


def test_waiting_is_measured_up_to_the_first_step(network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any) -> None:
    now = [0.0]
    driver = drive(Engine(network("dense"), tokenizer, replace(SMALL, max_num_seqs=1), clock=lambda: now[0]))
    driver.add("first", tokens(1, 30), GREEDY)
    now[0] = 2.0
    driver.add("second", tokens(2, 30), replace(GREEDY, n=2))
    driver.add("aborted", tokens(3, 30), GREEDY)
    began: dict[str, float] = {}
    while driver.engine.has_work:
        now[0] += 1.0
        driver.step()
        for name, _ in driver.outputs:
            began.setdefault(name, now[0])
        if now[0] == 5.0:
            driver.engine.abort("aborted")
    assert driver.ends["first"].queue_s == 3.0
    assert driver.ends["second"].queue_s == began["second"] - 2.0 > 5
    assert driver.ends["aborted"].queue_s is None


class OnlyUntil:
    """A mask: one id, until the output is so long; then it breaks or leaves nothing."""

    def __init__(self, token: int, length: int, error: Exception | None = None) -> None:
        self.token, self.length, self.error = token, length, error

    def allowed(self, output: Sequence[int]) -> torch.Tensor | None:
        allowed = torch.zeros(101, dtype=torch.bool)
        if len(output) < self.length:
            allowed[self.token] = True
        elif self.error is not None:
            raise self.error
        return allowed

    def finished(self, output: Sequence[int]) -> bool:
        return False


def test_masks_are_obeyed_and_fail_their_request_alone(
    network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any, caplog: Any
) -> None:
    model, prompt = network("moe"), tokens(1, 20)
    driver = drive(Engine(model, tokenizer, replace(SMALL, speculation=NgramSpeculation(min_ngram=1))))
    params = replace(GREEDY, temperature=1.0, seed=1)
    driver.add("obeys", prompt, params, new_mask=lambda: OnlyUntil(9, 100))
    driver.add("blocked", prompt, params, new_mask=lambda: OnlyUntil(9, 4))
    driver.add("broken", prompt, params, new_mask=lambda: OnlyUntil(9, 3, ValueError("out of grammar")))
    driver.add("free", prompt, GREEDY)
    driver.run()
    assert driver.ids("obeys") == [9] * 12
    assert driver.ids("blocked") == [9] * 4
    assert driver.ends["blocked"].kind == driver.ends["broken"].kind == "failed"
    assert "every token is banned" in driver.ends["blocked"].reason
    assert driver.ends["broken"].reason == "out of grammar"
    assert driver.ids("free") == [i for p in reference(model, tokenizer, prompt, GREEDY) for i in p.ids]


class WorksAhead(OnlyUntil):
    """Notes what it is asked for, by one thread at a time; from `length` on preparing fails, too."""

    def __init__(self, token: int, length: int, error: Exception | None = None) -> None:
        super().__init__(token, length, error)
        self.lock, self.prepared, self.asked = threading.Lock(), [], []  # type: ignore[var-annotated]

    def prepare(self, output: Sequence[int]) -> None:
        assert threading.current_thread() is not threading.main_thread()
        assert self.lock.acquire(blocking=False)
        time.sleep(0.002)
        self.prepared.append(len(output))
        self.lock.release()
        if len(output) >= self.length:
            raise ValueError("not ready")

    def allowed(self, output: Sequence[int]) -> torch.Tensor | None:
        assert self.lock.acquire(blocking=False)
        self.asked.append(len(output))
        self.lock.release()
        return super().allowed(output)


def test_masks_work_ahead_while_the_network_runs(
    network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    model, prompt = network("dense"), tokens(1, 20)
    engine = Engine(model, tokenizer, SMALL)
    run, masks = engine._runner.hidden, [WorksAhead(9, 100), WorksAhead(9, 3, ValueError("out of grammar"))]

    def slow(work: Any) -> Any:  # leaves every mask the time
        deadline = time.monotonic() + 30
        sampled: list[Any] = [engine._choices[one.job].generation._mask for one in work if one.samples]
        while any(len(mask.prepared) == len(mask.asked) for mask in sampled):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return run(work)

    monkeypatch.setattr(engine._runner, "hidden", slow)
    driver = drive(engine)
    for name, mask in zip(("obeys", "broken"), masks, strict=True):
        driver.add(name, prompt, replace(GREEDY, max_tokens=6), new_mask=lambda mask=mask: mask)
    driver.run()
    assert driver.ids("obeys") == [9] * 6
    assert masks[0].prepared == masks[0].asked == [*range(6)]
    assert driver.ids("broken") == [9] * 3
    assert driver.ends["broken"].reason == "out of grammar"
    assert masks[1].prepared == masks[1].asked == [*range(4)]


def test_a_step_that_breaks_fails_its_requests_and_the_next_ones_live(
    network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    model, prompt = network("dense"), tokens(1, 40)
    driver = drive(Engine(model, tokenizer, SMALL))
    driver.add("x", prompt, replace(GREEDY, n=2))
    driver.step()

    def broken(*args: Any) -> Any:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(model, "hidden", broken)
        driver.step()
    assert (driver.ends["x"].kind, driver.ends["x"].reason) == ("failed", "the model failed: out of luck")
    assert "a step of 2 sequences failed" in caplog.text
    driver.add("y", prompt, GREEDY)
    driver.run()
    assert driver.ids("y") == [i for p in reference(model, tokenizer, prompt, GREEDY) for i in p.ids]


def test_logits_that_are_not_finite_end_only_their_request(
    network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network("dense")
    driver = drive(Engine(model, tokenizer, SMALL))
    logits = model.logits

    def spoiled(hidden: torch.Tensor) -> torch.Tensor:
        out = logits(hidden).clone()
        out[0] = float("nan")
        return out

    for name in ("bad", "good"):
        driver.add(name, tokens(1, 10), GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", spoiled)
        driver.step()
    driver.run()
    assert driver.ends["bad"].kind == "failed"
    assert "not finite" in driver.ends["bad"].reason
    assert driver.ends["good"].kind == "finished"


def test_int8_keys_and_values_take_half_and_stay_close(
    network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any
) -> None:
    model, prompt = network("dense"), tokens(1, 50)
    found = {}
    for kv_dtype in ("float32", "int8"):
        config = replace(SMALL, kv_dtype=kv_dtype, kv_cache_memory=200_000)
        driver = drive(Engine(model, tokenizer, config))
        driver.add("x", prompt, replace(GREEDY, prompt_logprobs=0))
        driver.run()
        found[kv_dtype] = driver.engine.stats().pages.total, [s.logprob for s in driver.scores["x"].logprobs]
    assert found["int8"][0] == 200_000 // (16 * 2 * 3 * 2 * (16 + 4)) > 3 * found["float32"][0]
    wide, narrow = (torch.tensor(found[name][1]) for name in ("float32", "int8"))
    assert 0 < (wide - narrow).abs().max() < 0.1


def test_loops_thoughts_and_bias_work_in_the_engine_as_in_the_generator(
    network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any
) -> None:
    model = network("packed-dense")
    driver = drive(Engine(model, tokenizer, replace(SMALL, speculation=NgramSpeculation(min_ngram=1))))
    loop = ernie45.LoopDetection(repeats=4, max_pattern=3, min_tokens=8)
    cases = {
        "loop": SamplingParams(temperature=0, logit_bias={9: 100}, loop_detection=loop, max_tokens=40),
        "thought": SamplingParams(seed=1, reasoning_max_tokens=5, max_tokens=20, ignore_eos=True),
        "words": SamplingParams(seed=2, bad_words=("a", "bc"), stop=("zz",), max_tokens=40),
    }
    prompt = [*tokens(1, 20), 3]
    for name, params in cases.items():
        driver.add(name, prompt, params)
    driver.run()
    for name, params in cases.items():
        assert driver.outputs[name, 0] == reference(model, tokenizer, prompt, params)
    assert driver.completion("loop").finish_detail == "loop"
    assert driver.ids("loop") == [9] * 8
    assert driver.ids("thought")[5] == 4
    assert driver.ends["thought"].usage.reasoning_tokens == 5


def test_requests_that_do_not_fit_are_refused_and_not_taken(
    network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any
) -> None:
    driver = drive(Engine(network("dense"), tokenizer, SMALL))
    with pytest.raises(RequestError, match="prompt has 128 tokens, the model's context holds 128"):
        driver.add("x", tokens(1, 128))
    with pytest.raises(RequestError, match="prompt has 100 tokens and max_tokens is 29.*lower max_tokens to 28"):
        driver.add("x", tokens(1, 100), SamplingParams(max_tokens=29))
    with pytest.raises(RequestError, match="token ids from 5 to 101"):
        driver.add("x", [5, 101])
    with pytest.raises(RequestError, match="the prompt is empty"):
        driver.add("x", [])
    with pytest.raises(RequestError, match="priority is 1.5"):
        driver.add("x", [5], priority=1.5)
    with pytest.raises(RequestError, match="timeout_s is 0"):
        driver.add("x", [5], timeout_s=0)
    assert not driver.engine.has_work
    driver.add("x", [5], GREEDY)
    with pytest.raises(RequestError, match="request id 'x' is in use"):
        driver.add("x", [6], GREEDY)
    driver.run()
    driver.add("full", tokens(1, 100), SamplingParams(ignore_eos=True, seed=0))
    driver.ends.clear()
    driver.run()
    assert len(driver.ids("full")) == 28


def test_priority_reaches_the_scheduler(network: Any, tokenizer: Tokenizer, tokens: Any, drive: Any) -> None:
    driver = drive(Engine(network("dense"), tokenizer, replace(SMALL, max_num_seqs=1)))
    for name, priority in (("low", 0), ("lower", -5), ("high", 5)):
        driver.add(name, tokens(1, 10), GREEDY, priority=priority)
    driver.run()
    assert list(driver.ends) == ["high", "low", "lower"]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"max_model_len": 1}, ConfigError, "max_model_len is 1, expected a whole number from 2 on"),
        ({"max_model_len": 200_000}, ConfigError, "max_model_len is 200000, the model's context holds 131072"),
        ({"max_num_seqs": 0}, ConfigError, "max_num_seqs is 0, expected a whole number from 1 to 4096"),
        ({"page_size": 24}, ConfigError, "page_size is 24"),
        ({"kv_dtype": "fp8"}, ConfigError, "kv_dtype is 'fp8', expected float32, bfloat16 or int8"),
        ({"max_step_tokens": 0}, ConfigError, "max_step_tokens is 0"),
        ({"max_step_tokens_beside_decodes": 1.5}, ConfigError, "max_step_tokens_beside_decodes is 1.5"),
        ({"speculation": MtpSpeculation()}, ConfigError, "the model has no multi-token prediction block"),
        ({"kv_cache_memory": 10_000}, CapacityError, "kv_cache_memory of 10000 bytes holds 0 tokens"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    small_model: Any, tokenizer: Tokenizer, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Engine(small_model(), tokenizer, EngineConfig(**fields))


def test_networks_that_the_kernels_cannot_run_are_refused(small_model: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="the model is bfloat16 on cpu, the engine computes in float32"):
        Engine(small_model(dtype=torch.bfloat16), tokenizer)
    with pytest.raises(ConfigError, match="head_dim is 8"):
        Engine(small_model(head_dim=8), tokenizer)


def test_defaults(network: Any, tokenizer: Tokenizer) -> None:
    engine = Engine(network("packed-moe"), tokenizer)
    assert (engine.config.max_model_len, engine.config.kv_dtype) == (8192, "bfloat16")
    assert engine.stats().pages.total == 32 * 8192 // 16
