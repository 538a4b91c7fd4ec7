"""Preference and KTO rows as tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ernie45.errors import RequestError, ShapeError
from ernie45.processing.tokenizer import Tokenizer
from ernie45.training.data.config import DataConfig, SourceConfig
from ernie45.training.data.encoding import ChatEncoder
from ernie45.training.data.pairs import KtoExample, PreferencePair, fit_kto, fit_pair
from ernie45.training.data.preference_formats import parse_kto, parse_preference
from ernie45.training.data.rows import RowDroppedError

LONG = {"src": ["one", "two", "three"], "tgt": ["1", "2"], "system": "S", "response": [["c"], ["d d"]], "sort": [3, 1]}


def config(**options: Any) -> DataConfig:
    return DataConfig(train=(SourceConfig(path="x"),), **options)


def pair(tokenizer: Tokenizer, row: dict[str, Any], thoughts: Any = "last", **options: Any) -> PreferencePair:
    return fit_pair(ChatEncoder(tokenizer, thoughts), parse_preference(row, "f:2"), config(**options)).item


def text(tokenizer: Tokenizer, ids: torch.Tensor, marks: torch.Tensor | None = None) -> str:
    kept = ids if marks is None else ids[marks]
    return tokenizer.decode(kept.tolist(), skip_special_tokens=False)


def test_a_pair(ernie: Tokenizer) -> None:
    made = pair(ernie, LONG, mask_out_eos=False)
    assert text(ernie, made.prompt) == (
        "<|begin_of_sentence|>S\nUser: one\nAssistant: 1<|end_of_sentence|>User: two\nAssistant: 2<|end_of_sentence|>"
        "User: three\nAssistant: "
    )
    assert (text(ernie, made.chosen), text(ernie, made.rejected)) == ("c</s>", "d d</s>")
    assert made.chosen_learnt.all()
    assert made.rejected_learnt.all()
    assert (made.score_chosen, made.score_rejected, made.origin) == (3.0, 1.0, "f:2")


def test_the_closing_token_may_go_unscored(ernie: Tokenizer) -> None:
    made = pair(ernie, LONG)
    assert text(ernie, made.chosen) == "c</s>"
    assert text(ernie, made.chosen, made.chosen_learnt) == "c"
    assert text(ernie, made.rejected, made.rejected_learnt) == "d d"


def test_dialogues_of_several_turns_are_compared(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    row = {"src": "q", "response": [["c", "u", "e"], ["d"]], "sort": [1, 0]}
    chatml = tokenizer_of("chatml")
    made = pair(chatml, row, mask_out_eos=False)
    expected = "c<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\ne<|im_end|>"
    assert text(chatml, made.chosen) == expected
    assert text(chatml, made.chosen, made.chosen_learnt) == "c<|im_end|>e<|im_end|>"
    ernie = tokenizer_of("ernie")
    made = pair(ernie, row, mask_out_eos=False)
    assert text(ernie, made.chosen, made.chosen_learnt) == "ce</s>", (
        "the mark between turns is not what the model writes"
    )


def test_a_thought_that_only_one_side_has_is_no_part_of_the_prompt(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    thinking = tokenizer_of("ernie_thinking")
    row = {"src": "q", "response": [["c", "u", "e"], ["<think>t</think>d"]], "sort": [1, 0]}
    made = pair(thinking, row)
    assert text(thinking, made.prompt).endswith("<|im_start|>assistant\n")
    assert text(thinking, made.rejected).startswith("<think>\nt\n</think>")
    assert text(thinking, made.rejected, made.rejected_learnt).startswith("t\n</think>")
    assert text(thinking, made.chosen, made.chosen_learnt).startswith("<response>\nc\n")


@pytest.mark.parametrize("policy", ["drop", "error", "left", "right"])
def test_long_pairs(ernie: Tokenizer, policy: Any) -> None:
    whole = pair(ernie, LONG)
    size = len(whole.prompt) + len(whole.chosen) + len(whole.rejected)
    assert pair(ernie, LONG, long_rows=policy, max_seq_len=size).prompt.equal(whole.prompt)
    options = {"long_rows": policy, "max_seq_len": size - 1}
    if policy == "drop":
        with pytest.raises(RowDroppedError) as dropped:
            pair(ernie, LONG, **options)
        assert (dropped.value.reason, dropped.value.size) == ("too_long", size)
    elif policy == "error":
        with pytest.raises(RequestError, match=f"f:2 has {size} tokens, the limit is {size - 1}"):
            pair(ernie, LONG, **options)
    elif policy == "left":
        made = pair(ernie, LONG, **options)
        assert text(ernie, made.prompt) == (
            "<|begin_of_sentence|>S\nUser: two\nAssistant: 2<|end_of_sentence|>User: three\nAssistant: "
        )
        assert made.rejected.equal(whole.rejected)
    else:
        made = pair(ernie, LONG, **options)
        assert made.prompt.equal(whole.prompt)
        assert made.chosen.equal(whole.chosen), "the longer answer is cut first"
        assert made.rejected.equal(whole.rejected[:-1])
        assert made.rejected_learnt.equal(whole.rejected_learnt[:-1])


def test_long_prompts(ernie: Tokenizer) -> None:
    size = len(pair(ernie, LONG).prompt)
    assert len(pair(ernie, LONG, max_prompt_len=size).prompt) == size
    for policy in ("drop", "right"):
        with pytest.raises(RowDroppedError):
            pair(ernie, LONG, max_prompt_len=size - 1, long_rows=policy)
    assert "two" in text(ernie, pair(ernie, LONG, max_prompt_len=size - 1, long_rows="left").prompt)
    with pytest.raises(RowDroppedError):
        pair(ernie, LONG, max_prompt_len=3, long_rows="left")


def test_cut_answers_need_something_to_score(ernie: Tokenizer) -> None:
    prompt = len(pair(ernie, LONG).prompt)
    made = pair(ernie, LONG, max_seq_len=prompt + 2, long_rows="right")
    assert (len(made.chosen), len(made.rejected)) == (1, 1)
    with pytest.raises(RowDroppedError) as dropped:
        pair(ernie, LONG, max_seq_len=prompt + 1, long_rows="right")
    assert dropped.value.reason == "too_long"


def test_judged_answers(ernie: Tokenizer) -> None:
    encoder = ChatEncoder(ernie)
    row = parse_kto({"prompt": "q", "completion": "a b", "label": False}, "f:4")
    fitted = fit_kto(encoder, row, config())
    made = fitted.item
    assert text(ernie, made.prompt) == "<|begin_of_sentence|>User: q\nAssistant: "
    assert text(ernie, made.completion) == "a b</s>"
    assert text(ernie, made.completion, made.learnt) == "a b"
    assert (made.desirable, made.origin) == (False, "f:4")
    assert fitted.size == len(made.prompt) + len(made.completion)
    assert fitted.num_learnt == len(made.completion) - 1
    assert fit_kto(encoder, row, config(mask_out_eos=False)).item.learnt.all()
    cut = fit_kto(encoder, row, config(max_seq_len=len(made.prompt) + 1, long_rows="right")).item
    assert text(ernie, cut.completion) == "a"
    with pytest.raises(RowDroppedError):
        fit_kto(encoder, row, config(max_seq_len=len(made.prompt) + 1))


def test_shapes_are_checked() -> None:
    ids, marks = torch.tensor([1, 2]), torch.tensor([True, True])
    with pytest.raises(ShapeError, match=r"f:1 has ids \(0,\)"):
        KtoExample(prompt=ids[:0], completion=ids, learnt=marks, desirable=True, origin="f:1")
    with pytest.raises(ShapeError, match="as many marks"):
        KtoExample(prompt=ids, completion=ids, learnt=marks[:1], desirable=True)
    with pytest.raises(ShapeError, match=r"torch.float32"):
        PreferencePair(prompt=ids.float(), chosen=ids, chosen_learnt=marks, rejected=ids, rejected_learnt=marks)
