"""Rewards: what an answer is worth, as a weighted sum of Python callables named in the configuration.

A reward takes the prompt's text, the answer's text and the row that the prompt came from, and gives a number. It is a rule of this
package (`reward_rules.py`, `reward_judge.py`) or anybody's function, by import path.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

from ernie45.config.nearest import nearest
from ernie45.errors import ConfigError, Ernie45Error
from ernie45.training.reward_judge import judge
from ernie45.training.reward_rules import exact_answer, json_answer, length, regex

Reward = Callable[[str, str, Mapping[str, Any]], float]
"""(prompt, answer, row) -> what the answer is worth."""

RULES: dict[str, Callable[..., Reward]] = {
    "exact_answer": exact_answer,
    "json": json_answer,
    "judge": judge,
    "length": length,
    "regex": regex,
}
"""Rules of this package: from options to a reward."""


class RewardError(Ernie45Error):
    """A reward raised an exception or gave something else than a number."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One summand."""

    function: str
    """`module:function`, called with (prompt, answer, row) and `options` by keyword; or a rule: exact_answer, json, judge, length,
    regex, made once from `options`."""
    weight: float = 1.0
    """Factor in the sum; negative for what shall be avoided."""
    name: str = ""
    """Under which it is logged; empty = the function's name."""
    options: Mapping[str, Any] = field(default_factory=dict)
    on_error: float | None = None
    """Value where the function fails; None = the run stops."""
    workers: int = 1
    """Answers that are looked at at a time, on threads: more for functions that wait for others, such as a judge."""

    def __post_init__(self) -> None:
        if self.function not in RULES and self.function.count(":") != 1:
            raise ConfigError(
                f"reward {self.function!r} is no rule and no import path: write module:function, or one of "
                f"{', '.join(RULES)} (the nearest is {nearest(self.function, RULES)})"
            )
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ConfigError(f"weight of reward {self.function!r} is {self.weight!r}, expected a number other than 0")
        if self.on_error is not None and not math.isfinite(self.on_error):
            raise ConfigError(
                f"on_error of reward {self.function!r} is {self.on_error!r}, expected a number or nothing"
            )
        if not 1 <= self.workers <= 256:
            raise ConfigError(f"workers of reward {self.function!r} is {self.workers!r}, expected 1 to 256")

    @property
    def label(self) -> str:
        """Name in the log."""
        return self.name or self.function.rpartition(":")[2]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An answer with what it is judged by."""

    prompt: str
    answer: str
    row: Mapping[str, Any]
    """The row of the data that the prompt came from."""
    origin: str = ""
    """Of the row, as `file:line`, for messages."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What an answer is worth."""

    total: float
    parts: Mapping[str, float]
    """By name, before weights."""
    num_failed: int = 0
    """Parts that failed and count as their `on_error`."""


class Rewards:
    """The weighted sum of several rewards."""

    def __init__(self, configs: Sequence[RewardConfig]) -> None:
        """Raises: ConfigError for a function that is not there, options that it does not take, or a name used twice."""
        if not configs:
            raise ConfigError("no rewards are configured: name at least one")
        labels = [config.label for config in configs]
        for label in labels:
            if labels.count(label) > 1:
                raise ConfigError(f"two rewards are called {label!r}: give one of them another name")
        self._parts = [(config, load_reward(config)) for config in configs]

    def score(self, answers: Sequence[Judged]) -> list[Score]:
        """Judge answers. Raises: RewardError, with the origin, for a function that fails without an `on_error`."""
        columns = [list(_column(config, reward, answers)) for config, reward in self._parts]
        return [self._sum(values) for values in zip(*columns, strict=True)]

    def _sum(self, values: Sequence[float | None]) -> Score:
        parts: dict[str, float] = {}
        for (config, _), value in zip(self._parts, values, strict=True):
            assert config.on_error is not None or value is not None, "a failure without on_error has stopped the run"
            parts[config.label] = float(config.on_error or 0.0) if value is None else value
        total = math.fsum(config.weight * parts[config.label] for config, _ in self._parts)
        return Score(total=total, parts=parts, num_failed=sum(value is None for value in values))


def load_reward(config: RewardConfig) -> Reward:
    """The callable that a configuration names. Raises: ConfigError."""
    if config.function in RULES:
        rule = RULES[config.function]
        _check_options(config, rule, inspect.signature(rule).parameters)
        return rule(**config.options)
    function = _imported(config.function)
    try:
        inspect.signature(function).bind("", "", {}, **config.options)
    except TypeError as error:
        raise ConfigError(
            f"reward {config.function!r} cannot be called with (prompt, answer, row) and options "
            f"{sorted(config.options)}: {error}"
        ) from error
    return partial(function, **config.options) if config.options else function


def _check_options(config: RewardConfig, rule: Callable[..., Reward], known: Iterable[str]) -> None:
    names = list(known)
    for option in config.options:
        if option not in names:
            raise ConfigError(
                f"reward {config.function!r} has no option {option!r}, the nearest is {nearest(option, names)}"
            )
    try:
        inspect.signature(rule).bind(**config.options)
    except TypeError as error:
        raise ConfigError(f"reward {config.function!r}: {error}") from error


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name, None)
    except ImportError as error:
        raise ConfigError(f"reward {path!r}: module {module!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"reward {path!r}: module {module!r} has no function {name!r}")
    return found


def _column(config: RewardConfig, reward: Reward, answers: Sequence[Judged]) -> Iterable[float | None]:
    """One reward of many answers; None where it failed and may."""
    ask = partial(_ask, config, reward)
    if config.workers == 1 or len(answers) < 2:
        return map(ask, answers)
    with ThreadPoolExecutor(min(config.workers, len(answers))) as pool:
        return list(pool.map(ask, answers))


def _ask(config: RewardConfig, reward: Reward, judged: Judged) -> float | None:
    try:
        value = reward(judged.prompt, judged.answer, judged.row)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise RewardError(f"it gave {value!r}, expected a finite number")
        return float(value)
    except Exception as error:  # the function is somebody else's code
        if config.on_error is not None:
            return None
        where = judged.origin or "a row without origin"
        raise RewardError(
            f"reward {config.label!r} failed on {where}: {type(error).__name__}: {error}; the answer was "
            f"{judged.answer[:200]!r}. Mend the function, or set on_error to the value that such an answer gets"
        ) from error
