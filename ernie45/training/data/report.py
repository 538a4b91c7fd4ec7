"""What became of the rows that were read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ernie45.training.data.rows import BadRow

_MAX_LISTED = 1000
_COUNTS = (
    *("num_rows", "num_bad", "too_long", "nothing_learnt", "shortened", "num_used", "num_tokens", "num_learnt"),
    *("packed_rows", "packed_tokens"),
)


@dataclass(kw_only=True)
class DataReport:
    """Counts since the stream began, restored with it. Rows that wait to be packed count as used."""

    room: int
    """Tokens of a packed row."""
    num_rows: int = 0
    """Rows read, every epoch anew."""
    num_bad: int = 0
    """Rows left out because of what they say."""
    too_long: int = 0
    """Rows left out because they are longer than allowed."""
    nothing_learnt: int = 0
    """Rows left out because none of their tokens would be learnt."""
    shortened: int = 0
    """Rows that lost exchanges or tokens to become short enough."""
    num_used: int = 0
    num_tokens: int = 0
    """Tokens of the used rows."""
    num_learnt: int = 0
    """Of these the learnt ones."""
    packed_rows: int = 0
    packed_tokens: int = 0
    bad: list[BadRow] = field(default_factory=list)
    """The bad rows, each once, the first thousand. Not restored."""
    sizes: Counter[int] = field(default_factory=Counter)
    """How many rows, before anything was left out, have a size of so many binary digits. Not restored."""

    @property
    def efficiency(self) -> float:
        """Share of the packed rows that is filled; 1 before there is any."""
        return self.packed_tokens / (self.packed_rows * self.room) if self.packed_rows else 1.0

    def add_bad(self, row: BadRow, *, is_new: bool) -> None:
        """Count a bad row and, where it was not met before, list it."""
        self.num_bad += 1
        if is_new and len(self.bad) < _MAX_LISTED:
            self.bad.append(row)

    def counts(self) -> dict[str, int]:
        """What is kept with a stream's state."""
        return {name: getattr(self, name) for name in _COUNTS}

    def set_counts(self, counts: dict[str, int]) -> None:
        """Put `counts` back."""
        for name in _COUNTS:
            setattr(self, name, counts[name])

    def summary(self) -> dict[str, Any]:
        """Everything as JSON values."""
        listed = [{"origin": row.origin, "reason": row.reason} for row in self.bad]
        sizes = [{"up_to": (1 << digits) - 1, "rows": self.sizes[digits]} for digits in sorted(self.sizes)]
        return {**self.counts(), "efficiency": self.efficiency, "bad": listed, "sizes": sizes}
