"""What a run's data is: files, their shares, and how rows become tokens and packed rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ernie45.config.nearest import nearest
from ernie45.errors import ConfigError
from ernie45.processing.formats import FORMATS

FileFormat = Literal["auto", "jsonl", "json", "text", "parquet", "tokens"]
TextUnit = Literal["file", "paragraph"]
Packing = Literal["best_fit", "none"]
LongRows = Literal["drop", "left", "right", "error"]
Thoughts = Literal["last", "all", "none"]
Part = Literal["train", "valid", "test"]

_RESERVED_TOKENS = 10
"""Places that `max_prompt_len` leaves to the answers."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A file of rows."""

    path: str
    """A file, a folder with .txt files (all of them, in order of their names), or a folder of token files."""
    weight: float | None = None
    """Share of the samples, in proportion to the other sources' weights, above 0. None for every source: each row once per
    epoch."""
    format: FileFormat = "auto"
    """What the file is; `auto` goes by its ending (.jsonl, .json, .txt, .parquet; a folder with an index.json: tokens)."""
    text: TextUnit = "file"
    """What one document of plain text is: a `file`, or a `paragraph`, which blank lines end."""

    def __post_init__(self) -> None:
        _check_choices(self, format=FileFormat, text=TextUnit)
        if not self.path:
            raise ConfigError("a source needs a path")
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(f"weight of {self.path} is {self.weight}, expected a number above 0")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of a run. The order of rows follows from this alone."""

    train: tuple[SourceConfig, ...]
    """Where rows to learn from come from."""
    valid: tuple[SourceConfig, ...] = ()
    """Where rows of the part `valid` come from, instead of a share of `train`."""
    split: tuple[float, float, float] | None = None
    """Shares of the rows of `train` that go to train, valid and test, 1 in all. A row's content decides, so that equal rows
    stay together and a row keeps its part when others are added."""
    max_seq_len: int = 4096
    """Tokens that the network reads of one packed row, at least 2."""
    packing: Packing = "best_fit"
    """How documents share rows; `none`: one document in each."""
    buffer_rows: int = 32
    """How many rows' worth of documents wait to be fitted together, at least 1."""
    long_rows: LongRows = "drop"
    """What happens to a row above `max_seq_len`. `drop`: it is left out and counted. `left`: its oldest exchanges go, system text
    stays. `right`: its last tokens go. `error`: the run stops. Text to pre-train on is always cut into pieces instead."""
    max_prompt_len: int | None = None
    """Of preference and KTO rows: longest prompt in tokens, at most `max_seq_len` - 10. None: no limit of its own."""
    mask_out_eos: bool = True
    """Of preference and KTO rows: the token that closes an answer is not scored."""
    thoughts: Thoughts = "last"
    """Which assistant turns keep what stands in `<think>`: the `last`, `all`, or `none`, when the model shall answer at once."""
    chat_format: str | None = None
    """A built-in chat format instead of the tokenizer's own template."""
    add_bos: bool = False
    """Text to pre-train on: begin every document with the begin token."""
    add_eos: bool = True
    """Text to pre-train on: end every document with the end token."""
    shuffle: bool = True
    """Draw rows in a new order in every epoch; otherwise as they stand in their files."""
    seed: int = 0
    """Of that order."""
    strict: bool = False
    """Stop at the first bad row, instead of leaving it out and reporting it."""

    def __post_init__(self) -> None:
        _check_choices(self, packing=Packing, long_rows=LongRows, thoughts=Thoughts)
        if not self.train:
            raise ConfigError("train has no sources: name at least one file")
        for name, sources in (("train", self.train), ("valid", self.valid)):
            _check_weights(name, sources)
        if self.max_seq_len < 2 or self.buffer_rows < 1:
            raise ConfigError(
                f"max_seq_len is {self.max_seq_len} and buffer_rows {self.buffer_rows}, expected at least 2 and 1"
            )
        if self.max_prompt_len is not None and not 1 <= self.max_prompt_len <= self.max_seq_len - _RESERVED_TOKENS:
            raise ConfigError(
                f"max_prompt_len is {self.max_prompt_len}, expected 1 to max_seq_len - {_RESERVED_TOKENS} ="
                f" {self.max_seq_len - _RESERVED_TOKENS}: lower it or raise max_seq_len"
            )
        if self.chat_format is not None and self.chat_format not in FORMATS:
            raise ConfigError(f"chat_format is {self.chat_format!r}, {_known(self.chat_format, tuple(FORMATS))}")
        if self.split is not None:
            _check_split(self.split)

    def sources(self, part: Part) -> tuple[SourceConfig, ...]:
        """Where the rows of a part come from. Raises: ConfigError if the configuration has no such part."""
        if part == "valid" and self.valid:
            return self.valid
        if part != "train" and (self.split is None or self.share(part)[0] == self.share(part)[1]):
            raise ConfigError(f"there are no {part} rows: give split a share for them{_or_sources(part)}")
        return self.train

    def share(self, part: Part) -> tuple[float, float]:
        """The part's stretch of [0, 1), where the digests of its rows lie."""
        if self.split is None or (part == "valid" and self.valid):
            return 0.0, 1.0
        train, valid, _ = self.split
        edges = {"train": (0.0, train), "valid": (train, train + valid), "test": (train + valid, 1.0)}
        return edges[part]


def _or_sources(part: Part) -> str:
    return ", or name files under valid" if part == "valid" else ""


def _known(name: str, choices: tuple[str, ...]) -> str:
    return f"did you mean {nearest(name, choices)!r}? known are {', '.join(choices)}"


def _check_choices(config: object, **choices: Any) -> None:
    for name, literal in choices.items():
        value, known = getattr(config, name), get_args(literal)
        if value not in known:
            raise ConfigError(f"{name} is {value!r}, {_known(str(value), known)}")


def _check_weights(name: str, sources: tuple[SourceConfig, ...]) -> None:
    given = [source.weight is not None for source in sources]
    if any(given) and not all(given):
        without = sources[given.index(False)].path
        raise ConfigError(f"{name}: {without} has no weight and others have: give a weight to all sources or to none")


def _check_split(split: tuple[float, float, float]) -> None:
    if len(split) != 3 or min(split) < 0 or split[0] <= 0 or abs(sum(split) - 1) > 1e-6:
        raise ConfigError(f"split is {split}, expected three shares (train above 0, valid, test) that sum to 1")
