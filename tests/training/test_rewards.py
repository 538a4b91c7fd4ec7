"""Rewards: rules against hand-made answers, the JSON check against another implementation, functions by path, sums, failures."""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ernie45.errors import ConfigError
from ernie45.training.json_check import check_schema, conforms
from ernie45.training.reward_rules import exact_answer, json_answer, length, regex, same_answer
from ernie45.training.rewards import Judged, RewardConfig, RewardError, Rewards, load_reward


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A user's module."""
    module = ModuleType("users_rewards")
    module.letters = lambda prompt, answer, row: float(len(answer))  # type: ignore[attr-defined]
    module.times = lambda prompt, answer, row, *, factor=1.0: factor * row["x"]  # type: ignore[attr-defined]
    module.fails = lambda prompt, answer, row: 1 / len(answer)  # type: ignore[attr-defined]
    module.nan = lambda prompt, answer, row: float("nan")  # type: ignore[attr-defined]
    module.narrow = lambda prompt: 0.0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "users_rewards", module)
    return module


def judged(answer: str, **row: Any) -> Judged:
    return Judged(prompt="question", answer=answer, row=row, origin="rows.jsonl:3")


def test_regex() -> None:
    assert regex(pattern="b+")("", "abbc", {}) == 1
    assert regex(pattern="b+", whole=True)("", "abbc", {}) == 0
    assert regex(pattern="a.c", whole=True)("", "a\nc", {}) == 1
    with pytest.raises(ConfigError, match="no regular expression"):
        regex(pattern="(")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,234.50", "1234.5", True),
        ("1/2", "0.5", True),
        ("12%", "12", True),
        ("$ 3.", "3", True),
        ("１２", "12", True),
        ("-0", "0", True),
        ("1e3", "1000", True),
        (" The  Cat. ", "the cat", True),
        ("1/0", "1/0", True),
        ("12", "13", False),
        ("cat", "cats", False),
        ("9" * 5000, "9" * 4999, False),
    ],
)
def test_answers_that_say_the_same(one: str, other: str, same: bool) -> None:
    assert same_answer(one, other) is same


def test_exact_answer_takes_what_it_is_told() -> None:
    row = {"answer": 1200, "other": "x"}
    assert exact_answer()("", "1,200", row) == 1
    assert exact_answer()("", "so it is 1,200", row) == 0
    assert exact_answer(take="last_number")("", "3 times 400 is 1,200.", row) == 1
    assert exact_answer(take="last_number")("", "no idea", row) == 0
    assert exact_answer(take="boxed")("", r"\boxed{7} no, \boxed{\text{a}}", {"answer": r"\text{a}"}) == 1
    assert exact_answer(take="boxed")("", r"\boxed{1200", row) == 0
    assert exact_answer(field="other")("", "X", row) == 1
    with pytest.raises(ConfigError, match="no field 'gone'"):
        exact_answer(field="gone")("", "1", row)
    with pytest.raises(ConfigError, match="take is 'first'"):
        exact_answer(take="first")  # type: ignore[arg-type]


def test_length_falls_off_over_the_margin() -> None:
    rule = length(minimum=2, maximum=4, margin=3)
    assert [rule("", "x" * size, {}) for size in range(9)] == [0.5, 0.75, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert length(maximum=2, unit="words")("", "one two three", {}) == 0
    assert length(minimum=2, unit="lines")("", "one\ntwo\n", {}) == 1
    assert length(minimum=3)("", "x" * 10**6, {}) == 1
    for wrong in ({"unit": "bytes"}, {"minimum": 3, "maximum": 2}, {"margin": -1}):
        with pytest.raises(ConfigError, match="reward length"):
            length(**wrong)


def test_json_answers() -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    assert [json_answer()("", text, {}) for text in ("[1]", "NaN", "[1", "[" * 100_000)] == [1, 0, 0, 0]
    assert [json_answer(schema=schema)("", text, {}) for text in ('{"a": 1}', '{"a": "1"}', "{}")] == [1, 0, 0]
    assert json_answer()("", "```json\n[1]\n```", {}) == 0
    assert json_answer(fenced=True)("", "```json\n[1]\n```", {}) == 1
    with pytest.raises(ConfigError, match="'minLenght' is not known, the nearest is minLength"):
        json_answer(schema={"properties": {"a": {"minLenght": 1}}})


SCHEMAS: list[Any] = [
    True,
    False,
    {"type": "integer"},
    {"type": ["string", "null"]},
    {"enum": [1, "a", [True]]},
    {"const": 1},
    {"anyOf": [{"type": "string"}, {"minimum": 2}]},
    {"oneOf": [{"type": "number"}, {"minimum": 2}]},
    {"allOf": [{"maximum": 3}, {"type": "integer"}]},
    {"not": {"type": "array"}},
    {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}, "required": ["a"]},
    {"additionalProperties": False, "minProperties": 1, "maxProperties": 1},
    {"items": {"type": "number"}, "minItems": 1, "maxItems": 2, "uniqueItems": True},
    {"minLength": 2, "maxLength": 3, "pattern": "^a"},
    {"exclusiveMinimum": 1, "exclusiveMaximum": 3},
    {"multipleOf": 0.5},
]
VALUES: list[Any] = [
    None, True, False, 0, 1, 1.0, 2, 2.5, 0.3, 3, "a", "ab", "abcd", "", [], [1], [1, 1.0], [True, 1], [True], [1, 2, 3],
    {}, {"a": 1}, {"a": "x"}, {"a": 1, "b": "y"}, {"a": 1, "b": 2}, {"b": "x"}, 1e300,
]  # fmt: skip


