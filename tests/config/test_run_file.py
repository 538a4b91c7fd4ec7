"""Run files: what is read, and how every kind of mistake is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.config.run_file import describe, dump_run, parse_run, read_run_file
from ernie45.errors import ConfigError, NotFoundError


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A section."""

    lr: float = 1e-3
    """Learning rate."""
    steps: int = 10
    kind: Literal["wsd", "cosine"] = "wsd"
    on: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}, expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One of a list."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A run."""

    method: str
    """What is done: a long line of words that is wrapped when it is printed, because a schema is read by people who do not like
    to scroll to the right."""
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    sources: tuple[Source, ...] = ()
    pair: tuple[float, float] = (0.9, 0.95)
    limit: int | None = None
    either: int | str = 0
    named: dict[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


def test_reads_every_kind_of_field() -> None:
    got = parse_run(
        """
        method: pretrain
        inner: {lr: 1e-5, steps: 3, kind: cosine, on: true}
        maybe: {lr: 1}
        sources:
          - path: a.jsonl
            weight: 2
          - {path: b.jsonl}
        pair: [0.1, 1]
        limit: null
        either: auto
        named: {x: .5}
        options: {pattern: "1e3", rate: 1e-3, list: [1, a, {b: null}]}
        """,
        Outer,
    )
    assert got == Outer(
        method="pretrain",
        inner=Inner(lr=1e-5, steps=3, kind="cosine", on=True),
        maybe=Inner(lr=1.0),
        sources=(Source(path="a.jsonl", weight=2.0), Source(path="b.jsonl")),
        pair=(0.1, 1.0),
        either="auto",
        named={"x": 0.5},
        options={"pattern": "1e3", "rate": 1e-3, "list": [1, "a", {"b": None}]},
    )
    assert isinstance(got.maybe, Inner)
    assert isinstance(got.maybe.lr, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: a\ninner:\n  stepz: 3", r"run file:3: inner.stepz is no key of a run file: did you mean steps\?"),
        ("method: a\nzzzzz: 1", "run file:2: zzzzz is no key of a run file: there are method, inner,"),
        ("inner: {}", "run file:1: method is missing and has no default"),
        ("method: a\nsources:\n- weight: 1", r"run file:3: sources\[0\].path is missing"),
        ("method: a\ninner:\n  steps: many", "run file:3: inner.steps is 'many', expected a whole number"),
        ("method: a\ninner:\n  steps: 1.5", "inner.steps is '1.5', expected a whole number"),
        ("method: a\ninner: {steps: true}", "inner.steps is 'true', expected a whole number"),
        ("method: a\ninner: {on: 1}", "inner.on is '1', expected true or false"),
        ("method: a\ninner: {lr: fast}", "inner.lr is 'fast', expected a number"),
        ("method: a\ninner: {lr: .inf}", "inner.lr is '.inf', expected a number"),
        ("method: a\ninner: {lr: nan}", "inner.lr is 'nan', expected a number"),
        ("method: no", "method is 'no', expected a text: write \"no\" in quotation marks"),
        (
            "method: a\ninner: {kind: cosin}",
            r"inner.kind is 'cosin', expected one of wsd, cosine: did you mean cosine\?",
        ),
        ("method: a\ninner: 3", "run file:2: inner is '3', expected keys with values"),
        ("method: [a]", "method is a list, expected a text"),
        ("method: a\npair: [1]", "pair has 1 entries, expected 2"),
        ("method: a\npair: 1", "pair is '1', expected a list"),
        ("method: a\neither: [1]", "either is a list, expected a whole number or a text"),
        ("method: a\nmethod: b", "run file:2: method is given twice in the file, before at run file:1"),
        ("method: a\ninner:\n  steps: 0", "run file:3: inner: steps is 0, expected 1 or more"),
        ("method: a\n  b: c: d", "run file:2: no valid YAML"),
        ("- a", "run file:1: a run file holds sections"),
        ("? [a]\n: b", "a key of the file is no word"),
        ("method: !!python/object:os.system x", "is no kind of value that a run file holds: leave the tag out"),
    ],
)
def test_mistakes_are_told_by_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run(text, Outer)


def test_settings_win_over_the_file_and_are_checked_alike() -> None:
    text = "method: a\ninner: {steps: 3}"
    got = parse_run(text, Outer, ["inner.steps=7", "maybe.lr=2e-4", "pair=[1, 2]", "method=b", "limit="])
    assert (got.inner.steps, got.method, got.pair, got.limit) == (7, "b", (1.0, 2.0), None)
    assert got.maybe == Inner(lr=2e-4)
    with pytest.raises(ConfigError, match=r"command line \(inner.stepz\): inner.stepz is no key"):
        parse_run(text, Outer, ["inner.stepz=7"])
    with pytest.raises(ConfigError, match=r"command line \(inner.steps\): inner.steps is 'x', expected a whole number"):
        parse_run(text, Outer, ["inner.steps=x"])
    for wrong in ("inner.steps", "=3", "a..b=1"):
        with pytest.raises(ConfigError, match="sets nothing: expected section.key=value"):
            parse_run(text, Outer, [wrong])


def test_an_empty_file_is_all_defaults_and_settings() -> None:
    assert parse_run("", Outer, ["method=x"]) == Outer(method="x")


numbers = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(max_size=20)
sources = st.builds(Source, path=words, weight=numbers)
inners = st.builds(
    Inner, lr=numbers, steps=st.integers(1, 10**12), kind=st.sampled_from(["wsd", "cosine"]), on=st.booleans()
)


@given(
    st.builds(
        Outer,
        method=words,
        inner=inners,
        maybe=st.none() | inners,
        sources=st.lists(sources, max_size=3).map(tuple),
        pair=st.tuples(numbers, numbers),
        limit=st.none() | st.integers(),
        named=st.dictionaries(words, numbers, max_size=3),
    )
)
def test_what_is_written_reads_back_equal(config: Outer) -> None:
    assert parse_run(dump_run(config), Outer) == config


def test_the_schema_holds_every_field_with_its_words() -> None:
    text = describe(Outer)
    assert "# What is done: a long line of words" in text
    assert "method: ...  # a text" in text
    assert "  # Learning rate.\n  lr: 0.001  # a number" in text
    assert "maybe:  # optional" in text
    assert "sources:  # a list of" in text
    assert "pair: [0.9, 0.95]  # a list" in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("method: x\nbad: 1")
    with pytest.raises(ConfigError, match=f"{path}:2: bad is no key"):
        read_run_file(path, Outer)
    with pytest.raises(NotFoundError, match="cannot read"):
        read_run_file(tmp_path / "none.yaml", Outer)
    path.write_bytes(b"a" * (1 << 20 | 1))
    with pytest.raises(ConfigError, match="at most 1048576"):
        read_run_file(path, Outer)
