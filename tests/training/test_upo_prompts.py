"""Prompts: rows in all their forms as serving encodes them, and an order that can be resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ernie45
from ernie45.errors import CheckpointError, ConfigError, RequestError, ShapeError
from ernie45.training.data.config import SourceConfig
from ernie45.training.prompts import Prompt, PromptList, derived_seed, load_prompts, prompt_of_row


@pytest.fixture(scope="module")
def tokenizer(train_byte_level: Any) -> Any:
    return ernie45.load_tokenizer(train_byte_level(["one two three"], special=["<s>", "</s>"], bos="<s>"))


def test_every_form_is_encoded_as_serving_does(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one two?"}]
    chat = prompt_of_row({"messages": messages, "answer": "3"}, tokenizer)
    assert chat.ids == tuple(tokenizer.encode(tokenizer.render(messages)))
    assert (chat.text, chat.row["answer"]) == ("one two?", "3")
    question = prompt_of_row({"prompt": "one?"}, tokenizer)
    assert question.ids == tuple(tokenizer.encode(tokenizer.render([{"role": "user", "content": "one?"}])))
    assert prompt_of_row({"prompt": messages}, tokenizer).ids == chat.ids
    plain = prompt_of_row({"text": "one two"}, tokenizer)
    assert (plain.ids, plain.text) == (tuple(tokenizer.encode("one two")), "one two")


def test_tools_and_thinking_reach_the_template() -> None:
    seen: list[Any] = []

    class Template:
        """What of a tokenizer is asked."""

        def render(self, messages: Any, tools: Any, *, thinking: bool | None) -> str:
            seen.append((tools, thinking))
            return "x"

        def encode(self, text: str) -> list[int]:
            return [1]

    template: Any = Template()
    prompt_of_row({"prompt": "one", "tools": ["t"]}, template, thinking=True)
    prompt_of_row({"prompt": "one"}, template)
    assert seen == [(["t"], True), (None, None)]


def test_rows_of_a_file(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": "one"}, {"prompt": "two", "subset": "hard"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = load_prompts([SourceConfig(path=str(path))], tokenizer)
    assert (first.subset, second.subset) == ("sums", "hard")
    assert first.origin.endswith("sums.jsonl:1")
    with pytest.raises(RequestError, match="sums.jsonl:1: the prompt has .* max_prompt_len is 2"):
        load_prompts([SourceConfig(path=str(path))], tokenizer, max_prompt_len=2)
    path.write_text('{"prompt": "one"}\n{"answer": 3}\n')
    with pytest.raises(RequestError, match="sums.jsonl:2: the row has no messages, prompt or text"):
        load_prompts([SourceConfig(path=str(path))], tokenizer)


def test_prompts_come_in_a_new_order_each_round_and_resume() -> None:
    prompts = [Prompt(ids=(number,)) for number in range(5)]
    stream = PromptList(prompts, seed=3)
    drawn = [stream.next_row()[0].ids[0] for _ in range(7)]
    state = stream.state()
    drawn += [stream.next_row()[0].ids[0] for _ in range(8)]
    rounds = [drawn[start : start + 5] for start in range(0, 15, 5)]
    assert all(sorted(one) == list(range(5)) for one in rounds)
    assert len(set(map(tuple, rounds))) > 1
    again = PromptList(prompts, seed=3)
    again.restore(state)
    assert [again.next_row()[0].ids[0] for _ in range(8)] == drawn[7:]
    other = PromptList(prompts, seed=4)
    assert [other.next_row()[0].ids[0] for _ in range(15)] != drawn


def test_prompts_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="no prompts"):
        PromptList([])
    with pytest.raises(ShapeError, match="a:3 has no tokens"):
        PromptList([Prompt(ids=(), origin="a:3")])
    with pytest.raises(CheckpointError, match="other prompts"):
        PromptList([Prompt(ids=(1,))]).restore(PromptList([Prompt(ids=(2,))]).state())


def test_seeds_derive_from_all_their_parts() -> None:
    seeds = {derived_seed(*parts) for parts in ((1, 2), (2, 1), (12,), (1, 2, 0))}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**60 for seed in seeds)
