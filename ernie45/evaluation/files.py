"""Task files: one schema of our own, and readers of a few published formats.

Our schema is jsonl. A line with `choices` is a choice, a line with `prompt` a generation; a file holds one kind.

    {"id": "1", "context": "The sky is", "choices": [" blue", " green"], "answer": 0}
    {"id": "2", "prompt": "3 + 4 =", "answer": "7"}                       answer: a text, or a list of texts of which any will do

`id` may be left out: it is the number of the line then. The first line may say how the file is run, with any of these keys:

    {"task": {"name": "sums", "match": "numeric", "pattern": null, "max_tokens": 64, "stop": ["\\n"], "chat": false}}
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ernie45.config.nearest import nearest
from ernie45.errors import ConfigError, NotFoundError
from ernie45.evaluation.task import Choice, ChoiceTask, GenerateTask, Matching, Question, Task
from ernie45.store.location import home
from ernie45.store.text import read_text

_SETTINGS = ("name", "match", "pattern", "max_tokens", "stop", "chat")
_LETTERS = "ABCDEFGHIJ"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


def find_task(what: str) -> Task:
    """A task by the path of its file, by `FORMAT=PATH`, or by the name of `tasks/NAME.jsonl` in the store.

    Raises: NotFoundError; ConfigError for a file that does not hold what it should, with file and line.
    """
    format, mark, path = what.partition("=")
    if mark and format in FORMATS:
        return FORMATS[format](Path(path))
    if Path(what).is_file():
        return read_task(Path(what))
    stored = home() / "tasks" / f"{what}.jsonl"
    if _NAME.fullmatch(what) and stored.is_file():
        return read_task(stored)
    raise NotFoundError(
        f"there is no task {what!r}: give a file, FORMAT=FILE with one of {', '.join(FORMATS)}, or put it at {home() / 'tasks'}"
    )


def read_task(path: Path) -> Task:
    """A file in our schema."""
    rows = list(_rows(path))
    settings: Mapping[str, Any] = {}
    if rows and "task" in rows[0][1]:
        settings = _settings(rows[0][1]["task"], f"{path}:{rows[0][0]}")
        rows = rows[1:]
    name = str(settings.get("name", path.stem))
    if not rows:
        raise ConfigError(f"{path} holds no item: expected lines with choices or a prompt")
    if "choices" in rows[0][1]:
        return ChoiceTask(name, [_choice(row, f"{path}:{number}", number) for number, row in rows])
    questions = [_question(row, f"{path}:{number}", number) for number, row in rows]
    return _generate_task(name, questions, settings)


def _generate_task(name: str, questions: list[Question], settings: Mapping[str, Any]) -> GenerateTask:
    stop = settings.get("stop", ())
    return GenerateTask(
        name,
        questions,
        Matching(match=settings.get("match", "exact"), pattern=settings.get("pattern")),
        max_tokens=int(settings.get("max_tokens", 256)),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        chat=settings.get("chat") is True,
    )


def _settings(stated: object, where: str) -> Mapping[str, Any]:
    if not isinstance(stated, Mapping):
        raise ConfigError(f"{where}: task must be an object with some of {', '.join(_SETTINGS)}")
    for key in stated:
        if key not in _SETTINGS:
            raise ConfigError(
                f"{where}: task has no setting {str(key)[:40]!r}, the nearest is {nearest(str(key), _SETTINGS)}"
            )
    return stated


def _choice(row: Mapping[str, Any], where: str, number: int) -> Choice:
    choices = _field(row, "choices", list, where)
    return Choice(
        id=str(row.get("id", number)),
        context=_field(row, "context", str, where),
        choices=tuple(str(choice) for choice in choices),
        answer=_field(row, "answer", int, where),
    )


def _question(row: Mapping[str, Any], where: str, number: int) -> Question:
    answer = row.get("answer")
    answers = answer if isinstance(answer, list) else [answer]
    if not all(isinstance(one, str | int | float) for one in answers):
        raise ConfigError(f"{where}: answer is {str(answer)[:60]!r}, expected a text or a list of texts")
    return Question(
        id=str(row.get("id", number)),
        prompt=_field(row, "prompt", str, where),
        answers=tuple(str(one) for one in answers),
    )


def _arc(path: Path) -> Task:
    """ARC: `{"id", "question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}`; the texts are scored."""

    def item(row: Mapping[str, Any], where: str, number: int) -> Choice:
        question = _field(row, "question", dict, where)
        choices = _field(question, "choices", list, where)
        labels = [str(choice["label"]) for choice in choices]
        key = str(row.get("answerKey"))
        if key not in labels:
            raise ConfigError(f"{where}: answerKey is {key[:20]!r}, the labels are {', '.join(labels)}")
        return Choice(
            id=str(row.get("id", number)),
            context=f"Question: {_field(question, 'stem', str, where)}\nAnswer:",
            choices=tuple(f" {choice['text']}" for choice in choices),
            answer=labels.index(key),
        )

    return ChoiceTask("arc", [item(row, f"{path}:{number}", number) for number, row in _rows(path)])


def _hellaswag(path: Path) -> Task:
    """HellaSwag: `{"ctx", "endings", "label", "activity_label"?}`; `accuracy_norm` is the usual figure."""

    def item(row: Mapping[str, Any], where: str, number: int) -> Choice:
        activity = row.get("activity_label")
        context, label = _field(row, "ctx", str, where), str(row.get("label"))
        return Choice(
            id=str(number),
            context=f"{activity}: {context}" if activity else context,
            choices=tuple(f" {ending}" for ending in _field(row, "endings", list, where)),
            answer=int(label) if label.isdecimal() else -1,
        )

    return ChoiceTask("hellaswag", [item(row, f"{path}:{number}", number) for number, row in _rows(path)])


def _mmlu(path: Path) -> Task:
    """MMLU: rows of question, choices and the letter of the answer, without a header; the letters are scored."""
    items = []
    for number, row in enumerate(csv.reader(io.StringIO(read_text(path))), start=1):
        question, choices, letter = row[0] if row else "", row[1:-1], row[-1] if row else ""
        if len(row) < 4 or not letter or letter not in _LETTERS[: len(choices)]:
            raise ConfigError(
                f"{path}:{number}: {len(row)} columns, expected question, choices and the letter of the answer"
            )
        listed = "\n".join(f"{mark}. {text}" for mark, text in zip(_LETTERS, choices, strict=False))
        items.append(
            Choice(
                id=str(number),
                context=f"{question}\n{listed}\nAnswer:",
                choices=tuple(f" {mark}" for mark in _LETTERS[: len(choices)]),
                answer=_LETTERS.index(letter),
            )
        )
    return ChoiceTask("mmlu", items)


def _gsm8k(path: Path) -> Task:
    """GSM8K: `{"question", "answer"}`, the answer's number behind `####`; without examples, the last number counts."""

    def item(row: Mapping[str, Any], where: str, number: int) -> Question:
        _, mark, answer = _field(row, "answer", str, where).rpartition("####")
        if not mark:
            raise ConfigError(f"{where}: the answer has no number behind ####")
        question = _field(row, "question", str, where)
        return Question(id=str(number), prompt=f"Question: {question}\nAnswer:", answers=(answer.strip(),))

    items = [item(row, f"{path}:{number}", number) for number, row in _rows(path)]
    return GenerateTask("gsm8k", items, Matching(match="numeric"), stop=("\nQuestion:",))


FORMATS: Mapping[str, Callable[[Path], Task]] = {
    "arc": _arc,
    "gsm8k": _gsm8k,
    "hellaswag": _hellaswag,
    "mmlu": _mmlu,
}
"""Published formats that are read as they are."""


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Objects of a jsonl file with their line numbers."""
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}:{number}: a {type(row).__name__}, expected an object")
        yield number, row


def _field(row: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    value = row.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"{where}: {name} is {str(value)[:60]!r}, expected {kind.__name__}")
    return value
