"""Answers of the engine are what they are forced to be, in any company, and the mask depends on the output alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45 import Constraint, EngineConfig, NgramSpeculation, SamplingParams, load_tokenizer
from ernie45.engine.engine import Engine
from ernie45.engine.grammar_mask import GrammarMask, grammar_masks
from ernie45.engine.pieces import Completion
from ernie45.engine.sampling import LogitsMask
from ernie45.errors import RequestError
from ernie45.layers.native import use_kernel_leaves
from ernie45.models.text import CausalLM
from ernie45.processing.answer_format import Start
from ernie45.processing.answer_parser import AnswerParser, collected
from ernie45.processing.detokenizer import Detokenizer
from ernie45.processing.grammar import Grammars
from ernie45.processing.tokenizer import Tokenizer

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

CONFIG = EngineConfig(max_model_len=192, page_size=16, max_num_seqs=8)
PARAMS = SamplingParams(seed=7, max_tokens=60)
PROMPT = tuple(range(20, 50))
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6, "pattern": "^[a-z ]*$"},
        "kind": {"enum": ["alpha", "beta"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}
CHOICES = ["yes", "yes, but", "no", "née 😀"]
PATTERN = "(ab|c){2,5}!?"


def _is_json(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


KINDS: dict[str, tuple[Constraint, Callable[[str], bool]]] = {
    "schema": (Constraint.json_schema(SCHEMA), _is_json),
    "regex": (Constraint.regex(PATTERN), lambda text: re.fullmatch(PATTERN, text) is not None),
    "choice": (Constraint.choice(CHOICES), lambda text: text in CHOICES),
}


@dataclass(frozen=True)
class Setting:
    """A network with more rows than the vocabulary has ids, as published ones have."""

    model: CausalLM
    tokenizer: Tokenizer
    grammars: Grammars

    def masks(self, constraint: Constraint, prompt: Sequence[int] = PROMPT) -> Any:
        return grammar_masks(self.grammars, self.tokenizer, constraint, prompt)

    def engine(self, **changes: Any) -> Engine:
        return Engine(self.model, self.tokenizer, replace(CONFIG, **changes))

    def one(self, drive: Any, kind: str, params: SamplingParams, **changes: Any) -> list[Completion]:
        """The choices that a request gets alone."""
        driver = drive(self.engine(**changes))
        driver.add("x", PROMPT, params, new_mask=self.masks(KINDS[kind][0]))
        driver.run()
        return [driver.completion("x", index) for index in range(params.n)]


def _setting(folder: Path, small_model: Any, chat_format: str | None = None) -> Setting:
    tokenizer = load_tokenizer(folder, chat_format=chat_format)
    model = small_model(vocab_size=330)
    use_kernel_leaves(model)
    return Setting(model.requires_grad_(False), tokenizer, Grammars(tokenizer))


@pytest.fixture(scope="module")
def plain(small_model: Any, train_byte_level: Any) -> Setting:
    return _setting(train_byte_level(["the yes no alpha beta"], special=["<s>", "</s>"], bos="<s>"), small_model)


@pytest.fixture(scope="module")
def thinking(small_model: Any, train_byte_level: Any) -> Setting:
    special = ["<s>", "</s>", "<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>"]
    folder = train_byte_level(["the yes no alpha beta"], special=special, bos="<s>")
    return _setting(folder, small_model, "ernie_thinking")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("greedy", [True, False])
def test_finished_answers_are_what_was_asked_for(plain: Setting, drive: Any, kind: str, greedy: bool) -> None:
    params = replace(PARAMS, n=3, max_tokens=100)
    if greedy:  # a random network would write one token until the limit
        params = replace(params, temperature=0.0, frequency_penalty=2.0)
    reasons = []
    for ignore_eos in (False, True):
        for choice in plain.one(drive, kind, replace(params, ignore_eos=ignore_eos)):
            reasons.append(choice.finish_reason)
            assert choice.finish_reason == "length" or KINDS[kind][1](choice.text)
            assert choice.text == plain.tokenizer.decode(choice.ids)
    assert "stop" in reasons


def test_nothing_follows_a_whole_answer(plain: Setting, drive: Any) -> None:
    driver = drive(plain.engine())
    never_ends = replace(PARAMS, min_tokens=40, ignore_eos=True)
    driver.add("x", PROMPT, never_ends, new_mask=plain.masks(Constraint.choice(["alpha"])))
    driver.run()
    found = driver.completion("x")
    assert (found.text, found.finish_reason, found.stop_reason, found.finish_detail) == ("alpha", "stop", None, None)


WAYS: dict[str, dict[str, Any]] = {
    "guesses": {"speculation": NgramSpeculation(min_ngram=1)},
    "chunks": {"max_step_tokens": 3, "max_step_tokens_beside_decodes": 1},
    "one at a time": {"max_num_seqs": 1},
    # Three sequences of up to 90 tokens on seven pages of 16: they take turns.
    "preempted": {"max_model_len": 112, "kv_cache_memory": 7 * 16 * 2 * 3 * 2 * 16 * 4, "prefix_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["schema", "regex"])
def test_the_way_of_computing_changes_nothing(plain: Setting, drive: Any, kind: str, way: str) -> None:
    params = replace(PARAMS, n=3)
    expected = plain.one(drive, kind, params)
    driver = drive(plain.engine(**WAYS[way]))
    driver.add("x", PROMPT, params, new_mask=plain.masks(KINDS[kind][0]))
    driver.run()
    assert [driver.completion("x", index) for index in range(3)] == expected
    stats = driver.engine.stats()
    if kind == "schema":
        assert (stats.preemptions > 0) == (way == "preempted")
    if way == "guesses":
        assert stats.drafted_tokens


def test_company_changes_nothing(plain: Setting, drive: Any) -> None:
    """Constrained and free requests share steps, and two share one compiled grammar."""
    asked: list[tuple[str | None, int]] = [("schema", 1), (None, 2), ("schema", 2), ("choice", 3), ("regex", 1)]
    together = drive(plain.engine(speculation=NgramSpeculation()))
    alone: list[Completion] = []
    for name, (kind, seed) in enumerate(asked):
        new_mask = None if kind is None else plain.masks(KINDS[kind][0])
        params = replace(PARAMS, seed=seed)
        driver = drive(plain.engine())
        for into in (driver, together):
            into.add(str(name), PROMPT, params, new_mask=new_mask)
        driver.run()
        alone.append(driver.completion(str(name)))
    together.run()
    assert [together.completion(str(name)) for name in range(len(asked))] == alone
    assert alone[0].ids != alone[2].ids


def test_what_cannot_be_written_fails_alone_and_once(
    tokenizer: Tokenizer, network: Any, tokens: Any, drive: Any
) -> None:
    """The vocabulary of these 101 ids has no byte beyond ASCII."""
    setting = Setting(network("dense"), tokenizer, Grammars(tokenizer))
    prompt = tokens(1, 9)
    driver = drive(setting.engine())
    driver.add("impossible", prompt, PARAMS, new_mask=setting.masks(Constraint.choice(["é"])))
    driver.add("later", prompt, PARAMS, new_mask=setting.masks(Constraint.choice(["aé"])))
    driver.add("fine", prompt, PARAMS, new_mask=setting.masks(Constraint.choice(["ab", "ba"])))
    driver.run()  # which proves that nothing comes behind an end
    for name in ("impossible", "later"):
        assert driver.ends[name].kind == "failed"
        assert driver.ends[name].reason == "choice: no token of the vocabulary continues the answer"
    assert driver.ends["fine"].kind == "finished"
    assert driver.completion("fine").text in ("ab", "ba")


NUMBER = {"properties": {"n": {"enum": [1, 22]}}, "required": ["n"], "additionalProperties": False}


def test_every_call_in_free_text_keeps_to_its_schema(thinking: Setting, drive: Any) -> None:
    """The network likes to open calls and to end; what stands in them is up to chance."""
    tokenizer = thinking.tokenizer
    constraint = Constraint.tool_calls([{"name": "f", "strict": True, "parameters": NUMBER}], required=False)
    bias = {tokenizer.special_tokens["<tool_call>"]: 4.0, next(iter(tokenizer.stop_ids)): 3.0}
    params = replace(PARAMS, n=8, max_tokens=150, logit_bias=bias)
    prompt = [*PROMPT, tokenizer.special_tokens["</think>"]]
    outputs = []
    for speculation in (None, NgramSpeculation(min_ngram=1)):
        driver = drive(thinking.engine(speculation=speculation))
        driver.add("x", prompt, params, new_mask=thinking.masks(constraint, prompt))
        driver.run()
        outputs.append([driver.completion("x", index) for index in range(8)])
    assert outputs[0] == outputs[1]
    calls = []
    for choice in outputs[0]:
        detokenizer = Detokenizer(tokenizer, keep=tokenizer.answer_tag_ids)
        parser = AnswerParser(tokenizer.answer_format, start="answer", tools=True)
        text = "".join([*map(detokenizer.push, choice.ids), detokenizer.finish()])
        answer = collected([*parser.push(text), *parser.finish()])
        ended = answer.tool_calls if choice.finish_reason == "stop" else answer.tool_calls[:-1]
        calls += [(call.name, json.loads(call.arguments), call.error) for call in ended]
    assert len(calls) > 3
    assert all(call in [("f", {"n": 1}, None), ("f", {"n": 22}, None)] for call in calls)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_the_caller_began_is_part_of_the_answer(
    plain: Setting, thinking: Setting, drive: Any, kind: str
) -> None:
    begun = {"schema": '{"name": "a', "regex": "abc", "choice": "yes"}[kind]
    for setting in (plain, thinking):
        prompt = [*PROMPT, *setting.tokenizer.encode(begun)]
        masks = grammar_masks(setting.grammars, setting.tokenizer, KINDS[kind][0], prompt, begun=begun)
        driver = drive(setting.engine())
        driver.add("x", prompt, replace(PARAMS, n=3, max_tokens=100), new_mask=masks)
        driver.run()
        choices = [driver.completion("x", index) for index in range(3)]
        finished = [choice for choice in choices if choice.finish_reason == "stop"]
        assert finished
        for choice in finished:
            parser = AnswerParser(setting.tokenizer.answer_format, start="text")
            detokenizer = Detokenizer(setting.tokenizer, keep=setting.tokenizer.answer_tag_ids)
            text = "".join([*map(detokenizer.push, choice.ids), detokenizer.finish()])
            assert KINDS[kind][1](begun + collected([*parser.push(text), *parser.finish()]).content)


@pytest.mark.parametrize(
    ("constraint", "begun", "reason"),
    [
        (Constraint.choice(CHOICES), "maybe", "choice does not allow the text"),
        (Constraint.regex("abc"), "abc", "regex leaves nothing to add"),
        (Constraint.tool_calls([{"name": "f"}]), "a", "cannot go on with a text"),
    ],
)
def test_a_text_that_cannot_be_continued(plain: Setting, constraint: Constraint, begun: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        grammar_masks(plain.grammars, plain.tokenizer, constraint, PROMPT, begun=begun)()


@pytest.mark.parametrize("budget", [0, 5, None])
@pytest.mark.parametrize("start", ["thought", "answer", "open"])
def test_constraints_begin_behind_the_thought(thinking: Setting, drive: Any, start: Start, budget: int | None) -> None:
    tokenizer = thinking.tokenizer
    tag = {"thought": "<think>", "answer": "</think>"}.get(start)
    prompt = [*PROMPT, *([] if tag is None else [tokenizer.special_tokens[tag], *tokenizer.encode("\n")])]
    assert tokenizer.answer_start(prompt) == start
    # A network that knows how to think ends its thoughts; this one needs a push.
    bias = {tokenizer.special_tokens["</think>"]: 3.0, next(iter(tokenizer.stop_ids)): 3.0}
    params = replace(PARAMS, n=4, max_tokens=100, reasoning_max_tokens=budget, logit_bias=bias)
    outputs = []
    for speculation in (None, NgramSpeculation(min_ngram=1)):
        driver = drive(thinking.engine(speculation=speculation))
        driver.add("x", prompt, params, new_mask=thinking.masks(KINDS["choice"][0], prompt))
        driver.run()
        assert driver.ends["x"].kind == "finished"
        outputs.append([driver.completion("x", index) for index in range(4)])
    assert outputs[0] == outputs[1]
    finished = [choice for choice in outputs[0] if choice.finish_reason == "stop"]
    assert finished
    for choice in finished:
        detokenizer = Detokenizer(tokenizer, keep=tokenizer.answer_tag_ids)
        parser = AnswerParser(tokenizer.answer_format, start=start)
        text = "".join([*map(detokenizer.push, choice.ids), detokenizer.finish()])
        assert collected([*parser.push(text), *parser.finish()]).content in CHOICES


def test_a_thought_ends_behind_a_character_not_inside(thinking: Setting, drive: Any) -> None:
    """The budget is over after the first byte of an é."""
    special = thinking.tokenizer.special_tokens
    first, second = (thinking.tokenizer.vocabulary.data.index(bytes([byte])) for byte in "é".encode())
    prompt = [*PROMPT, special["<think>"]]
    bias = {first: 50.0, second: 100.0}
    params = replace(PARAMS, temperature=0.0, reasoning_max_tokens=1, logit_bias=bias)
    driver = drive(thinking.engine())
    driver.add("x", prompt, params, new_mask=thinking.masks(Constraint.choice(["yes"]), prompt))
    driver.run()
    assert driver.ids("x")[:3] == [first, second, special["</think>"]]
    assert driver.completion("x").finish_reason == "stop"


class Unprepared:
    """A mask that does not work ahead."""

    def __init__(self, mask: LogitsMask) -> None:
        self.allowed, self.finished = mask.allowed, mask.finished


@pytest.mark.parametrize("way", [{}, *WAYS.values()], ids=["plain", *WAYS])
def test_working_ahead_changes_nothing(plain: Setting, drive: Any, way: dict[str, Any]) -> None:
    found = []
    for wrap in (Unprepared, lambda mask: mask):
        driver = drive(plain.engine(**way))
        for name, (constraint, _) in KINDS.items():
            masks = plain.masks(constraint)
            driver.add(name, PROMPT, replace(PARAMS, n=2), new_mask=lambda masks=masks, wrap=wrap: wrap(masks()))
        driver.step()
        driver.engine.abort("regex")
        driver.run()
        found.append([driver.completion(name, index) for name in KINDS if name != "regex" for index in range(2)])
    assert found[0] == found[1]


Place = st.tuples(st.integers(0, 2), st.integers(0, 30), st.booleans())


@given(places=st.lists(Place, max_size=12))
@settings(max_examples=30, deadline=None)
def test_a_mask_depends_on_the_output_alone(plain: Setting, places: list[tuple[int, int, bool]]) -> None:
    constraint = Constraint.json_schema(SCHEMA)
    texts = ['{"name": "a b", "kind": "beta", "sizes": []}', '{"name": "a", "kind": "alpha"', '{\n "name":"']
    used = GrammarMask(plain.grammars.matcher(constraint))
    for text, length, ahead in places:
        output = plain.tokenizer.encode(texts[text])[:length]
        fresh = GrammarMask(plain.grammars.matcher(constraint))
        if ahead:  # and perhaps in vain, for another output
            if not fresh.finished(output):
                used.prepare(output)
            continue
        assert used.finished(output) == fresh.finished(output)
        if not fresh.finished(output):
            allowed = used.allowed(output)
            assert (allowed.dtype, allowed.shape) == (torch.bool, (plain.tokenizer.vocab_size,))
            assert torch.equal(allowed, fresh.allowed(output))


def test_an_end_token_can_be_taken_back(plain: Setting) -> None:
    mask = GrammarMask(plain.grammars.matcher(Constraint.regex("a*")))
    a, end = plain.tokenizer.encode("a")[0], next(iter(plain.tokenizer.stop_ids))
    assert [mask.finished(output) for output in ([a, end], [a], [a, a, end], [end], [])] == [1, 0, 1, 1, 0]
    assert mask.allowed([a])[end]
