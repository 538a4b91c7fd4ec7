"""Rows that compare answers: erniekit's, alpaca-like ones and messages; and rows that judge one answer (KTO).

Source: training reference 3.4 (src / tgt / response / sort; question or instruction / chosen / rejected). In the messages
forms `chosen` and `rejected` go on behind `prompt` (or `messages`), or are whole dialogues that begin alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ernie45.errors import RequestError
from ernie45.training.data.row_formats import (
    Record,
    check_dialogue,
    check_filled,
    read_history,
    read_question,
    read_system,
    read_texts,
    read_tools,
    take_legacy_system,
    turns_of,
)
from ernie45.training.data.rows import KtoRow, Messages, PreferenceRow


def parse_preference(record: Record, origin: str = "") -> PreferenceRow:
    """Read a row with two answers. Raises: RequestError."""
    if "response" in record or "sort" in record:
        return _read_erniekit(record, origin)
    missing = [key for key in ("chosen", "rejected") if key not in record]
    if missing:
        raise RequestError(f"{missing[0]} is missing: expected chosen and rejected, or src, response and sort")
    prompt, chosen, rejected = _read_sides(record)
    scores = _score(record, "score_chosen", 1.0), _score(record, "score_rejected", 0.0)
    if scores[0] <= scores[1] and ("score_chosen" in record or "score_rejected" in record):
        raise RequestError(
            f"score_chosen is {scores[0]} and score_rejected {scores[1]}: the chosen one's must be larger"
        )
    return _checked(record, origin, prompt, (chosen, rejected), scores)


def parse_kto(record: Record, origin: str = "") -> KtoRow:
    """Read a row with one answer and a verdict. Raises: RequestError."""
    label = record.get("label")
    if not isinstance(label, bool):
        raise RequestError(f"label is {label!r}, expected true (wanted) or false")
    if "messages" in record:
        whole = _messages(record["messages"], "messages", "user")
        check_dialogue(whole, "messages")
        cut = len(whole) - 1
    elif "prompt" in record and "completion" in record:
        prompt = _messages(record["prompt"], "prompt", "user")
        whole = (*prompt, *_messages(record["completion"], "completion", "assistant"))
        cut = len(prompt)
    else:
        raise RequestError("expected the keys messages and label, or prompt, completion and label")
    prompt, completion = (*read_system(record), *whole[:cut]), whole[cut:]
    _check_side(prompt, completion, "completion")
    return KtoRow(prompt=prompt, completion=completion, desirable=label, tools=read_tools(record), origin=origin)


def _read_erniekit(record: Record, origin: str) -> PreferenceRow:
    questions = read_texts(record, "src")
    answers = read_texts(record, "tgt") if record.get("tgt") is not None else []
    if len(questions) != len(answers) + 1:
        raise RequestError(
            f"src has {len(questions)} turns and tgt {len(answers)}: expected one question more than answers"
        )
    system, _ = take_legacy_system(record, questions, answers)
    if not questions:
        raise RequestError("src has no question")
    check_filled(questions, "src")
    check_filled(answers, "tgt")
    first, second = (_response(side, idx) for idx, side in enumerate(_two(record, "response")))
    scores = [_number(value, f"sort[{idx}]") for idx, value in enumerate(_two(record, "sort"))]
    if scores[0] == scores[1]:
        raise RequestError(f"sort is {record['sort']}: equal numbers prefer neither response")
    sides = (first, second) if scores[0] > scores[1] else (second, first)
    prompt = (*system, *turns_of(questions, answers))
    return _checked(record, origin, prompt, sides, (max(scores), min(scores)))


def _response(side: object, idx: int) -> Messages:
    """Turns of a response: assistant, user, assistant, .."""
    where = f"response[{idx}]"
    texts = [side] if isinstance(side, str) else side
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"{where} must be a list of texts")
    if len(texts) % 2 == 0:
        raise RequestError(f"{where} has {len(texts)} turns, expected an odd number: it begins and ends with an answer")
    check_filled(texts, where)
    roles = ("assistant", "user")
    return tuple({"role": roles[turn % 2], "content": text} for turn, text in enumerate(texts))


def _read_sides(record: Record) -> tuple[Messages, Messages, Messages]:
    """Prompt, chosen and rejected of a row that has the last two."""
    sides = [_messages(record[key], key, "assistant") for key in ("chosen", "rejected")]
    if "question" in record or "instruction" in record:
        prompt = (*read_history(record), *turns_of([read_question(record, ("question", "instruction"))], []))
    elif "prompt" in record or "messages" in record:
        key = "prompt" if "prompt" in record else "messages"
        prompt = _messages(record[key], key, "user")
    else:
        prompt = ()
    if all(side and side[0].get("role") != "assistant" for side in sides):  # whole dialogues
        same = _num_same(*sides)
        if not same:
            raise RequestError("chosen and rejected are whole dialogues, and have no beginning in common")
        prompt, sides = sides[0][:same], [side[same:] for side in sides]
    return (*read_system(record), *prompt), sides[0], sides[1]


def _num_same(first: Messages, second: Messages) -> int:
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        same += 1
    return same


def _messages(value: object, name: str, role: str) -> Messages:
    """Text is one message of that role; a list, or a single message, is taken as it is."""
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    if isinstance(value, Mapping):
        return (value,)
    if not isinstance(value, list) or not value or not all(isinstance(message, Mapping) for message in value):
        raise RequestError(f"{name} must be text or a list of messages that is not empty")
    return tuple(value)


def _checked(
    record: Record, origin: str, prompt: Messages, sides: tuple[Messages, Messages], scores: tuple[float, float]
) -> PreferenceRow:
    chosen, rejected = sides
    _check_side(prompt, chosen, "chosen")
    _check_side(prompt, rejected, "rejected")
    if chosen == rejected:
        raise RequestError("chosen and rejected are equal")
    return PreferenceRow(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        score_chosen=scores[0],
        score_rejected=scores[1],
        tools=read_tools(record),
        origin=origin,
    )


def _check_side(prompt: Messages, answer: Messages, name: str) -> None:
    if not prompt:
        raise RequestError("there is no prompt")
    check_dialogue(prompt, "prompt")
    if not answer:
        raise RequestError(f"{name} is empty")
    checked = check_dialogue(answer, name)
    for end, word in ((0, "begin"), (-1, "end")):
        if checked[end].role != "assistant":
            raise RequestError(f"{name} {word}s with a {checked[end].role}'s turn: it must {word} with an assistant's")


def _two(record: Record, key: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list) or len(value) != 2:
        raise RequestError(f"{key} must be a list of two, one for each answer")
    return value


def _score(record: Record, key: str, default: float) -> float:
    return _number(record[key], key) if key in record else default


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{name} is {value!r}, expected a number")
    return float(value)
