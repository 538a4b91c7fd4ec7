"""Run a task: means with standard errors, a line per item, and going on where a run broke off."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ernie45.checkpoint.atomic import atomic_write_text
from ernie45.errors import CheckpointError
from ernie45.evaluation.subject import Subject
from ernie45.evaluation.task import Outcome, Task

_TOGETHER = 16  # items per call of the subject: enough to fill a batch, few enough to lose little


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over items."""

    mean: float
    standard_error: float | None
    """Of the mean; None for a single item."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What a task measured."""

    task: str
    items: int
    headline: str
    measures: dict[str, Estimate]


def run_task(
    task: Task,
    subject: Subject,
    *,
    limit: int | None = None,
    output: str | Path | None = None,
    about: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> TaskResult:
    """Run the first `limit` items, all if None.

    Args: output: file to which every item is appended as a line of JSON when it is done. If it exists, its items count and only
            the others are run. about: what else the figures depend on, such as the model; a file of another one is refused.
            progress: called with items done and all.
    Raises: CheckpointError for a file that belongs to another run or is damaged.
    """
    ids = list(task.ids)[:limit]
    record = _Record(None if output is None else Path(output), _header(task, about))
    outcomes = {outcome.id: outcome for outcome in record.read() if outcome.id in set(ids)}
    missing = [id for id in ids if id not in outcomes]
    for start in range(0, len(missing), _TOGETHER):
        fresh = task.run(subject, missing[start : start + _TOGETHER])
        record.append(fresh)
        outcomes |= {outcome.id: outcome for outcome in fresh}
        if progress is not None:
            progress(len(outcomes), len(ids))
    return _result(task, [outcomes[id] for id in ids])


class _Record:
    """The file of a run's items: a header, then a line each."""

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self._path, self._header = path, header

    def read(self) -> Iterator[Outcome]:
        """Items that are there. A last line that was cut off by a kill is taken away."""
        if self._path is None or not self._path.exists():
            return
        whole, _, rest = self._path.read_text(encoding="utf-8").rpartition("\n")
        if rest:
            atomic_write_text(self._path, f"{whole}\n" if whole else "")
        lines = whole.splitlines()
        if lines and self._parsed(lines[0], 1) != self._header:
            raise CheckpointError(
                f"{self._path} holds another task's or model's items: name another file, or delete it"
            )
        for number, line in enumerate(lines[1:], start=2):
            data = self._parsed(line, number)
            try:
                yield Outcome(id=data["id"], measures=data["measures"], detail=data["detail"])
            except (KeyError, TypeError) as error:
                raise CheckpointError(f"{self._path}:{number}: no item of an evaluation: delete the line") from error

    def append(self, outcomes: Sequence[Outcome]) -> None:
        """Add lines, behind the header if the file is new."""
        if self._path is None:
            return
        is_new = not self._path.exists() or self._path.stat().st_size == 0
        lines = [self._header] * is_new + [asdict(outcome) for outcome in outcomes]
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))

    def _parsed(self, line: str, number: int) -> Any:
        try:
            return json.loads(line)
        except ValueError as error:
            raise CheckpointError(f"{self._path}:{number}: no JSON ({error}): delete the line, or the file") from error


def _header(task: Task, about: str) -> dict[str, Any]:
    ids = hashlib.sha256("\n".join(task.ids).encode()).hexdigest()
    return {"task": task.name, "items": len(task.ids), "ids_sha256": ids, "about": about}


def _result(task: Task, outcomes: Sequence[Outcome]) -> TaskResult:
    names = list(outcomes[0].measures) if outcomes else []
    measures = {name: _estimate([outcome.measures[name] for outcome in outcomes]) for name in names}
    return TaskResult(task=task.name, items=len(outcomes), headline=task.headline, measures=measures)


def _estimate(values: Sequence[float]) -> Estimate:
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean=mean, standard_error=None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean=mean, standard_error=math.sqrt(variance / count))
