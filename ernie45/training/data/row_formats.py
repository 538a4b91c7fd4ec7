"""Rows of text and of dialogues as they stand in files: plain text, erniekit, alpaca and messages, told apart by their keys.

Source: training reference 3.2. Keys that no format knows are somebody's notes and are left alone. What is wrong with a row is
a RequestError; the stream adds where the row stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ernie45.errors import RequestError
from ernie45.processing.messages import Message, check_messages, check_tools
from ernie45.training.data.rows import Conversation, Messages

Record = Mapping[str, Any]
"""A row as its file holds it."""

_KEYS = {"messages": ("messages",), "erniekit": ("src", "tgt"), "alpaca": ("instruction", "output")}
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\n*", re.DOTALL)
"""A thought at the start of an assistant's text."""


def parse_text(record: Record) -> str:
    """The text of a row to pre-train on. Raises: RequestError."""
    text = record.get("text")
    if not isinstance(text, str):
        raise RequestError(f"expected a key 'text' with text, {_found(record)}")
    if not text.strip():
        raise RequestError("text is empty")
    return text


def parse_conversation(record: Record, origin: str = "") -> Conversation:
    """Read a row to tune on. Raises: RequestError."""
    kind = _kind(record)
    messages, labels = _READERS[kind](record)
    last = check_dialogue(messages, "messages")[-1]
    if last.role != "assistant":
        raise RequestError(f"the last turn is a {last.role}'s: end with an assistant's turn")
    turns = [message["role"] == "assistant" for message in messages]
    if labels is None:
        learnt = tuple(turns)
    elif len(labels) != sum(turns):
        raise RequestError(f"label has {len(labels)} entries for {sum(turns)} answers: give one to each")
    else:
        left = iter(labels)
        learnt = tuple(is_answer and next(left) for is_answer in turns)
    return Conversation(messages=messages, learnt=learnt, tools=read_tools(record), origin=origin)


def check_dialogue(messages: object, name: str) -> list[Message]:
    """Check messages as serving does, and what learning from them needs besides. Raises: RequestError."""
    try:
        checked = check_messages(messages)
    except RequestError as error:
        raise RequestError(str(error).replace("messages", name)) from error
    for message in checked:
        where = f"{name}[{message.idx}]"
        if message.media:
            raise RequestError(f"{where} has a {message.media[0].kind}: only text can be learnt from here")
        if message.role == "assistant" and not message.tool_calls and not _answer(message):
            raise RequestError(f"{where} is an empty answer")
        if message.role == "user" and not message.text.strip():
            raise RequestError(f"{where} is an empty question")
    return checked


def _answer(message: Message) -> str:
    """An assistant's text without its thought."""
    return message.with_thought_apart().text.strip()


def read_tools(record: Record) -> tuple[Mapping[str, Any], ...]:
    """The tools of a row. Raises: RequestError."""
    return tuple(check_tools(record.get("tools")))


def read_system(record: Record) -> Messages:
    """The system text of a row as a message, if there is any. Raises: RequestError."""
    system = record.get("system")
    if system is None or system == "":
        return ()
    if not isinstance(system, str):
        raise RequestError(f"system must be text, not {type(system).__name__}")
    return ({"role": "system", "content": system},)


def read_texts(record: Record, key: str) -> list[str]:
    """One text or several, none of them empty. Raises: RequestError."""
    value = record.get(key)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"{key} must be text or a list of texts, not {_type(value)}")
    return list(texts)


def check_filled(texts: Sequence[str], key: str) -> None:
    """Refuse empty turns. Raises: RequestError."""
    for idx, text in enumerate(texts):
        if not text.strip():
            raise RequestError(f"{key}[{idx}] is empty")


def turns_of(questions: Sequence[str], answers: Sequence[str]) -> Messages:
    """Questions and answers by turns; there may be a question more than answers."""
    out: list[Mapping[str, Any]] = []
    for idx, question in enumerate(questions):
        out.append({"role": "user", "content": question})
        out += [{"role": "assistant", "content": answer} for answer in answers[idx : idx + 1]]
    return tuple(out)


