"""One question with its accepted answers; which of them are held out; repeatable samples."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

HELD_OUT_SHARE = 0.05


class UnusableError(Exception):
    """A record that is no example to learn from; the text is the reason, one of a few."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question and what it may be answered with."""

    task: str
    question: str
    accepted: tuple[str, ...]
    """The first is the one to learn."""

    @property
    def key(self) -> str:
        """Equal for equal questions, whatever their spaces and capitals."""
        return hashlib.sha256(" ".join(self.question.lower().split()).encode()).hexdigest()

    @property
    def held_out(self) -> bool:
        """Whether it is kept from training. The question decides, so that a copy of a held-out one is held out, too."""
        return int(self.key[:8], 16) < HELD_OUT_SHARE * 2**32

    @property
    def ticket(self) -> str:
        """What it draws in the lottery of `sample`; says nothing about `held_out`."""
        return self.key[8:]

    def as_row(self) -> Mapping[str, Any]:
        """One row of a file."""
        turns = (("user", self.question), ("assistant", self.accepted[0]))
        messages = [{"role": role, "content": text} for role, text in turns]
        return {"messages": messages, "accepted": list(self.accepted), "task": self.task}


def read_example(task: str, record: Mapping[str, Any], max_chars: int) -> Example:
    """Read `{"input": text, "target": text or list of texts}`. Raises: UnusableError."""
    question, target = record.get("input"), record.get("target")
    answers = [target] if isinstance(target, str) else target
    if not isinstance(question, str) or not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise UnusableError("no question with answers")
    accepted = tuple(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))
    if not question.strip() or not accepted:
        raise UnusableError("empty")
    if len(question) + len(accepted[0]) > max_chars:
        raise UnusableError(f"longer than {max_chars} characters")
    return Example(task=task, question=question.strip(), accepted=accepted)


def sample(examples: Iterable[Example], per_task: int) -> list[Example]:
    """At most `per_task` of each task, mixed; which ones and in which order does not depend on how they come."""
    by_task: dict[str, list[Example]] = {}
    for example in examples:
        by_task.setdefault(example.task, []).append(example)
    chosen = [e for found in by_task.values() for e in heapq.nsmallest(per_task, found, key=lambda e: e.ticket)]
    return sorted(chosen, key=lambda e: e.ticket)
