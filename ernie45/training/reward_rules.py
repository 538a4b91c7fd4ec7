"""Rewards by rule: pattern, exact answer, length, JSON. Each function takes options and gives a reward of 0 to 1."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Literal

from ernie45.errors import ConfigError
from ernie45.training.json_check import check_schema, conforms

Rule = Callable[[str, str, Mapping[str, Any]], float]

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}|/\d+)?")
_FENCED = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n?```\s*\Z", re.DOTALL)
_MAX_NUMBER_CHARS = 200  # longer runs of digits are texts; as fractions they would take quadratic time
_UNITS: dict[str, Callable[[str], int]] = {
    "chars": len,
    "words": lambda text: len(text.split()),
    "lines": lambda text: len(text.strip().splitlines()),
}


def regex(*, pattern: str, whole: bool = False) -> Rule:
    """1 if the pattern is found in the answer (`whole`: if it is the answer), else 0. A dot matches newlines, too."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"reward regex: {pattern!r} is no regular expression: {error}") from error
    find = compiled.fullmatch if whole else compiled.search
    return lambda prompt, answer, row: float(find(answer) is not None)


def exact_answer(*, field: str = "answer", take: Literal["whole", "last_number", "boxed"] = "whole") -> Rule:
    r"""1 if the answer equals what the row says, else 0. Numbers are equal by value, texts after normalisation.

    Args: field: of the row, text or number. take: what of the answer counts: all of it, its last number, or the content of its last
        `\boxed{..}`.
    """
    if take not in ("whole", "last_number", "boxed"):
        raise ConfigError(f"reward exact_answer: take is {take!r}, expected whole, last_number or boxed")

    def reward(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
        if field not in row:
            raise ConfigError(f"the row has no field {field!r}, it has {', '.join(map(repr, row))}")
        taken = _taken(answer, take)
        return float(taken is not None and same_answer(taken, str(row[field])))

    return reward


def length(*, minimum: int = 0, maximum: int | None = None, unit: str = "chars", margin: int = 0) -> Rule:
    """1 within the bounds; outside it falls to 0, at once or evenly over `margin` more units.

    Args: unit: chars, words or lines.
    """
    if unit not in _UNITS:
        raise ConfigError(f"reward length: unit is {unit!r}, expected one of {', '.join(_UNITS)}")
    if minimum < 0 or margin < 0 or (maximum is not None and maximum < minimum):
        raise ConfigError(f"reward length: {minimum} to {maximum} with margin {margin} are no bounds")
    count = _UNITS[unit]

    def reward(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
        size = count(answer)
        outside = max(minimum - size, 0 if maximum is None else size - maximum, 0)
        return max(1.0 - outside / (margin + 1), 0.0)

    return reward


def json_answer(*, schema: Mapping[str, Any] | None = None, fenced: bool = False) -> Rule:
    """1 if the answer is JSON and conforms to the schema, else 0. `fenced`: it may stand in a code block."""
    if schema is not None:
        check_schema(schema)

    def reward(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
        block = _FENCED.match(answer) if fenced else None
        try:
            value = json.loads(block[1] if block else answer, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return 0.0
        return float(schema is None or conforms(value, schema))

    return reward


def same_answer(one: str, other: str) -> bool:
    """Whether two answers say the same: equal numbers, or equal texts but for case, width, spaces and closing marks."""
    one, other = _plain(one), _plain(other)
    numbers = _number(one), _number(other)
    return one == other if None in numbers else numbers[0] == numbers[1]


def _taken(answer: str, take: str) -> str | None:
    if take == "whole":
        return answer
    if take == "boxed":
        return _last_boxed(answer)
    found = _NUMBER.findall(unicodedata.normalize("NFKC", answer))
    return found[-1] if found else None


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for at in range(begin, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[begin + 1 : at]
    return None


def _plain(text: str) -> str:
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip("$ ").rstrip(".!,;:。 ")


def _number(text: str) -> Fraction | None:
    text = text.removesuffix("%").strip()
    if len(text) > _MAX_NUMBER_CHARS or not _NUMBER.fullmatch(text):
        return None
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
