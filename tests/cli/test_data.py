"""`ernie data`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ernie45

Ernie = Callable[..., Any]
GOOD = {"src": ["What is red?"], "tgt": ["A colour."]}
LONG = {"src": ["x"], "tgt": ["long " * 60]}
MUTE = {"src": ["x"], "tgt": ["y"], "label": [0]}
MODEL = ("--model", "tiny")


@pytest.fixture
def rows(home: Path, tmp_path: Path) -> Callable[..., str]:
    """Writes rows in the folder of the test, which is the working folder; text stands as it is."""

    def write(*rows: Any, name: str = "rows.jsonl") -> str:
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        return name

    return write


def test_check_counts_and_names_bad_rows(ernie: Ernie, rows: Callable[..., str]) -> None:
    file = rows(GOOD, "{", GOOD, MUTE, LONG, {"src": ["q"], "tgt": []})
    result = ernie("data", "check", file, *MODEL, "--max-seq-len", "64")
    assert (result.code, result.err) == (0, "")
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in result.out.split("\n\n")[0].splitlines())
    assert facts["rows"] == "6, of which 2 can be used"
    assert facts["bad"] == "2 (33.3%)"
    assert facts["too long, left out"] == facts["nothing learnt"] == "1 (16.7%)"
    assert facts["shortened"] == "0 (0.0%)"
    assert re.fullmatch(r"\d+ rows of 64 tokens, [\d.]+% filled", facts["packing"])
    assert "tokens of a row\n" in result.out
    assert re.search(r"^ +16 - 31 +2  #{40}$|^ +32 - 63 +2  #{40}$", result.out, re.MULTILINE)
    assert re.search(r"^ +256 - 511 +1  #{20}$|^ +128 - 255 +1  #{20}$", result.out, re.MULTILINE)
    assert "bad rows\n  rows.jsonl:2: no JSON: " in result.out
    assert result.out.endswith("  rows.jsonl:6: src has 1 turns and tgt 0: give as many answers as questions\n")
    assert ernie("data", "check", file, *MODEL, "--strict").code == 1
    assert ernie("data", "check", rows(GOOD), *MODEL, "--strict").code == 0


def test_check_as_json(ernie: Ernie, rows: Callable[..., str]) -> None:
    result = ernie(
        "data", "check", rows(GOOD, "{", LONG), *MODEL, "--max-seq-len", "64", "--long-rows", "right", "--json"
    )
    told = json.loads(result.out)
    assert (told["num_rows"], told["num_bad"], told["shortened"], told["num_used"]) == (3, 1, 1, 2)
    assert told["bad"][0]["origin"] == "rows.jsonl:2"
    assert sum(entry["rows"] for entry in told["sizes"]) == 2
    assert 0 < told["efficiency"] <= 1


def test_preview_marks_what_is_learnt(ernie: Ernie, rows: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = rows(GOOD, {"src": ["q\x1b[2J"], "tgt": ["a"]}, "{")
    result = ernie("data", "preview", file, *MODEL)
    assert result.out == (
        "--- rows.jsonl:1\ntext: <|begin_of_sentence|>User: What is red?\nAssistant: [[A colour.</s>]]\n"
    )
    both = ernie("data", "preview", file, *MODEL, "--count", "5")
    assert both.out.count("---") == 2
    assert both.err.startswith("left out rows.jsonl:3: no JSON")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    colours = ernie("data", "preview", file, *MODEL, "--count", "2").out
    assert "Assistant: \x1b[32mA colour.</s>\x1b[0m\n" in colours
    assert "\x1b[2J" not in colours, "rows cannot steer the terminal"
    told = json.loads(ernie("data", "preview", file, *MODEL, "--json").out)
    assert told == [
        {
            "origin": "rows.jsonl:1",
            "text": [
                {"learnt": False, "text": "<|begin_of_sentence|>User: What is red?\nAssistant: "},
                {"learnt": True, "text": "A colour.</s>"},
            ],
        }
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"question": "q", "chosen": "c", "rejected": "d"},
            "prompt: <|begin_of_sentence|>User: q\nAssistant: \nchosen: [[c]]</s>\nrejected: [[d]]</s>\n",
        ),
        (
            {"prompt": "q", "completion": "c", "label": False},
            "prompt: <|begin_of_sentence|>User: q\nAssistant: \nunwanted: [[c]]</s>\n",
        ),
        ({"text": "words"}, "text: w[[ords</s>]]\n"),
    ],
)
def test_preview_of_every_kind(ernie: Ernie, rows: Callable[..., str], row: Any, expected: str) -> None:
    result = ernie("data", "preview", rows(row), *MODEL)
    assert result.out == f"--- rows.jsonl:1\n{expected}"


def test_kinds_formats_and_templates_may_be_said(ernie: Ernie, rows: Callable[..., str]) -> None:
    both = rows({"text": "words", **GOOD})
    assert ernie("data", "preview", both, *MODEL).out.endswith("text: w[[ords</s>]]\n")
    assert "[[A colour.</s>]]" in ernie("data", "preview", both, *MODEL, "--rows", "sft").out
    vl = ernie("data", "preview", both, *MODEL, "--rows", "sft", "--chat-format", "ernie_vl", "--thoughts", "none").out
    assert "<think>\n\n</think>\n\n[[A colour.</s>]]" in vl
    other = rows("one\n", "two", name="notes.md")
    assert ernie("data", "check", other, *MODEL).code == 1
    counts = [
        json.loads(ernie("data", "check", other, *MODEL, "--format", "text", "--text", unit, "--json").out)["num_rows"]
        for unit in ("file", "paragraph")
    ]
    assert counts == [1, 2]
    unknown = ernie("data", "check", rows({"words": "x"}), *MODEL)
    assert (unknown.code, "say which kind (--rows)" in unknown.err) == (1, True)


def test_pack_tells_how_full_rows_get(ernie: Ernie, rows: Callable[..., str]) -> None:
    file = rows(*[GOOD] * 40)
    result = ernie("data", "pack", file, *MODEL, "--max-seq-len", "100")
    assert result.out.startswith("rows             40 in ")
    told = json.loads(ernie("data", "pack", file, *MODEL, "--max-seq-len", "100", "--json").out)
    assert told["pieces"] == 40
    assert told["efficiency"] > 1.9 * told["efficiency_unpacked"]
    long = json.loads(
        ernie("data", "pack", rows({"text": "word " * 300}), *MODEL, "--max-seq-len", "100", "--json").out
    )
    assert long["pieces"] > 3
    draw = np.random.default_rng(0)
    mixed = rows(*({"src": ["q"], "tgt": ["w " * int(size)]} for size in draw.integers(5, 40, 200)))
    filled = [
        json.loads(ernie("data", "pack", mixed, *MODEL, "--max-seq-len", "100", "--json", "--buffer-rows", n).out)[
            "efficiency"
        ]
        for n in ("1", "30")
    ]
    assert filled[1] > filled[0]


def test_tokenize_writes_what_can_be_packed(ernie: Ernie, rows: Callable[..., str], tmp_path: Path) -> None:
    file = rows({"text": "first words"}, "{", {"text": "second"})
    result = ernie("data", "tokenize", file, *MODEL, "-o", "tokens")
    assert result.code == 0
    assert "left out rows.jsonl:2: no JSON" in result.err
    assert "documents  2\n" in result.out
    tokenizer = ernie45.load_tokenizer("tiny")
    ids = [*tokenizer.encode("first words"), *tokenizer.encode("second")]
    assert np.fromfile(tmp_path / "tokens" / "tokens.bin", "<u2").tolist() == ids
    assert ernie("data", "pack", "tokens", *MODEL).out.startswith("rows             2 in 1 packed row")
    again = ernie("data", "tokenize", file, *MODEL, "-o", "tokens")
    assert (again.code, "exists already" in again.err) == (1, True)
    forced = json.loads(ernie("data", "tokenize", file, *MODEL, "-o", "tokens", "--force", "--json").out)
    assert (forced["num_documents"], forced["bad"][0]["origin"]) == (2, "rows.jsonl:2")
    strict = ernie("data", "tokenize", file, *MODEL, "-o", "strict", "--strict")
    assert (strict.code, "rows.jsonl:2: no JSON" in strict.err) == (1, True)
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("check", "x.jsonl", "-o", "y"), "--output does not go with `ernie data check`"),
        (
            ("tokenize", "x.jsonl", "-o", "y", "--max-seq-len", "9"),
            "--max-seq-len does not go with `ernie data tokenize`",
        ),
        (("pack", "x.jsonl", "--count", "2"), "--count does not go with `ernie data pack`"),
        (("preview", "x.jsonl", "--buffer-rows", "2"), "--buffer-rows does not go with `ernie data preview`"),
        (("preview", "x.jsonl", "--count", "0"), "--count is 0, expected 1 or more"),
        (("tokenize", "x.jsonl"), "say where to write the token files: -o DIR"),
        (("mix", "x.jsonl"), "'mix'"),
        (("check",), "required: FILE"),
    ],
)
def test_wrong_usage(ernie: Ernie, argv: tuple[str, ...], reason: str) -> None:
    result = ernie("data", *argv, *MODEL)
    assert (result.code, result.out) == (2, "")
    assert reason in result.err


def test_a_missing_file_is_named(ernie: Ernie) -> None:
    result = ernie("data", "check", "nowhere.jsonl", *MODEL)
    assert (result.code, result.err) == (4, "error: there is no nowhere.jsonl\n")
