"""A question with its answers; which questions are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HELD_OUT_SHARE = 0.1


class UnusableError(Exception):
    """A record that is no question with an answer; the text is the reason, one of a few."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question and what it was answered with."""

    topic: str
    question: str
    answer: str

    @property
    def key(self) -> str:
        """Equal for equal questions, whatever their spaces, capitals and last mark."""
        return hashlib.sha256(" ".join(self.question.lower().split()).rstrip("?!. ").encode()).hexdigest()

    @property
    def held_out(self) -> bool:
        """Whether it is kept from training. The question decides, so that a copy of a held-out one is held out, too."""
        return int(self.key[:8], 16) < HELD_OUT_SHARE * 2**32

    def as_row(self) -> Mapping[str, Any]:
        """One row of a file."""
        turns = (("user", self.question), ("assistant", self.answer))
        return {"messages": [{"role": role, "content": text} for role, text in turns], "topic": self.topic}


def read_example(topic: str, conversation: Any, max_chars: int) -> Example:
    """Read a conversation of two texts. Longer ones are left out: in some of them what follows is another answer to the question, and
    nothing tells which. Raises: UnusableError.
    """
    if not isinstance(conversation, list) or not all(isinstance(text, str) for text in conversation):
        raise UnusableError("not a list of texts")
    if len(conversation) != 2:
        raise UnusableError("not one question and one answer")
    question, answer = (text.strip() for text in conversation)
    if not question or not answer:
        raise UnusableError("empty")
    if len(question) + len(answer) > max_chars:
        raise UnusableError(f"longer than {max_chars} characters")
    return Example(topic=topic, question=question, answer=answer)