def take_legacy_system(record: Record, questions: list[str], answers: list[str]) -> tuple[Messages, int]:
    """The system text of an erniekit row: `system`, or with `is_system` its first question, which is then removed.

    Returns: the system message, if any, and how many turns were removed. Raises: RequestError.
    """
    system = read_system(record)
    flag = record.get("is_system", 0)
    if flag not in (0, 1):
        raise RequestError(f"is_system is {flag!r}, expected 0 or 1")
    if not flag:
        return system, 0
    if system:
        raise RequestError("there are two system texts, system and (with is_system) src[0]: leave one of them out")
    check_filled(questions[:1], "src")
    text, questions[:] = questions[0], questions[1:]
    answers[:] = answers[1:]
    return ({"role": "system", "content": text},), 1


def _kind(record: Record) -> str:
    given = [name for name, keys in _KEYS.items() if all(key in record for key in keys)]
    if len(given) == 1:
        return given[0]
    wanted = ", or ".join("+".join(keys) for keys in _KEYS.values())
    if given:
        raise RequestError(f"the row is written in two forms, {' and '.join(given)}: keep one")
    raise RequestError(f"expected the keys {wanted}, {_found(record)}")


def _read_messages(record: Record) -> tuple[Messages, list[bool] | None]:
    messages = record["messages"]
    check_dialogue(messages, "messages")
    return tuple(messages), _labels(record)


def _read_erniekit(record: Record) -> tuple[Messages, list[bool] | None]:
    questions, answers, labels = read_texts(record, "src"), read_texts(record, "tgt"), _labels(record)
    if len(questions) != len(answers):
        raise RequestError(f"src has {len(questions)} turns and tgt {len(answers)}: give as many answers as questions")
    if labels is not None and len(labels) != len(answers):
        raise RequestError(f"label has {len(labels)} entries for {len(answers)} answers: give one to each")
    system, removed = take_legacy_system(record, questions, answers) if questions else ((), 0)
    if not questions:
        raise RequestError("src has no turn to learn")
    check_filled(questions, "src")
    check_filled(answers, "tgt")
    return (*system, *turns_of(questions, answers)), labels and labels[removed:]


def _read_alpaca(record: Record) -> tuple[Messages, list[bool] | None]:
    before = read_history(record)
    question, answer = read_question(record), record["output"]
    if not isinstance(answer, str) or not answer.strip():
        raise RequestError("output must be text and not empty")
    return (*read_system(record), *before, *turns_of([question], [answer])), None


def read_history(record: Record) -> Messages:
    """Earlier turns of an alpaca row, `[[question, answer], ..]`. Raises: RequestError."""
    history = record.get("history") or []
    if not isinstance(history, list):
        raise RequestError(f"history must be a list of [question, answer], not {_type(history)}")
    for idx, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(t, str) and t.strip() for t in turn):
            raise RequestError(f"history[{idx}] must be [question, answer], both text and not empty")
    return turns_of([turn[0] for turn in history], [turn[1] for turn in history])


def read_question(record: Record, keys: Sequence[str] = ("instruction",)) -> str:
    """An instruction with its input on the next line. Raises: RequestError."""
    key = next((key for key in keys if key in record), keys[0])
    question, more = record.get(key), record.get("input") or ""
    if not isinstance(question, str) or not isinstance(more, str):
        raise RequestError(f"{key} and input must be text")
    whole = f"{question}\n{more}" if question and more else question or more
    if not whole.strip():
        raise RequestError(f"{key} is empty")
    return whole


def _labels(record: Record) -> list[bool] | None:
    labels = record.get("label")
    if labels is None:
        return None
    labels = labels if isinstance(labels, list) else [labels]
    for idx, label in enumerate(labels):
        if label not in (0, 1):
            raise RequestError(f"label[{idx}] is {label!r}, expected 0 or 1")
    return [bool(label) for label in labels]


def _found(record: Record) -> str:
    return f"found {', '.join(map(repr, list(record)[:8]))}" if record else "found none"


def _type(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


_READERS: dict[str, Callable[[Record], tuple[Messages, list[bool] | None]]] = {
    "messages": _read_messages,
    "erniekit": _read_erniekit,
    "alpaca": _read_alpaca,
}
