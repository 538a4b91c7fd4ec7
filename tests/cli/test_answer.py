"""Answers of thinking models in a terminal: thought on stderr, text on stdout, the same with any stop string."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import ernie45
from ernie45.cli.answer import Answer
from ernie45.engine.pieces import Piece
from ernie45.processing.tokenizer import Tokenizer


@pytest.fixture
def thinker(tokenizer_folder: Path, tmp_path: Path) -> Tokenizer:
    """The vision-language format, whose tags are special tokens."""
    folder = tmp_path / "thinker"
    shutil.copytree(tokenizer_folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"ernie45_chat_format": "ernie_vl"}))
    return ernie45.load_tokenizer(folder)


def answered(
    tokenizer: Tokenizer, text: str, stop: tuple[str, ...] = (), *, thinking: bool = True, **options: bool
) -> Answer:
    """Feed a text, its `</think>` as the special token, one id per piece."""
    prompt = tokenizer.encode(tokenizer.render([{"role": "user", "content": "q"}], thinking=thinking))
    ids: list[int] = []
    for i, part in enumerate(text.split("</think>")):
        ids += [tokenizer.special_tokens["</think>"]] * (i > 0) + tokenizer.encode(part)
    answer = Answer(tokenizer, prompt, stop, **options)
    for i, token in enumerate(ids, 1):
        met = next((string for string in stop if string in tokenizer.decode(ids[:i])), None)
        answer.add(Piece(text="?", ids=(token,), finish_reason="stop" if met else None, stop_reason=met))
        if met:
            return answer
    end = tokenizer.special_tokens["</s>"]
    answer.add(Piece(text="", ids=(end,), finish_reason="stop", stop_reason=end))
    return answer


def test_thought_and_text_part_ways(thinker: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    answer = answered(thinker, "hm 😀,\nwell\n</think>\n\nYes 😀.")
    assert (answer.reasoning, answer.content) == ("hm 😀,\nwell", "Yes 😀.")
    assert capsys.readouterr() == ("Yes 😀.", "hm 😀,\nwell\n\n")


def test_a_closed_thought_in_the_prompt_leaves_text_alone(
    thinker: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = answered(thinker, "Yes.", thinking=False)
    assert (answer.reasoning, answer.content) == ("", "Yes.")
    assert capsys.readouterr() == ("Yes.", "")


def test_stop_strings_cut_the_text(thinker: Tokenizer) -> None:
    assert answered(thinker, "hm</think>Yes. No.", (". N",), quiet=True).content == "Yes"
    assert answered(thinker, "hm</think>Yes.", (". N",), quiet=True).content == "Yes."


def test_an_unfinished_thought_is_shown(thinker: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    answer = answered(thinker, "hm")
    assert (answer.reasoning, answer.content) == ("hm", "")
    assert capsys.readouterr() == ("", "hm\n\n")


def test_quiet_prints_nothing(thinker: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    assert answered(thinker, "hm</think>Yes", quiet=True).content == "Yes"
    assert capsys.readouterr() == ("", "")


def test_raw_takes_nothing_apart(thinker: Tokenizer) -> None:
    assert answered(thinker, "a", raw=True, quiet=True).content == "?"


def test_a_terminal_shows_thoughts_dimmed_and_without_control_characters(
    thinker: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    answered(thinker, "hm\x1b[31m</think>Yes")
    assert capsys.readouterr() == ("Yes", "\x1b[2mhm\ufffd[31m\x1b[22m\n\n")
