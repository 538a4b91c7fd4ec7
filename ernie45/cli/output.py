"""What the verbs print: progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

_BAR_WIDTH = 24
_REDRAW_S = 0.1


class ProgressBar:
    """Bytes done, rate and remaining time, on one line of a terminal; elsewhere one line per 20 %. Shown after half a
    second.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._start = time.monotonic()
        self._drawn = 0.0
        self._fifth = 0
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        """Report `done` of `total` bytes."""
        now = time.monotonic()
        elapsed = now - self._start
        finished = done >= total
        if sys.stderr.isatty():
            if elapsed > 0.5 and (finished or now - self._drawn > _REDRAW_S):
                self._drawn, self._shown = now, True
                print(
                    "\r" + self._line(done, total, elapsed), end="\n" if finished else "", file=sys.stderr, flush=True
                )
        elif total and 5 * done // total > self._fifth and elapsed > 0.5:
            self._fifth = 5 * done // total
            print(self._line(done, total, elapsed), file=sys.stderr, flush=True)

    def _line(self, done: int, total: int, elapsed: float) -> str:
        share = done / total if total else 1.0
        rate = done / elapsed if elapsed else 0.0
        remaining = (total - done) / rate if rate else 0.0
        bar = ("#" * round(share * _BAR_WIDTH)).ljust(_BAR_WIDTH, ".")
        amounts = f"{human_bytes(done)} of {human_bytes(total)}, {human_bytes(rate)}/s"
        return f"{self.label} [{bar}] {share:4.0%}  {amounts}, {remaining:.0f} s left "


def human_bytes(count: float) -> str:
    """`1234567` -> `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_count(count: int) -> str:
    """`21825437888` -> `21.8 B` (billions)."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def print_json(data: Any) -> None:
    """Print a dataclass, list or dict as JSON."""
    print(json.dumps(data, indent=2, ensure_ascii=False, default=_plain))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns, each as wide as its widest cell."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name.ljust(width)}  {value}")


def note(message: str) -> None:
    """Say something beside the data."""
    print(message, file=sys.stderr, flush=True)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)
