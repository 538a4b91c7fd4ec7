"""`ernie tokenizer train`: files to a folder that chats and converts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ernie45

Ernie = Callable[..., Any]
WORDS = ("明月", "春風", "白雲", "青山", "流水", "故人", "the", "fox", "jumps", "over")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rng = random.Random(0)
    lines = [" ".join(rng.choice(WORDS) for _ in range(12)) for _ in range(200)]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"poem": line}) + "\n" for line in lines), encoding="utf-8")
    return tmp_path / "a.txt"


def test_a_folder_is_written_and_described(ernie: Ernie, text: Path, tmp_path: Path) -> None:
    result = ernie("tokenizer", "train", str(text), "--vocab-size", "330", "-o", "out", "--json")
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    tokenizer = ernie45.load_tokenizer(tmp_path / "out")
    whole = text.read_text(encoding="utf-8")
    assert (facts["path"], facts["ids"], tokenizer.vocab_size) == ("out", 330, 330)
    assert facts["characters"] == len(whole)
    assert facts["special_tokens"] == len(tokenizer.special_tokens) == 24
    assert facts["characters_per_token"] == pytest.approx(len(whole) / len(tokenizer.encode(whole)), rel=0.01)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        "chat_template.jinja",
    }
    assert "learning 330 ids from" in result.err


def test_a_table_without_json(ernie: Ernie, text: Path) -> None:
    result = ernie("tokenizer", "train", str(text), "--vocab-size", "330", "-o", "out")
    assert result.out.splitlines()[1].split() == ["ids", "330"]


def test_rows_of_a_field(ernie: Ernie, text: Path, tmp_path: Path) -> None:
    rows = str(tmp_path / "b.jsonl")
    wrong = ernie("tokenizer", "train", rows, "--vocab-size", "330", "-o", "out")
    assert wrong.code == 1
    assert "has no text in the field 'text': it has poem" in wrong.err
    assert not (tmp_path / "out").exists()
    assert ernie("tokenizer", "train", rows, "--vocab-size", "330", "-o", "out", "--field", "poem").code == 0
    assert ernie("tokenizer", "train", str(text), "--vocab-size", "330", "-o", "from_text").code == 0
    assert (tmp_path / "out/tokenizer.model").read_bytes() == (tmp_path / "from_text/tokenizer.model").read_bytes()


def test_options_reach_the_training(ernie: Ernie, text: Path, tmp_path: Path) -> None:
    command = ("tokenizer", "train", str(text), "--vocab-size", "330", "-o")
    assert ernie(*command, "a", "--chat-format", "ernie_thinking").code == 0
    assert ernie45.load_tokenizer(tmp_path / "a").chat_format == "ernie_thinking"
    result = ernie(*command, "b", "--character-coverage", "0.5")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "character_coverage is 0.5, expected 0.98 to 1" in result.err


def test_too_little_text_leaves_nothing_behind(ernie: Ernie, text: Path, tmp_path: Path) -> None:
    result = ernie("tokenizer", "train", str(text), "--vocab-size", "9000", "-o", "out")
    assert result.code == 1
    assert "the text is too little for a vocabulary of 9000 ids" in result.err
    assert not (tmp_path / "out").exists()


def test_a_folder_is_replaced_only_when_forced(ernie: Ernie, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    command = ("tokenizer", "train", str(text), "--vocab-size", "330", "-o", "out")
    result = ernie(*command)
    assert (result.code, result.err) == (
        1, "error: out exists already: choose another name, or replace it with --force\n"
    )  # fmt: skip
    assert ernie(*command, "--force").code == 0
    assert not (tmp_path / "out" / "mine").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "none.txt", "--vocab-size", "330", "-o", "out"], 4, "there is no file none.txt"),
        (["train", "a.txt", "-o", "out"], 2, "required: --vocab-size"),
        (["train", "--vocab-size", "330", "-o", "out"], 2, "required: FILE"),
        (["learn", "a.txt", "--vocab-size", "330", "-o", "out"], 2, "invalid choice: 'learn'"),
    ],
)
def test_wrong_usage(ernie: Ernie, text: Path, arguments: list[str], code: int, message: str) -> None:
    result = ernie("tokenizer", *arguments)
    assert result.code == code
    assert message in result.err
