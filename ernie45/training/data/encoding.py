"""Dialogues as tokens, with a mark on each that is learnt.

The text is the one that serving would write: it comes from `Tokenizer.render` alone. What is learnt is found by rendering
twice: what the model would be given to answer at a turn has to be the beginning of the whole dialogue, and the answer
is what follows, up to the token that ends it. Prompt and answer are tokenised apart, as they are in serving, where the model
goes on behind a prompt that is already tokens.

Source: training reference 3.2 (labels, thoughts). The token that ends an answer inside a dialogue of ERNIE's text formats,
`<|end_of_sentence|>`, stands for the end token `</s>` there, so that is what its place learns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ernie45.errors import ConfigError
from ernie45.processing.formats import END_OF_SENTENCE
from ernie45.processing.prompt import RenderedPrompt, Segment
from ernie45.processing.tokenizer import Tokenizer, load_tokenizer
from ernie45.training.batch import Document
from ernie45.training.data.config import Thoughts
from ernie45.training.data.row_formats import THOUGHT
from ernie45.training.data.rows import Messages


class Answer(NamedTuple):
    """Where an assistant's turn lies."""

    message: int
    start: int
    """First of its tokens."""
    end: int
    """Behind the token that ends it."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A dialogue as tokens."""

    ids: list[int]
    learnt: list[bool]
    targets: list[int]
    """What is learnt at each place: `ids`, but for ends inside of a dialogue."""
    answers: tuple[Answer, ...]

    def document(self, origin: str, num_unread: int = 1) -> Document:
        """As a document whose last `num_unread` tokens are targets alone."""
        targets = None if self.targets == self.ids else int64s(self.targets)
        return Document(
            ids=int64s(self.ids),
            learnt=bools(self.learnt),
            targets=targets,
            num_unread=num_unread,
            origin=origin,
        )

    def cut(self, size: int) -> Encoded:
        """The first `size` tokens."""
        return Encoded(
            ids=self.ids[:size], learnt=self.learnt[:size], targets=self.targets[:size], answers=self.answers
        )


