"""Guesses by looking up what came before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.engine.drafts import MtpSpeculation, NgramDrafter, NgramSpeculation
from ernie45.errors import ConfigError


def slow(tokens: list[int], what: NgramSpeculation) -> tuple[int, ...]:
    """The definition: the longest ending that stood there before, its latest place, what followed."""
    for size in range(what.max_ngram, what.min_ngram - 1, -1):
        for at in range(len(tokens) - 1, size - 1, -1):
            if tokens[at - size : at] == tokens[len(tokens) - size :]:
                return tuple(tokens[at : at + what.max_tokens])
    return ()


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 3), st.integers(1, 5))
def test_guesses_are_what_followed_the_longest_ending_last(tokens: list[int], low: int, more: int, size: int) -> None:
    what = NgramSpeculation(min_ngram=low, max_ngram=low + more, max_tokens=size)
    drafter = NgramDrafter(what)
    for end in range(1, len(tokens) + 1, 1 + more):
        assert drafter.propose(tokens[:end]) == slow(tokens[:end], what)


def test_success_makes_bold_and_failure_careful() -> None:
    drafter = NgramDrafter(NgramSpeculation(max_tokens=8))
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9] * 3
    lengths = []
    for drafted, accepted in ((8, 8), (8, 2), (4, 0), (2, 1), (1, 0), (1, 1), (2, 2)):
        lengths.append(len(drafter.propose(tokens)))
        drafter.learn(drafted, accepted)
    assert [*lengths, len(drafter.propose(tokens))] == [8, 8, 4, 2, 1, 1, 2, 4]


def test_a_block_guesses_one_to_eight_tokens() -> None:
    with pytest.raises(ConfigError, match="speculation with max_tokens 9: expected 1 to 8"):
        MtpSpeculation(max_tokens=9)


@pytest.mark.parametrize("fields", [{"max_tokens": 0}, {"min_ngram": 0}, {"min_ngram": 5}, {"max_ngram": 17}])
def test_settings_are_checked(fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="speculation with max_tokens"):
        NgramSpeculation(**fields)
