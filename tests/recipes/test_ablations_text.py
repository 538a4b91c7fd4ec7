"""Docstrings of a made-up library as rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ernie45.errors import NotFoundError
from ernie45.training.data.row_formats import parse_conversation, parse_text
from recipes.ablations import text
from recipes.ablations.text import Entry, collect, files

MODULE = '''
"""Boxes and
    what is in them."""

def undocumented(): pass

class Box(dict):
    """A box."""
    async def open(self, hard: bool = False, *args, key=None):
        """Open it.

            Twice if need be.
        """
        def latch(): "Inside of a function."
    def close(self):
        """Open it.

            Twice if need be.
        """
    def odd(self):
        "A lone \\ud800 surrogate."
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "library"
    for name, source in {
        "boxes/__init__.py": MODULE,
        "boxes/tests/inside.py": '"""Not this."""',
        "test/other.py": '"""Nor this."""',
        "broken.py": '"""No Python."""\nprint "hello"',
        "zero.py": "a = 1",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)
    return folder


def test_what_is_documented_is_found_once(library: Path) -> None:
    found = {entry.name: (entry.head, entry.text) for entry in collect(library)}
    assert found == {
        "boxes": ("module boxes", "Boxes and\nwhat is in them."),
        "boxes.Box": ("class boxes.Box", "A box."),
        "boxes.Box.open": ("boxes.Box.open(self, hard: bool=False, *args, key=None)", "Open it.\n\nTwice if need be."),
        "boxes.Box.open.latch": ("boxes.Box.open.latch()", "Inside of a function."),
        "boxes.Box.odd": ("boxes.Box.odd(self)", "A lone ? surrogate."),
    }


def test_a_folder_without_docstrings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no Python files with docstrings: name a folder of sources"):
        collect(tmp_path)


def entries(count: int) -> list[Entry]:
    words = "a word of the text and more of them "
    return [Entry(name=f"m.f{i}", head=f"m.f{i}(x)", text=f"{i}: " + words * (i % 24)) for i in range(count)]


def test_parts_share_no_text_and_the_share_is_kept() -> None:
    made = entries(4000)
    rows = files([*made, *made])
    train, held_out = (
        {parse_text(row).split("\n", 1)[1] for row in rows[f"texts.{part}.jsonl"]} for part in ("train", "heldout")
    )
    assert len(train) + len(held_out) == 4000
    assert not train & held_out
    expected = 4000 * text.HELD_OUT_SHARE
    assert abs(len(held_out) - expected) < 5 * expected**0.5


def test_rows_to_tune_on_are_long_and_short_by_turns_of_the_hash() -> None:
    rows = files(entries(4000))
    questions, answers = {}, {}
    for name in ("mixed.train", "long.heldout", "short.heldout"):
        found = [parse_conversation(row) for row in rows[f"{name}.jsonl"]]
        questions[name] = [len(row.messages[0]["content"]) for row in found]
        answers[name] = [len(row.messages[1]["content"]) for row in found]
    assert max(questions["long.heldout"]) < 30 < text.MIN_MIXED_CHARS <= min(answers["long.heldout"])
    assert max(answers["short.heldout"]) < 30 < text.MIN_MIXED_CHARS < min(questions["short.heldout"])
    assert len(answers["long.heldout"]) == len(answers["short.heldout"])
    long = sum(size >= text.MIN_MIXED_CHARS for size in answers["mixed.train"])
    assert 0.4 < long / len(answers["mixed.train"]) < 0.6
    assert max(answers["mixed.train"]) <= text.MAX_MIXED_CHARS


def test_the_command_writes_every_file(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(text, "HELD_OUT_SHARE", 0.5)
    monkeypatch.setattr(text, "MIN_MIXED_CHARS", 1)
    text.main(["-o", str(tmp_path / "out"), "--library", str(library)])
    found: dict[str, list[dict[str, Any]]] = {
        path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in (tmp_path / "out").iterdir()
    }
    assert found.keys() == files([]).keys()
    assert sum(len(found[f"texts.{part}.jsonl"]) for part in ("train", "heldout")) == 5
    assert len(found["mixed.train.jsonl"]) == len(found["texts.train.jsonl"])
    assert f"{len(found['long.heldout.jsonl'])} rows: {tmp_path}/out/long.heldout.jsonl" in capsys.readouterr().out
