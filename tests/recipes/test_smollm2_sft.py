"""From a package file to rows, and the comparison of models on them."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import ernie45
from ernie45.config.run_file import read_run_file
from ernie45.errors import ConfigError, NotFoundError, TransferError
from ernie45.models.text import CausalLM
from ernie45.training.config import RunConfig
from ernie45.training.data.row_formats import parse_conversation
from recipes.smollm2_sft import compare, fetch
from recipes.smollm2_sft.example import HELD_OUT_SHARE, Example, UnusableError, read_example, sample

SPECIAL = ["<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>"]
TASKS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "one": [
        {"input": " Name a colour. ", "target": ["red", "green ", "red"]},
        {"input": "name a  colour.", "target": "blue"},
        {"input": "Too long. " * 200, "target": "no"},
        {"input": "Nothing to say.", "target": " "},
        {"input": "No answer.", "target_scores": {"a": 1}},
    ],
    "two": [{"input": f"Add one to {number}.", "target": str(number + 1)} for number in range(60)],
}
FOLDER = "bigbench-0.0.1/bigbench/benchmark_tasks/"


def members(tasks: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, bytes]:
    inside = {f"{FOLDER}natural_instructions/{name}/task.json": {"examples": some} for name, some in tasks.items()}
    others = {f"{FOLDER}{name}/task.json": {"examples": [{"input": "other", "target": "x"}]} for name in ("sums", "natural_instructions")}
    return {name: json.dumps(content).encode() for name, content in (inside | others).items()} | {"setup.py": b"raise SystemExit"}


@pytest.fixture
def source_package(tmp_path: Path) -> Path:
    path = tmp_path / "package.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members(TASKS).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members(TASKS).items():
            archive.writestr(name.removeprefix("bigbench-0.0.1/"), content)
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_both_kinds_of_package_give_the_same_examples(source_package: Path, wheel: Path) -> None:
    found, left_out = fetch.collect(source_package)
    assert (found, left_out) == fetch.collect(wheel)
    assert Counter(example.task for example in found) == {"one": 1, "two": 60}
    assert (found[0].question, found[0].accepted) == ("Name a colour.", ("red", "green"))
    assert left_out == {
        "the same question as another one": 1,
        "longer than 1500 characters": 1,
        "empty": 1,
        "no question with answers": 1,
    }


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("other.json", "{}")
    with pytest.raises(NotFoundError, match="holds no files natural_instructions/TASK/task.json: is it bigbench"):
        fetch.collect(tmp_path / "empty.whl")
    (tmp_path / "text").write_text("no package")
    for name in ("text", "nowhere"):
        with pytest.raises(NotFoundError, match=f"{name} is no package file"):
            fetch.collect(tmp_path / name)


def test_the_command_writes_both_parts(source_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetch.main(["-o", str(tmp_path / "data"), "--package-file", str(source_package), "--per-task", "50"])
    parts = [rows_of(tmp_path / "data" / name) for name in (fetch.TRAIN, fetch.HELD_OUT)]
    counts = json.loads(capsys.readouterr().out)
    assert counts["usable"] == 61
    assert counts["chosen"] == len(parts[0]) + len(parts[1]) == 51
    assert counts["held_out"] == len(parts[1])
    for row in parts[0] + parts[1]:
        conversation = parse_conversation(row)
        assert conversation.learnt == (False, True)
        assert conversation.messages[1]["content"] == row["accepted"][0]


def test_what_pip_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(pip))
    pip.write_text("#!/bin/sh\necho no such package >&2\nexit 1\n")
    pip.chmod(0o755)
    (tmp_path / "out").mkdir()
    with pytest.raises(TransferError, match=r"pip download some==1 failed with status 1: no such package; .*--package-file"):
        fetch.download("some==1", tmp_path / "out")
    # What pip is called with: the folder stands behind --dest.
    pip.write_text('#!/bin/sh\nwhile [ "$1" != --dest ]; do shift; done\n: > "$2/some-1.tar.gz"\n')
    assert fetch.download("some==1", tmp_path / "out") == tmp_path / "out/some-1.tar.gz"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "no question"),
        ({"input": "a", "target": [1]}, "no question"),
        ({"input": ["a"], "target": "b"}, "no question"),
        ({"input": "a", "target": []}, "empty"),
        ({"input": " ", "target": "b"}, "empty"),
        ({"input": "a" * 10, "target": "b"}, "longer than 10"),
    ],
)
def test_what_cannot_be_used_is_left_out_with_its_reason(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableError, match=reason):
        read_example("task", record, 10)


def test_held_out_questions_and_samples() -> None:
    made = [Example(task=f"t{i % 4}", question=f"Question {i}", accepted=("x",)) for i in range(20000)]
    expected = 20000 * HELD_OUT_SHARE
    assert abs(sum(example.held_out for example in made) - expected) < 5 * expected**0.5
    copy = Example(task="other", question="question  7\n", accepted=("y",))
    assert (copy.key, copy.held_out) == (made[7].key, made[7].held_out)
    chosen = sample(made, 1000)
    assert chosen == sample(made[::-1], 1000)
    assert Counter(example.task for example in chosen) == dict.fromkeys(("t0", "t1", "t2", "t3"), 1000)
    assert 100 < sum(example.held_out for example in chosen) < 300, "being drawn and being held out are unrelated"
    assert len({example.task for example in chosen[:20]}) == 4, "tasks are mixed"


def test_the_run_file_loads() -> None:
    config = read_run_file(compare.RUN_FILE, RunConfig)
    assert (config.method, config.model.start) == ("sft", "smollm2-135m")
    assert config.lora is not None
    assert 8 <= config.lora.rank <= 16
    assert config.train.eval_every > 0
    assert [Path(source.path).name for source in (*config.data.train, *config.data.valid)] == [fetch.TRAIN, fetch.HELD_OUT]


def test_answers_are_compared_without_spaces_capitals_and_full_stop() -> None:
    row = {"accepted": ["New  York", "NYC."]}
    assert all(compare.is_right(answer, row) for answer in ("new york.", " New York\n", "nyc"))
    assert not any(compare.is_right(answer, row) for answer in ("new york city", "", "newyork"))


@pytest.fixture
def model_folder(
    tmp_path: Path, small_model: Callable[..., CausalLM], train_byte_level: Callable[..., Path]
) -> Path:
    tokenizer = ernie45.load_tokenizer(train_byte_level(["Add one to 7."] * 9, special=SPECIAL, bos="<s>"), chat_format="ernie")
    ernie45.save_model(small_model(vocab_size=320), tmp_path / "model", tokenizer=tokenizer)
    return tmp_path / "model"


def test_models_are_compared(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        Example(task="t", question=f"Add one to {number}.", accepted=(str(number + 1), "more")).as_row() for number in range(5)
    ]
    path = tmp_path / "heldout.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    compare.main([str(path), str(model_folder), str(model_folder), "--answers", "4", "--show", "1"])
    lines = capsys.readouterr().out.splitlines()
    loss = expected_loss(model_folder, rows)
    assert lines[0] == "| model | loss | right, of 4 |"
    assert lines[2] == lines[3] == f"| {model_folder} | {loss:.3f} | 0% |"
    assert lines[5:7] == ["Add one to 0.", "  expected: 1 / more"]
    assert len(lines) == 9
    assert lines[7].startswith(f"  {model_folder}: ")


def expected_loss(folder: Path, rows: Sequence[Mapping[str, Any]]) -> float:
    """Row by row through the plain network: prompt as in serving, then the answer and the end token."""
    tokenizer, model = ernie45.load_tokenizer(folder), ernie45.load_model(folder)
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer.encode(tokenizer.render(row["messages"][:1]))
        answer = [*tokenizer.encode(row["messages"][1]["content"]), tokenizer.eos_id]
        ids = torch.tensor([*prompt, *answer])
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
