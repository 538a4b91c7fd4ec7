"""Sizes, and options in any place."""

from __future__ import annotations

import argparse

import pytest

from ernie45.cli.arguments import size_bytes
from ernie45.cli.main import build_parser


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        ("123B", 123),
        ("5GB", 5 * 10**9),
        ("5g", 5 * 10**9),
        (" 500 MB ", 500 * 10**6),
        ("1.5kB", 1500),
        ("2GiB", 2 * 2**30),
        ("0.5TiB", 2**39),
        ("1TB", 10**12),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert size_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "0", "0GB", "-1", "big", "5XB", "nan", "inf", "1e400", "1e3", "5 G B", "0.1", "٣"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        size_bytes(text)


@pytest.mark.parametrize(
    "argv",
    [
        ["tiny", "--seed", "3", "hello there", "--stop", "a", "--stop", "b"],
        ["--seed", "3", "--stop", "a", "--stop", "b", "tiny", "hello there"],
        ["tiny", "hello there", "--stop=a", "--stop=b", "--seed=3"],
        ["tiny", "--stop", "a", "--stop", "b", "--seed", "3", "--", "hello there"],
    ],
)
def test_options_may_stand_anywhere(argv: list[str]) -> None:
    options = build_parser("chat").parse_intermixed_args(argv)
    assert (options.model, options.prompt, options.seed, options.stop) == ("tiny", "hello there", 3, ["a", "b"])


def test_a_prompt_may_look_like_an_option_after_two_dashes() -> None:
    options = build_parser("chat").parse_intermixed_args(["tiny", "--", "--debug"])
    assert (options.model, options.prompt, options.debug) == ("tiny", "--debug", False)