def test_the_json_check_agrees_with_another_implementation() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    for schema, value in itertools.product(SCHEMAS, VALUES):
        check_schema(schema)
        expected = jsonschema.Draft202012Validator(schema).is_valid(value)
        assert conforms(value, schema) is expected, (schema, value)


def test_multiples_are_those_of_the_written_numbers() -> None:
    assert conforms(0.3, {"multipleOf": 0.1})
    assert not conforms(0.35, {"multipleOf": 0.1})
    assert not conforms(float("inf"), {"multipleOf": 2})
    assert not conforms(float("inf"), {"type": "integer"})


def test_schemas_with_mistakes_are_refused() -> None:
    for wrong in ({"type": "int"}, {"items": 3}, {"anyOf": [{"foo": 1}]}, {"$ref": "#"}):
        with pytest.raises(ConfigError):
            check_schema(wrong)


def test_sums_weigh_their_parts(functions: ModuleType) -> None:
    rewards = Rewards(
        [
            RewardConfig(function="users_rewards:letters", weight=0.5),
            RewardConfig(function="users_rewards:times", weight=-2, options={"factor": 3}, name="penalty"),
            RewardConfig(function="regex", options={"pattern": "a"}),
        ]
    )
    first, second = rewards.score([judged("abc", x=1), judged("b", x=0)])
    assert (first.total, dict(first.parts)) == (1.5 - 6 + 1, {"letters": 3, "penalty": 3, "regex": 1})
    assert (second.total, second.num_failed) == (0.5, 0)


def test_a_failure_stops_the_run_and_names_the_row(functions: ModuleType) -> None:
    for name, what in (("fails", "ZeroDivisionError"), ("nan", "nan")):
        with pytest.raises(RewardError, match=rf"'{name}' failed on rows.jsonl:3: .*{what}"):
            Rewards([RewardConfig(function=f"users_rewards:{name}")]).score([judged("")])


def test_or_counts_as_what_is_configured(functions: ModuleType) -> None:
    config = RewardConfig(function="users_rewards:fails", on_error=-1, weight=2)
    bad, good = Rewards([config]).score([judged(""), judged("ab")])
    assert (bad.total, bad.num_failed, good.total, good.num_failed) == (-2, 1, 1, 0)


def test_workers_ask_at_the_same_time(functions: ModuleType) -> None:
    together = threading.Barrier(3, timeout=10)
    functions.meet = lambda prompt, answer, row: float(together.wait() >= 0)  # type: ignore[attr-defined]
    answers = [judged(str(number)) for number in range(3)]
    assert [
        score.total for score in Rewards([RewardConfig(function="users_rewards:meet", workers=3)]).score(answers)
    ] == [1] * 3

    def slow_at_first(prompt: str, answer: str, row: Any) -> float:
        time.sleep(0.02 / (1 + int(answer)))
        return float(answer)

    functions.meet = slow_at_first  # type: ignore[attr-defined]
    scores = Rewards([RewardConfig(function="users_rewards:meet", workers=2)]).score(answers)
    assert [score.total for score in scores] == [0, 1, 2], "answers keep their order"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"function": "regx"}, "nearest is regex"),
        ({"function": "users_rewards:gone"}, "no function 'gone'"),
        ({"function": "no_such_module:f"}, "cannot be imported"),
        ({"function": "users_rewards:narrow"}, "cannot be called"),
        ({"function": "users_rewards:times", "options": {"fctor": 1}}, "cannot be called"),
        ({"function": "regex", "options": {"patern": "a"}}, "nearest is pattern"),
        ({"function": "regex"}, "missing a required argument"),
        ({"function": "regex", "weight": 0}, "weight"),
        ({"function": "regex", "workers": 0}, "workers"),
        ({"function": "regex", "on_error": float("nan")}, "on_error"),
    ],
)
def test_mistakes_are_told(functions: ModuleType, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_reward(RewardConfig(**fields))


def test_names_are_unique_and_there_is_one(functions: ModuleType) -> None:
    one = RewardConfig(function="users_rewards:letters")
    with pytest.raises(ConfigError, match="two rewards are called 'letters'"):
        Rewards([one, one])
    with pytest.raises(ConfigError, match="no rewards"):
        Rewards([])


def test_options_may_come_from_a_file(tmp_path: Path) -> None:
    """Options are plain JSON values, as a configuration file has them."""
    options = json.loads('{"minimum": 1, "maximum": 2}')
    assert load_reward(RewardConfig(function="length", options=options))("", "abc", {}) == 0
