"""One output, fed with logits that are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ernie45 import LoopDetection, SamplingParams
from ernie45.engine.generation import Generation
from ernie45.engine.pieces import Piece, join
from ernie45.errors import RequestError
from ernie45.processing.tokenizer import Tokenizer

THINK, END_THINK = 3, 4


class Even:
    """A mask: even ids, and after four tokens nothing at all."""

    def allowed(self, output: Sequence[int]) -> torch.Tensor | None:
        return torch.arange(101) % 2 == 0 if len(output) < 4 else torch.zeros(101, dtype=torch.bool)

    def finished(self, output: Sequence[int]) -> bool:
        return False


def start(
    tokenizer: Tokenizer, prompt: Sequence[int] = (5,), choice: int = 0, mask: Any = None, **params: Any
) -> Generation:
    params = {"temperature": 0, "max_tokens": 200} | params
    return Generation(
        tokenizer, prompt, SamplingParams(**params), max_tokens=params["max_tokens"], choice=choice, mask=mask
    )


def preferring(*ids: int) -> torch.Tensor:
    """Logits that like these ids, the first one most."""
    logits = torch.full((101,), -5.0)
    for rank, i in enumerate(ids):
        logits[i] = 10.0 - rank
    return logits


def play(generation: Generation, script: Sequence[int]) -> list[Piece]:
    """Feed logits that like one token after the other, as long as the output goes on."""
    pieces = []
    for token in script:
        pieces.append(generation.step(preferring(token, 50, 51)))
        if generation.finished:
            break
    return pieces


def test_bias_moves_the_choice(tokenizer: Tokenizer) -> None:
    logits = preferring(10, 11)
    assert start(tokenizer).step(logits).ids == (10,)
    assert start(tokenizer, logit_bias={11: 1.5}).step(logits).ids == (11,)
    assert start(tokenizer, logit_bias={10: -100, 11: -100, 40: 3}).step(logits).ids == (40,)
    drawn = {start(tokenizer, logit_bias={7: 100}, temperature=1.0, seed=s).step(logits).ids for s in range(20)}
    assert drawn == {(7,)}
    with pytest.raises(RequestError, match="logit_bias holds id 101, the tokenizer knows 0 to 100"):
        start(tokenizer, logit_bias={101: 1})
    with pytest.raises(RequestError, match="stop_token_ids holds id 200"):
        start(tokenizer, stop_token_ids=(200,))


def test_bad_words_of_one_token_and_of_several(tokenizer: Tokenizer) -> None:
    script = tokenizer.encode("the cat, cab, at")
    assert join(play(start(tokenizer, max_tokens=len(script)), script), 0).text == "the cat, cab, at"
    done = join(play(start(tokenizer, max_tokens=len(script), bad_words=("cat",)), script), 0).text
    other = tokenizer.decode([50])
    assert done == f"the ca{other}, cab, at", "the last token is replaced, where the others stand before it"
    done = join(play(start(tokenizer, max_tokens=len(script), bad_words=("a", "xyz")), script), 0).text
    assert done == f"the c{other}t, c{other}b, {other}t"


def test_a_thought_ends_when_its_budget_is_used_up(tokenizer: Tokenizer) -> None:
    script = [*range(10, 30)]
    generation = start(tokenizer, prompt=(5, THINK), reasoning_max_tokens=3, max_tokens=8)
    ids = join(play(generation, script), 0).ids
    assert ids == (10, 11, 12, END_THINK, 14, 15, 16, 17)
    assert generation.thought.num_tokens == 3
    assert join(play(start(tokenizer, prompt=(THINK,), reasoning_max_tokens=0, max_tokens=3), script), 0).ids == (
        END_THINK, 11, 12,
    )  # fmt: skip
    free = start(tokenizer, prompt=(5, THINK), max_tokens=8)
    assert join(play(free, script), 0).ids == tuple(range(10, 18))
    assert free.thought.num_tokens == 8


def test_a_thought_that_ends_by_itself_or_begins_in_the_output(tokenizer: Tokenizer) -> None:
    early = start(tokenizer, prompt=(THINK,), reasoning_max_tokens=5, max_tokens=9)
    script = [10, END_THINK, *range(20, 30)]
    assert join(play(early, script), 0).ids == tuple(script[:9])
    assert early.thought.num_tokens == 1
    late = start(tokenizer, prompt=(THINK, 9, END_THINK), reasoning_max_tokens=2, max_tokens=7)
    assert join(play(late, [30, 31, THINK, 32, 33, 34, 35]), 0).ids == (30, 31, THINK, 32, 33, END_THINK, 35)
    assert late.thought.num_tokens == 2


def test_a_budget_needs_a_token_that_ends_thoughts(tokenizer: Tokenizer, tmp_path: Any) -> None:
    class Without:
        def __init__(self) -> None:
            self.special_tokens: dict[str, int] = {}

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    without: Any = Without()
    with pytest.raises(RequestError, match="reasoning_max_tokens is 4, but the tokenizer has no </think> token"):
        start(without, reasoning_max_tokens=4)
    start(without)


def test_the_answer_proper_has_a_limit_of_its_own(tokenizer: Tokenizer) -> None:
    pieces = play(start(tokenizer, prompt=(THINK,), response_max_tokens=2), [10, 11, 12, END_THINK, 20, 21, 22])
    assert join(pieces, 0).ids == (10, 11, 12, END_THINK, 20, 21)
    assert pieces[-1].finish_reason == "length"
    assert len(play(start(tokenizer, response_max_tokens=2), [20, 21, 22])) == 2


def test_listed_ids_are_never_chosen(tokenizer: Tokenizer) -> None:
    generation = start(tokenizer, bad_words_token_ids=(11, 10))
    assert [generation.step(preferring(10, 11, 12)).ids for _ in range(2)] == [(12,), (12,)]
    with pytest.raises(RequestError, match="bad_words_token_ids holds id 101, the tokenizer knows 0 to 100"):
        start(tokenizer, bad_words_token_ids=(101,))


def test_loops_end_an_output_and_say_so(tokenizer: Tokenizer) -> None:
    loop = LoopDetection(repeats=3, max_pattern=8, min_tokens=9)
    pieces = play(start(tokenizer, loop_detection=loop), [20, *[30, 31, 32] * 20])
    assert (pieces[-1].finish_reason, pieces[-1].finish_detail) == ("stop", "loop")
    assert len(pieces) == 1 + 9, "three times three tokens"
    assert join(pieces, 0).finish_detail == "loop"
    short = play(start(tokenizer, loop_detection=loop), [30] * 40)
    assert len(short) == 9, "one token nine times, as fewer are too few"
    untouched = play(start(tokenizer), [20, *[30, 31, 32] * 20])
    assert (len(untouched), untouched[-1].finish_reason) == (61, None)
    varied = play(start(tokenizer, loop_detection=loop), [*range(20, 90), *range(20, 90)])
    assert varied[-1].finish_reason is None
    wide = [*range(20, 29)] * 10  # nine tokens: longer than the longest pattern
    assert play(start(tokenizer, loop_detection=loop), wide)[-1].finish_detail is None


def test_an_end_token_wins_over_a_loop_and_length_loses(tokenizer: Tokenizer) -> None:
    loop = LoopDetection(repeats=2, max_pattern=4, min_tokens=2)
    last = play(start(tokenizer, loop_detection=loop, max_tokens=2), [30, 30])[-1]
    assert (last.finish_reason, last.finish_detail) == ("stop", "loop")
    last = play(start(tokenizer, loop_detection=loop, stop=("!!",)), tokenizer.encode("!!"))[-1]
    assert (last.finish_reason, last.stop_reason, last.finish_detail) == ("stop", "!!", None)


def test_a_mask_decides_what_may_come(tokenizer: Tokenizer) -> None:
    generation = start(tokenizer, mask=Even())
    assert [generation.step(preferring(11, 13, 20)).ids[0] for _ in range(4)] == [20] * 4
    with pytest.raises(RequestError, match="every token is banned"):
        generation.step(preferring(11, 13, 20))


def test_a_mask_says_when_the_output_is_whole(tokenizer: Tokenizer) -> None:
    class Pair(Even):
        def finished(self, output: Sequence[int]) -> bool:
            return len(output) == 2

    loop = LoopDetection(repeats=2, max_pattern=4, min_tokens=2)
    ways: list[dict[str, Any]] = [
        {},
        {"loop_detection": loop},
        {"max_tokens": 2},
        {"min_tokens": 4, "ignore_eos": True},
    ]
    for params in ways:
        generation = start(tokenizer, mask=Pair(), **params)
        first, last = (generation.step(preferring(20)) for _ in range(2))
        assert (first.finish_reason, generation.finished) == (None, True)
        assert (last.finish_reason, last.stop_reason, last.finish_detail) == ("stop", None, None)


def test_special_tokens_in_the_text_are_a_choice(tokenizer: Tokenizer) -> None:
    script = [2, 10, END_THINK, 11]  # 2 is <|im_end|>, which ends an answer and is none of its tags
    plain = tokenizer.decode([10, 11])
    texts = {}
    for special in ("skip", "keep"):
        pieces = play(start(tokenizer, special_tokens=special, ignore_eos=True, max_tokens=4), script)
        texts[special] = join(pieces, 0).text
    assert texts == {"skip": plain, "keep": f"<|im_end|>{plain[0]}</think>{plain[1]}"}


def test_tags_of_answers_can_be_kept_alone(thinking_tokenizer: Tokenizer) -> None:
    tags = [thinking_tokenizer.special_tokens[text] for text in ("<|im_end|>", "</think>")]
    generation = start(thinking_tokenizer, special_tokens="answer_tags", ignore_eos=True, max_tokens=2)
    assert join(play(generation, tags), 0).text == "</think>"


def test_a_stop_string_can_be_part_of_the_output(tokenizer: Tokenizer) -> None:
    script = tokenizer.encode("one two")
    kept = play(start(tokenizer, stop=("tw",), include_stop_str_in_output=True), script)
    left_out = play(start(tokenizer, stop=("tw",)), script)
    assert (join(kept, 0).text, join(left_out, 0).text) == ("one tw", "one ")


def test_choices_have_seeds_of_their_own(tokenizer: Tokenizer) -> None:
    flat = torch.zeros(101)

    def run(seed: int, choice: int) -> list[int]:
        generation = start(tokenizer, choice=choice, seed=seed, temperature=1.0, ignore_eos=True)
        return [generation.step(flat).ids[0] for _ in range(12)]

    assert run(7, 2) == run(8, 1) == run(9, 0)
    assert run(7, 0) != run(7, 1)


def test_log_probabilities_of_a_forced_token_are_those_of_the_model(tokenizer: Tokenizer) -> None:
    (piece,) = play(start(tokenizer, prompt=(THINK,), reasoning_max_tokens=0, logprobs=1), [10])[:1]
    assert piece.logprobs[0].id == END_THINK
    assert piece.logprobs[0].top[0][0] == 10
    assert piece.logprobs[0].logprob < -10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n is 0, expected a whole number from 1 to 128"),
        ({"n": 3, "best_of": 2}, "best_of 2 is less than n 3"),
        ({"best_of": 0}, "best_of is 0"),
        ({"seed": 2**63 - 1, "n": 2}, "leaves no seeds for 2 choices"),
        ({"logit_bias": {3: 101}}, "logit_bias of id 3 is 101, expected a number from -100 to 100"),
        ({"logit_bias": {-1: 1}}, "an id in logit_bias is -1"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias holds 1025 ids, expected at most 1024"),
        ({"bad_words": ("",)}, "bad_words holds 1 entries"),
        ({"stop_token_ids": ("x",)}, "an id in stop_token_ids is 'x'"),
        ({"special_tokens": "all"}, "special_tokens is 'all', expected one of skip, answer_tags, keep"),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21"),
        ({"bad_words_token_ids": (-1,)}, "an id in bad_words_token_ids is -1"),
        ({"stop_token_ids": tuple(range(1025))}, "stop_token_ids holds 1025 ids, expected at most 1024"),
        ({"response_max_tokens": 0}, "response_max_tokens is 0"),
        ({"reasoning_max_tokens": -1}, "reasoning_max_tokens is -1"),
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**fields)


def test_loop_settings_are_checked() -> None:
    with pytest.raises(RequestError, match="loop_detection.repeats is 1, expected a whole number from 2 to 1000"):
        LoopDetection(repeats=1)
    with pytest.raises(RequestError, match="loop_detection.max_pattern is 0"):
        LoopDetection(max_pattern=0)
