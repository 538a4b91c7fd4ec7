"""Offline answers: what the generator gives, in the prompts' order, in any of their forms."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import ernie45
from ernie45 import LLM, Constraint, SamplingParams
from ernie45.errors import ConfigError, NotFoundError, RequestError

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(train_byte_level: Any, small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = ernie45.load_tokenizer(train_byte_level(["one two three"], special=["<s>", "</s>"], bos="<s>"))
    folder: Path = tmp_path_factory.mktemp("llm") / "model"
    ernie45.save_model(small_model(moe=True, vocab_size=330), folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, max_model_len=256)


def test_answers_are_the_generators_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["one", "two three", "a much longer beginning of a text, so that it ends later"]
    params = [SamplingParams(seed=i, max_tokens=12 - 4 * i) for i in range(3)]
    answers = llm.generate(prompts, params)
    for prompt, wanted, answer in zip(prompts, params, answers, strict=True):
        (expected,) = ernie45.generate_batch(llm.model, llm.tokenizer, [prompt], [wanted])
        assert answer.choices == (expected,)
        assert answer.text == expected.text
        assert answer.prompt_ids == tuple(llm.tokenizer.encode(prompt))
        assert answer.prompt_logprobs is None
    assert llm.generate([]) == []


def test_one_prompt_may_come_bare_and_as_ids(llm: LLM) -> None:
    ids = llm.tokenizer.encode("one two")
    whole = [llm.generate(prompt, PARAMS)[0].choices for prompt in ("one two", ["one two"], ids, [ids], tuple(ids))]
    assert all(choices == whole[0] for choices in whole)
    assert len(llm.generate([ids, ids], PARAMS)) == 2


def test_conversations_go_through_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    (one,) = llm.chat(messages, PARAMS)
    two = llm.chat([messages, messages], PARAMS)
    assert one.prompt_ids == tuple(llm.tokenizer.encode(llm.tokenizer.render(messages)))
    assert [answer.choices for answer in two] == [one.choices] * 2
    assert two[0].usage.cached_tokens > 0


def test_a_last_message_is_gone_on_with(llm: LLM) -> None:
    begun: list[dict[str, Any]] = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "one, t"}]
    longer = [
        *begun[:1],
        {"role": "assistant", "content": [{"type": "text", "text": "one,"}, {"type": "text", "text": " two"}]},
    ]
    answers = llm.chat([begun, longer], PARAMS, continue_final_message=True)
    for messages, answer in zip([begun, longer], answers, strict=True):
        rendered = llm.tokenizer.render(messages, continue_final_message=True)
        assert answer.prompt_ids == tuple(llm.tokenizer.encode(rendered))
        assert answer.choices == llm.generate(llm.tokenizer.encode(rendered), PARAMS)[0].choices
    assert answers[0].prompt_ids != llm.chat(begun, PARAMS)[0].prompt_ids
    with pytest.raises(RequestError, match="continue_final_message: messages.0. is the last one and has the role user"):
        llm.chat(begun[:1], PARAMS, continue_final_message=True)


def test_choices_and_prompt_scores(llm: LLM) -> None:
    params = SamplingParams(seed=1, n=3, best_of=5, max_tokens=6, prompt_logprobs=1)
    (answer,) = llm.generate("one two three", params)
    assert len(answer.choices) == 3
    assert answer.prompt_logprobs is not None
    assert [score.id for score in answer.prompt_logprobs] == list(answer.prompt_ids[1:])
    assert answer.usage.completion_tokens >= sum(len(choice.ids) for choice in answer.choices)


def test_a_refused_prompt_leaves_nothing_running(llm: LLM) -> None:
    with pytest.raises(RequestError, match="prompt has 300 tokens"):
        llm.generate([[5], [6] * 300], PARAMS)
    with pytest.raises(RequestError, match="2 sampling parameters for 1 prompts"):
        llm.generate("x", [PARAMS, PARAMS])
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.generate(["one", ""], PARAMS)
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.pages.in_use) == (0, 0, 0)
    assert len(llm.generate("one", PARAMS)) == 1


def test_an_interrupted_call_leaves_nothing_running(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, calls = llm.model.hidden, iter(range(3))

    def interrupted(*args: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return hidden(*args)

    with monkeypatch.context() as patch:
        patch.setattr(llm.model, "hidden", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["one", "two"], PARAMS)
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.pages.in_use) == (0, 0, 0)
    assert len(llm.generate(["one", "two"], PARAMS)) == 2


def test_a_prompt_that_fails_on_the_way_is_named(llm: LLM) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("out of luck")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.model, "hidden", broken)
        with pytest.raises(RequestError, match="prompt 0: the model failed: out of luck"):
            llm.generate(["one", "two"], PARAMS)


def test_progress_is_drawn_when_asked_for(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["one", "two"], PARAMS)
    assert capsys.readouterr().err == ""
    llm.generate(["one", "two"], PARAMS, progress=True)
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith("[########################] 2 of 2 prompts, ")
    assert "tokens/s" in last


def test_a_loaded_network_needs_its_tokenizer(llm: LLM, small_model: Any) -> None:
    again = LLM(llm.model, tokenizer=llm.tokenizer, max_model_len=128)
    assert again.generate("one", PARAMS)[0].choices == llm.generate("one", PARAMS)[0].choices
    with pytest.raises(ConfigError, match="a loaded network comes without a tokenizer"):
        LLM(small_model())


def test_settings_are_checked(folder: Path) -> None:
    with pytest.raises(ConfigError, match="LLM has no setting 'max_seq_len', the nearest is max_model_len"):
        LLM(folder, max_seq_len=5)
    with pytest.raises(ConfigError, match="page_size is 5"):
        LLM(folder, page_size=5)
    with pytest.raises(NotFoundError):
        LLM(folder / "nowhere")


def test_answers_are_forced_into_shape(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    digits, word = Constraint.regex("[0-9]{3}"), Constraint.choice(["one", "two"])
    params = SamplingParams(seed=3, n=2, max_tokens=20)
    answers = llm.generate(["one", "two", "three"], params, constraint=[digits, None, word])
    assert all(re.fullmatch("[0-9]{3}", choice.text) for choice in answers[0].choices)
    assert answers[1].choices == llm.generate("two", params)[0].choices
    assert all(choice.text in ("one", "two") and choice.finish_reason == "stop" for choice in answers[2].choices)
    messages = [{"role": "user", "content": "hi"}]
    chosen = llm.chat([messages, messages], params, constraint=word)
    assert {choice.text for answer in chosen for choice in answer.choices} <= {"one", "two"}
    speculating = LLM(llm.model, tokenizer=llm.tokenizer, max_model_len=256, speculation=ernie45.NgramSpeculation())
    again = speculating.generate(["one", "two", "three"], params, constraint=[digits, None, word])
    assert [answer.choices for answer in again] == [answer.choices for answer in answers]


def test_text_that_is_gone_on_with_is_part_of_what_is_forced(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    begun = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "tw"}]
    word = Constraint.choice(["one", "two"])
    (answer,) = llm.chat(begun, PARAMS, constraint=word, continue_final_message=True)
    assert answer.text == "o"
    assert llm.chat(begun, PARAMS, constraint=word)[0].text in ("one", "two")


def test_constraints_are_checked_before_anything_is_computed(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    steps = llm.stats().steps
    with pytest.raises(RequestError, match="1 constraints for 2 prompts"):
        llm.generate(["one", "two"], PARAMS, constraint=[Constraint.regex("a")])
    with pytest.raises(RequestError, match="regex cannot be used: unclosed group"):
        llm.generate(["one", "two"], PARAMS, constraint=[None, Constraint.regex("(")])
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.steps) == (0, 0, steps)


def test_a_constraint_without_its_library_says_what_to_install(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ernie45.processing.grammar.find_spec", lambda _: None)
    fresh = LLM(llm.model, tokenizer=llm.tokenizer, max_model_len=64)
    with pytest.raises(ConfigError, match=r"pip install 'ernie45\[structured\]'"):
        fresh.generate("one", PARAMS, constraint=Constraint.regex("a"))
    assert len(fresh.generate("one", PARAMS)) == 1
