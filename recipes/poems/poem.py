"""A poem as the recipe's files hold it, one per row; which poems are held out; repeatable samples."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie45.checkpoint.atomic import atomic_write_text

HELD_OUT_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class Poem:
    """A cleaned poem."""

    title: str
    author: str
    dynasty: str
    """One character: 唐 or 宋."""
    form: str
    """A name of `rules.FORMS`, or `rules.OTHER`."""
    lines: tuple[str, ...]
    """Each with the mark that ends it."""

    @property
    def verses(self) -> list[str]:
        """The lines without their marks."""
        return [line[:-1] for line in self.lines]

    @property
    def body(self) -> str:
        """As it is printed: two lines to a row."""
        return "\n".join("".join(self.lines[at : at + 2]) for at in range(0, len(self.lines), 2))

    @property
    def text(self) -> str:
        """With title and author: what is learnt in pre-training."""
        return f"《{self.title}》\n{self.dynasty}·{self.author}\n{self.body}\n"

    @property
    def key(self) -> str:
        """Equal for poems with equal characters, whatever their title and punctuation."""
        return hashlib.sha256("".join(self.verses).encode()).hexdigest()

    @property
    def held_out(self) -> bool:
        """Whether it is kept from training. The text decides, so that a copy of a held-out poem is held out, too."""
        return int(self.key[:8], 16) < HELD_OUT_SHARE * 2**32

    def as_row(self) -> dict[str, Any]:
        """One row of a file."""
        fields = {"title": self.title, "author": self.author, "dynasty": self.dynasty, "form": self.form}
        return {**fields, "lines": list(self.lines), "text": self.text}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Poem:
        """Read `as_row`."""
        fields = {name: row[name] for name in ("title", "author", "dynasty", "form")}
        return cls(lines=tuple(row["lines"]), **fields)


def read_poems(path: Path) -> Iterator[Poem]:
    """The poems of a file."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield Poem.of_row(json.loads(line))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as .jsonl; returns how many."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    atomic_write_text(path, "".join(lines))
    return len(lines)


def sample(poems: Iterable[Poem], count: int, seed: int) -> list[Poem]:
    """At most `count` poems, which ones and in which order by `seed` alone: not by the order in which they come."""
    return heapq.nsmallest(count, poems, key=lambda poem: draw_key(poem, seed))


def draw_key(poem: Poem, seed: int) -> str:
    """What a poem draws in a lottery of this seed."""
    return hashlib.sha256(f"{seed}:{poem.key}".encode()).hexdigest()
