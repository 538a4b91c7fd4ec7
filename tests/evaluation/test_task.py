"""Tasks, their files and their runs, with a subject whose answers are known."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ernie45.errors import CheckpointError, ConfigError, NotFoundError
from ernie45.evaluation.files import find_task, read_task
from ernie45.evaluation.run import run_task
from ernie45.evaluation.subject import Continuation, Query
from ernie45.evaluation.task import Choice, ChoiceTask, GenerateTask, Matching, Question


class Known:
    """Scores what it is told to, and answers every prompt with the same table."""

    def __init__(self, scores: dict[str, float] | None = None, answers: dict[str, str] | None = None) -> None:
        self.scored, self.answers = scores or {}, answers or {}
        self.asked: list[str] = []
        self.queries: list[Query] = []

    def score(self, continuations: Sequence[Continuation]) -> list[float]:
        self.asked += [c.context for c in continuations]
        return [self.scored[c.text] for c in continuations]

    def generate(self, queries: Sequence[Query]) -> list[str]:
        self.queries += queries
        return [self.answers[query.prompt] for query in queries]


def test_choice_by_sum_and_by_length() -> None:
    """-6 for 2 bytes beats -8 for 8 bytes by sum, and loses by byte."""
    items = [
        Choice(id="a", context="?", choices=(" x", " xxxxxxx"), answer=1),
        Choice(id="b", context="?", choices=(" x", " y"), answer=0),
        Choice(id="c", context="?", choices=(" y", " x", " z"), answer=2),
    ]
    subject = Known({" x": -6.0, " xxxxxxx": -8.0, " y": -7.0, " z": -9.0})
    result = run_task(ChoiceTask("t", items), subject)
    assert result.measures["accuracy"].mean == pytest.approx(1 / 3)
    assert result.measures["accuracy_norm"].mean == pytest.approx(2 / 3)
    assert result.measures["accuracy"].standard_error == pytest.approx(1 / 3)  # sqrt((2/3 / 2) / 3)
    assert (result.items, result.headline) == (3, "accuracy")


def test_bytes_not_letters_normalise() -> None:
    items = [Choice(id="a", context="?", choices=("你", "ab"), answer=0)]
    result = run_task(ChoiceTask("t", items), Known({"你": -2.4, "ab": -2.0}))
    assert (result.measures["accuracy"].mean, result.measures["accuracy_norm"].mean) == (0, 1)
    assert result.measures["accuracy"].standard_error is None


@pytest.mark.parametrize(
    ("matching", "output", "answers", "right"),
    [
        ({}, " Paris\n", ["paris", "Paris"], True),
        ({}, "Paris.", ["Paris"], False),
        ({"match": "numeric"}, "It is 12, no: 1,234.50 kg", ["1234.5"], True),
        ({"match": "numeric"}, "-3 or -.5", ["-0.5"], True),
        ({"match": "numeric"}, "3, 12,5", ["125"], False),
        ({"match": "numeric"}, "none", ["0"], False),
        ({"match": "regex", "pattern": r"answer is \(?([A-D])"}, "The answer is (B). No, the answer is C", ["C"], True),
        ({"match": "regex", "pattern": r"[A-D]"}, "B", ["B"], True),
        ({"match": "regex", "pattern": r"[A-D]"}, "none", ["none"], False),
        ({"match": "regex", "pattern": r"x(y)?"}, "x", ["x"], False),
    ],
)
def test_matching(matching: dict[str, Any], output: str, answers: list[str], right: bool) -> None:
    rule = Matching(**matching)
    assert rule.is_right(rule.extract(output), answers) == right


@pytest.mark.parametrize(
    "fields", [{"match": "fuzzy"}, {"match": "regex"}, {"pattern": "x"}, {"match": "regex", "pattern": "("}]
)
def test_matching_rules_that_cannot_be(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Matching(**fields)


def test_generation_asks_and_judges() -> None:
    items = [Question(id="1", prompt="1+1=", answers=("2",)), Question(id="2", prompt="2+2=", answers=("4",))]
    task = GenerateTask("sums", items, Matching(match="numeric"), max_tokens=7, stop=["\n"], chat=True)
    subject = Known(answers={"1+1=": " 2", "2+2=": "no idea"})
    result = run_task(task, subject)
    assert (result.measures["accuracy"].mean, result.measures["answered"].mean) == (0.5, 0.5)
    assert subject.queries[0] == Query(prompt="1+1=", max_tokens=7, stop=("\n",), chat=True)
    with pytest.raises(ConfigError, match="holds 0 numbers"):
        GenerateTask("sums", [Question(id="1", prompt="?", answers=("two",))], Matching(match="numeric"))


def test_items_must_be_told_apart() -> None:
    item = Choice(id="a", context="?", choices=("x", "y"), answer=0)
    with pytest.raises(ConfigError, match="2 items have 1 different ids"):
        ChoiceTask("t", [item, item])
    good: dict[str, Any] = {"id": "a", "context": "?", "choices": ("x", "y"), "answer": 0}
    wrong: list[dict[str, Any]] = [{"choices": ("x",)}, {"answer": 2}, {"answer": -1}, {"choices": ("x", "")}]
    for fields in wrong:
        with pytest.raises(ConfigError, match="item a"):
            Choice(**(good | fields))
    with pytest.raises(ConfigError, match="no answer"):
        Question(id="a", prompt="?", answers=())


class Counting(Known):
    """Stops like a killed run after some calls."""

    def __init__(self, calls: int) -> None:
        super().__init__({"x": -1.0, "y": -2.0})
        self.calls = calls

    def score(self, continuations: Sequence[Continuation]) -> list[float]:
        if not self.calls:
            raise KeyboardInterrupt
        self.calls -= 1
        return super().score(continuations)


def many(count: int = 40) -> ChoiceTask:
    return ChoiceTask("m", [Choice(id=str(i), context=f"{i}", choices=("x", "y"), answer=i % 2) for i in range(count)])


def test_a_run_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    output = tmp_path / "items.jsonl"
    expected = run_task(many(), Counting(99))
    with pytest.raises(KeyboardInterrupt):
        run_task(many(), Counting(1), output=output)
    output.write_text(output.read_text() + '{"id": "16", "meas')  # a line that was cut off
    subject, seen = Counting(99), list[tuple[int, int]]()
    found = run_task(many(), subject, output=output, progress=lambda done, total: seen.append((done, total)))
    assert found == expected
    assert len(subject.asked) == 2 * (40 - 16), "what is there is not run again"
    assert seen == [(32, 40), (40, 40)]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["id"] for line in lines[1:]] == [str(i) for i in range(40)]
    assert lines[2]["measures"] == {"accuracy": 0.0, "accuracy_norm": 0.0}
    assert lines[2]["detail"]["chosen"] == 0


def test_limit_and_other_runs(tmp_path: Path) -> None:
    output = tmp_path / "items.jsonl"
    assert run_task(many(), Counting(9), limit=10, output=output).items == 10
    assert run_task(many(), Counting(9), limit=5, output=output).measures["accuracy"].mean == 0.6
    for task, about in ((many(41), ""), (many(), "another model")):
        with pytest.raises(CheckpointError, match="another task's or model's"):
            run_task(task, Counting(9), output=output, about=about)
    output.write_text(output.read_text() + "nonsense\n")
    with pytest.raises(CheckpointError, match=":12: no JSON"):
        run_task(many(), Counting(9), output=output)
    output.write_text("".join([output.read_text().splitlines(keepends=True)[0], '{"id": "0"}\n']))
    with pytest.raises(CheckpointError, match=":2: no item"):
        run_task(many(), Counting(9), output=output)


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) if not isinstance(row, str) else row for row in rows) + "\n")
    return path


def test_own_files(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "choices.jsonl",
        {"id": "sky", "context": "The sky is", "choices": [" blue", " green"], "answer": 0},
        "",
        {"context": "Grass is", "choices": [" blue", " green"], "answer": 1},
    )
    task = read_task(path)
    assert (task.name, list(task.ids)) == ("choices", ["sky", "3"])
    result = run_task(task, Known({" blue": -1, " green": -2}))
    assert result.measures["accuracy"].mean == 0.5
    header = {"task": {"name": "sums", "match": "numeric", "max_tokens": 5, "stop": "\n", "chat": True}}
    task = read_task(
        lines(tmp_path / "g.jsonl", header, {"prompt": "1+1=", "answer": 2}, {"prompt": "?", "answer": ["3", 4]})
    )
    subject = Known(answers={"1+1=": "2.0", "?": "4"})
    assert run_task(task, subject).measures["accuracy"].mean == 1
    assert subject.queries[0] == Query(prompt="1+1=", max_tokens=5, stop=("\n",), chat=True)
    assert task.name == "sums"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no item"),
        (["{"], ":1: no JSON"),
        (["[1]"], ":1: a list, expected an object"),
        (
            [{"task": {"shots": 5}}, {"prompt": "?", "answer": "x"}],
            ":1: task has no setting 'shots', the nearest is stop",
        ),
        ([{"task": 3}], ":1: task must be an object"),
        ([{"context": "?", "choices": "xy", "answer": 0}], ":1: choices is 'xy', expected list"),
        ([{"context": "?", "choices": ["x", "y"], "answer": True}], ":1: answer is 'True', expected int"),
        ([{"prompt": "?"}], ":1: answer is 'None'"),
        ([{"prompt": "?", "answer": "x"}, {"answer": "x"}], ":2: prompt is 'None', expected str"),
    ],
)
def test_damaged_files_are_named_with_their_line(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_task(lines(tmp_path / "t.jsonl", *rows))


def test_published_formats(tmp_path: Path) -> None:
    arc = lines(
        tmp_path / "arc.jsonl",
        {
            "id": "q1",
            "question": {"stem": "Why?", "choices": [{"text": "no", "label": "1"}, {"text": "yes", "label": "2"}]},
            "answerKey": "2",
        },
    )
    subject = Known({" no": -3, " yes": -1})
    assert run_task(find_task(f"arc={arc}"), subject).measures["accuracy"].mean == 1
    assert subject.asked[0] == "Question: Why?\nAnswer:"
    swag = lines(
        tmp_path / "swag.jsonl",
        {"activity_label": "Baking", "ctx": "She", "endings": ["bakes.", "flies away."], "label": 0},
        {"ctx": "He", "endings": ["bakes.", "flies away."], "label": "1"},
    )
    subject = Known({" bakes.": -3, " flies away.": -4})
    result = run_task(find_task(f"hellaswag={swag}"), subject)
    assert (result.measures["accuracy"].mean, result.measures["accuracy_norm"].mean) == (0.5, 0.5)
    assert {"Baking: She", "He"} == set(subject.asked)
    mmlu = tmp_path / "mmlu.csv"
    mmlu.write_text('"What, exactly?",a,b,c,d,C\n')
    subject = Known({" A": -4, " B": -3, " C": -1, " D": -2})
    assert run_task(find_task(f"mmlu={mmlu}"), subject).measures["accuracy"].mean == 1
    assert subject.asked[0] == "What, exactly?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    gsm = lines(tmp_path / "gsm.jsonl", {"question": "How many?", "answer": "He has 2 <<1+1=2>>.\n#### 1,200"})
    prompt = "Question: How many?\nAnswer:"
    subject = Known(answers={prompt: "So it is 1200."})
    assert run_task(find_task(f"gsm8k={gsm}"), subject).measures["accuracy"].mean == 1
    assert subject.queries[0].stop == ("\nQuestion:",)


@pytest.mark.parametrize(
    ("format", "text", "message"),
    [
        (
            "arc",
            '{"question": {"stem": "?", "choices": [{"text": "a", "label": "A"}]}, "answerKey": "B"}',
            "the labels are A",
        ),
        ("hellaswag", '{"ctx": "x", "endings": ["a", "b"], "label": ""}', "answer -1"),
        ("mmlu", "a,b\n", "2 columns"),
        ("mmlu", "q,a,b,E\n", "4 columns"),
        ("mmlu", "q,a,b,\n", "4 columns"),
        ("gsm8k", '{"question": "?", "answer": "7"}', "no number behind ####"),
    ],
)
def test_published_formats_that_are_damaged(tmp_path: Path, format: str, text: str, message: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(ConfigError, match=message):
        find_task(f"{format}={tmp_path / 't'}")


def test_finding_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERNIE45_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "tasks").mkdir(parents=True)
    lines(tmp_path / "home" / "tasks" / "sums.jsonl", {"prompt": "1+1=", "answer": "2"})
    assert find_task("sums").name == "sums"
    for name in ("products", "../tasks/sums", "squad=x", str(tmp_path)):
        with pytest.raises(NotFoundError, match="FORMAT=FILE with one of arc, gsm8k, hellaswag, mmlu"):
            find_task(name)
    assert math.isfinite(run_task(find_task("sums"), Known(answers={"1+1=": "2"})).measures["accuracy"].mean)