class ChatEncoder:
    """Writes dialogues in the chat format of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, thoughts: Thoughts = "last") -> None:
        """Raises: ConfigError if the format always thinks and `thoughts` is "none", or if nothing ends its turns."""
        if thoughts == "none" and tokenizer.thinking == "always":
            raise ConfigError(
                f"thoughts is 'none', but the chat format {tokenizer.chat_format} always thinks: choose 'last' or 'all'"
            )
        self._tokenizer = tokenizer
        self._thoughts = thoughts
        self._thinks = tokenizer.thinking != "never" and thoughts != "none"
        self._thinking = None if tokenizer.thinking == "never" else self._thinks
        self._ends = frozenset(text for text, idx in tokenizer.special_tokens.items() if idx in tokenizer.stop_ids)
        if not self._ends:
            raise ConfigError(
                f"no token ends the turns of the chat format {tokenizer.chat_format}: choose a chat_format whose"
                " end token is in the vocabulary"
            )

    def encode(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]] = (), learnt: Sequence[bool] | None = None
    ) -> Encoded:
        """Encode a dialogue that ends with an assistant's turn.

        Args: learnt: of every message, whether it is an answer to learn; None for all answers.
        Raises: RequestError for what the format cannot express; ConfigError for a template that cannot be learnt from.
        """
        told = self._with_thoughts(messages)
        whole = self._render(told, tools, False)
        self._check_thoughts_kept(told, whole)
        out = _Tokens(self._tokenizer, self._closing_id())
        turns = [idx for idx, message in enumerate(told) if message["role"] == "assistant"]
        position = 0
        for idx in turns:
            opening = self._render(told[:idx], tools, True)
            start, given = self._answer_start(whole, opening, position, idx == turns[-1])
            end = self._answer_end(whole, start)
            out.add_prompt([*_between(whole, position, start), *given])
            is_learnt = learnt is None or learnt[idx]
            out.add_answer(idx, _between(whole, start, end), is_learnt, is_last=idx == turns[-1])
            position = end
        return out.encoded()

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], opens: bool) -> RenderedPrompt:
        return self._tokenizer.render(
            messages, tools or None, thinking=self._thinking, add_generation_prompt=opens, continue_final_message=False
        )

    def _with_thoughts(self, messages: Messages) -> list[Mapping[str, Any]]:
        """Take thoughts away where the rule says so, and give an empty one to answers that should have one."""
        turns = [idx for idx, message in enumerate(messages) if message["role"] == "assistant"]
        keep = {"last": set(turns[-1:]), "all": set(turns), "none": set()}[self._thoughts]
        out = list(messages)
        for idx in turns:
            if idx not in keep:
                out[idx] = _without_thought(out[idx])
            elif self._thinks and _thought(out[idx]) is None:
                out[idx] = {**out[idx], "reasoning_content": ""}
        return out

    def _check_thoughts_kept(self, messages: Sequence[Mapping[str, Any]], whole: str) -> None:
        for idx, message in enumerate(messages):
            thought = _thought(message) if message["role"] == "assistant" else None
            if thought and thought.strip() not in whole:
                raise ConfigError(
                    f"the chat template leaves out the thought of messages[{idx}]: choose thoughts 'last' or 'none'"
                )

    def _answer_start(
        self, whole: RenderedPrompt, opening: RenderedPrompt, position: int, is_last: bool
    ) -> tuple[int, list[Segment]]:
        """Where an answer starts in `whole`, and what the model is given besides.

        `opening` may end in a thought, begun or empty, which the turn does not have because thoughts were taken away. Then
        the answer starts where that thought would; only where the model answers, at the last turn, it is given the empty one.
        """
        if _begins_with(whole, opening, len(opening)):
            return len(opening), []
        starts, is_closed = self._before_thought(opening, position)
        for start in starts:
            if _begins_with(whole, opening, start):
                return start, _between(opening, start, len(opening)) if is_last and is_closed else []
        raise ConfigError(
            f"the chat template (format {self._tokenizer.chat_format}) writes a dialogue differently once it goes on, from"
            f" character {_first_difference(whole, opening)}, so which part is the answer cannot be told: choose a built-in"
            " chat_format"
        )

    def _before_thought(self, opening: str, position: int) -> tuple[list[int], bool]:
        """Where the thought at the end of `opening` may begin, if it ends in one, and whether it is a whole, empty one."""
        tags = self._tokenizer.answer_format.thought
        cut = opening.rfind(tags[0], position) if tags else -1
        if tags is None or cut < 0:
            return [], False
        thought = opening[cut:].split()
        is_closed = thought in ([*tags], ["".join(tags)])
        if not is_closed and thought != [tags[0]]:
            return [], False
        return [cut, max(position, len(opening[:cut].rstrip("\n")))], is_closed  # newlines may belong to the thought

    def _answer_end(self, whole: RenderedPrompt, start: int) -> int:
        at = 0
        for segment in whole.segments:
            at += len(segment.text)
            if at > start and segment.special and segment.text in self._ends:
                return at
        raise ConfigError(
            f"the chat template (format {self._tokenizer.chat_format}) ends an answer with none of the tokens"
            f" {', '.join(sorted(self._ends))}: choose a chat_format whose end token is in the vocabulary"
        )

    def _closing_id(self) -> int | None:
        """The id that answers learn to end with in place of `<|end_of_sentence|>`."""
        return self._tokenizer.eos_id if END_OF_SENTENCE in self._ends else None


class _Tokens:
    """Collects prompts and answers as tokens."""

    def __init__(self, tokenizer: Tokenizer, closing_id: int | None) -> None:
        self._tokenizer = tokenizer
        self._closing_id = closing_id
        self._ids: list[int] = []
        self._targets: list[int] = []
        self._learnt: list[bool] = []
        self._answers: list[Answer] = []

    def add_prompt(self, segments: list[Segment]) -> None:
        self._add(self._encode(segments), learnt=False)

    def add_answer(self, message: int, segments: list[Segment], learnt: bool, *, is_last: bool) -> None:
        """`segments` end with the end token."""
        start = len(self._ids)
        self._add(self._encode(segments), learnt=learnt)
        self._answers.append(Answer(message, start, len(self._ids)))
        if self._closing_id is not None and segments[-1].text == END_OF_SENTENCE:
            self._targets[-1] = self._closing_id
            if is_last:
                self._ids[-1] = self._closing_id

    def encoded(self) -> Encoded:
        return Encoded(ids=self._ids, learnt=self._learnt, targets=self._targets, answers=tuple(self._answers))

    def _add(self, ids: list[int], *, learnt: bool) -> None:
        self._ids += ids
        self._targets += ids
        self._learnt += [learnt] * len(ids)

    def _encode(self, segments: list[Segment]) -> list[int]:
        if not self._ids:
            return self._tokenizer.encode(RenderedPrompt(segments))
        # Some vocabularies put a space before text that begins a prompt. A special token in front says that this does not.
        before = Segment(next(iter(self._tokenizer.special_tokens)), True)
        return self._tokenizer.encode(RenderedPrompt([before, *segments]))[1:]


def int64s(values: list[int]) -> Tensor:
    """As a tensor; through numpy, which takes an eighth of the time that torch takes for lists."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


def bools(values: list[bool]) -> Tensor:
    """As `int64s`."""
    return torch.from_numpy(np.array(values, dtype=np.bool_))


def with_chat_format(tokenizer: Tokenizer, chat_format: str | None) -> Tokenizer:
    """The tokenizer with a built-in chat format in place of its own template."""
    if chat_format is None or (tokenizer.chat_format == chat_format and tokenizer.chat_template is None):
        return tokenizer
    with TemporaryDirectory() as scratch:
        tokenizer.save(scratch)
        return load_tokenizer(scratch, chat_format=chat_format)


def _thought(message: Mapping[str, Any]) -> str | None:
    """The thought of an answer, whichever way it is written."""
    if message.get("reasoning_content") is not None:
        return str(message["reasoning_content"])
    content = message.get("content")
    found = THOUGHT.match(content) if isinstance(content, str) else None
    return found[1] if found else None


def _without_thought(message: Mapping[str, Any]) -> Mapping[str, Any]:
    out = {key: value for key, value in message.items() if key != "reasoning_content"}
    found = THOUGHT.match(out["content"]) if isinstance(out.get("content"), str) else None
    return out if found is None else {**out, "content": out["content"][found.end() :]}


def _between(prompt: RenderedPrompt, start: int, end: int) -> list[Segment]:
    """The stretch between two characters."""
    out: list[Segment] = []
    at = 0
    for segment in prompt.segments:
        low, high = max(start, at) - at, min(end, at + len(segment.text)) - at
        if low < high:
            out.append(Segment(segment.text[low:high], segment.special))
        at += len(segment.text)
    return out


def _begins_with(whole: RenderedPrompt, prompt: RenderedPrompt, size: int) -> bool:
    """Whether the first `size` characters of both are the same text, and the same special tokens."""
    return len(whole) >= size and _between(whole, 0, size) == _between(prompt, 0, size)


def _first_difference(first: str, second: str) -> int:
    pairs = zip(first, second, strict=False)
    return next((idx for idx, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
