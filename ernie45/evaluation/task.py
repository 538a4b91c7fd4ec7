"""Tasks: items with answers that can be checked, of two kinds.

A choice is decided by log-probability: the text that the model finds most likely behind the context. A generation is continued
greedily and compared with the expected answers. Both say per item what was measured; the runner (`run.py`) takes the means.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from ernie45.errors import ConfigError
from ernie45.evaluation.subject import Continuation, Query, Subject

Match = Literal["exact", "regex", "numeric"]
# 1,234.5 and -3 and .5; a digit group is only one if it has three digits.
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|-?\.\d+")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One item."""

    id: str
    measures: dict[str, float]
    """Figures that the runner averages."""
    detail: dict[str, Any]
    """What the model said, for people: JSON values."""


class Task(Protocol):
    """Items that can be run in any order and any number."""

    name: str
    headline: str
    """The measure to look at first."""

    @property
    def ids(self) -> Sequence[str]:
        """Of all items; unique."""
        ...

    def run(self, subject: Subject, ids: Sequence[str]) -> list[Outcome]:
        """Run these items together, in this order."""
        ...


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which text follows?"""

    id: str
    context: str
    choices: tuple[str, ...]
    """Texts as they stand behind the context, their leading space included."""
    answer: int
    """Index of the right one."""

    def __post_init__(self) -> None:
        if len(self.choices) < 2 or not 0 <= self.answer < len(self.choices) or not all(self.choices):
            raise ConfigError(
                f"item {self.id}: {len(self.choices)} choices and answer {self.answer}: expected two or more texts and the index of "
                "one, from 0 on"
            )


class ChoiceTask:
    """Log-likelihood choice.

    `accuracy` takes the largest sum of log-probabilities, `accuracy_norm` the largest per byte of the choice, so that long texts
    are not at a disadvantage.
    """

    headline = "accuracy"

    def __init__(self, name: str, items: Sequence[Choice]) -> None:
        self.name, self._items = name, _by_id(items)

    @property
    def ids(self) -> Sequence[str]:
        """In the order of the file."""
        return list(self._items)

    def run(self, subject: Subject, ids: Sequence[str]) -> list[Outcome]:
        items = [self._items[id] for id in ids]
        found = iter(subject.score([Continuation(context=i.context, text=text) for i in items for text in i.choices]))
        return [_chosen(item, [next(found) for _ in item.choices]) for item in items]


def _chosen(item: Choice, logprobs: list[float]) -> Outcome:
    per_byte = [value / len(text.encode()) for value, text in zip(logprobs, item.choices, strict=True)]
    best, best_norm = _largest(logprobs), _largest(per_byte)
    return Outcome(
        id=item.id,
        measures={"accuracy": float(best == item.answer), "accuracy_norm": float(best_norm == item.answer)},
        detail={"answer": item.answer, "chosen": best, "chosen_norm": best_norm, "logprobs": logprobs},
    )


def _largest(values: Sequence[float]) -> int:
    """Index of the largest; the first of equal ones."""
    return max(range(len(values)), key=lambda i: (values[i], -i))


@dataclass(frozen=True, kw_only=True)
class Matching:
    """How an output is compared."""

    match: Match = "exact"
    """exact: the stripped text. regex: what `pattern` finds last, its first group if it has one, stripped. numeric: the last number,
    as a value (1,000 is 1000.0)."""
    pattern: str | None = None
    """For regex alone."""

    def __post_init__(self) -> None:
        if self.match not in get_args(Match):
            raise ConfigError(f"match is {self.match!r}, expected one of {', '.join(get_args(Match))}")
        if (self.match == "regex") != (self.pattern is not None):
            raise ConfigError(
                f"match is {self.match} and pattern {self.pattern!r}: a pattern goes with regex, and with it alone"
            )
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ConfigError(f"pattern {self.pattern!r} is no regular expression: {error}") from error

    def extract(self, output: str) -> str | None:
        """What counts of an output; None if there is nothing."""
        if self.match == "exact":
            return output.strip()
        if self.match == "numeric":
            numbers = _NUMBER.findall(output)
            return numbers[-1].replace(",", "") if numbers else None
        found = list(re.finditer(self.pattern or "", output))
        if not found:
            return None
        text = found[-1][1] if found[-1].re.groups else found[-1][0]
        return None if text is None else text.strip()

    def is_right(self, extracted: str | None, answers: Sequence[str]) -> bool:
        """Whether it is one of the answers."""
        if extracted is None:
            return False
        if self.match != "numeric":
            return extracted in [answer.strip() for answer in answers]
        return any(math.isclose(float(extracted), _value(answer), rel_tol=1e-6, abs_tol=1e-9) for answer in answers)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is the answer?"""

    id: str
    prompt: str
    answers: tuple[str, ...]
    """Any of them is right."""

    def __post_init__(self) -> None:
        if not self.answers:
            raise ConfigError(f"item {self.id} has no answer: expected one or more")


class GenerateTask:
    """Generate and match: `accuracy` counts right answers, `answered` outputs in which an answer was found."""

    headline = "accuracy"

    def __init__(
        self,
        name: str,
        items: Sequence[Question],
        matching: Matching,
        *,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        chat: bool = False,
    ) -> None:
        """Args: max_tokens, stop, chat: see `subject.Query`. Raises: ConfigError for a numeric answer that is no number."""
        self.name, self.matching, self._items = name, matching, _by_id(items)
        self._max_tokens, self._stop, self._chat = max_tokens, tuple(stop), chat
        if matching.match == "numeric":
            for item in items:
                for answer in item.answers:
                    _value(answer)

    @property
    def ids(self) -> Sequence[str]:
        """In the order of the file."""
        return list(self._items)

    def run(self, subject: Subject, ids: Sequence[str]) -> list[Outcome]:
        items = [self._items[id] for id in ids]
        queries = [Query(prompt=i.prompt, max_tokens=self._max_tokens, stop=self._stop, chat=self._chat) for i in items]
        return [self._judged(item, output) for item, output in zip(items, subject.generate(queries), strict=True)]

    def _judged(self, item: Question, output: str) -> Outcome:
        found = self.matching.extract(output)
        right = self.matching.is_right(found, item.answers)
        return Outcome(
            id=item.id,
            measures={"accuracy": float(right), "answered": float(found is not None)},
            detail={"answers": list(item.answers), "found": found, "output": output},
        )


def _value(answer: str) -> float:
    numbers = _NUMBER.findall(answer)
    if len(numbers) != 1:
        raise ConfigError(f"answer {answer[:60]!r} holds {len(numbers)} numbers, a numeric answer is one")
    return float(numbers[0].replace(",", ""))


def _by_id(items: Sequence[Any]) -> dict[str, Any]:
    found = {item.id: item for item in items}
    if len(found) != len(items) or not items:
        raise ConfigError(
            f"{len(items)} items have {len(found)} different ids: expected at least one item, and an id for each"
        )
    return found
