"""What the verbs print: progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, Literal, TextIO

_BAR_WIDTH = 24
_TERMINAL_DELAY_S, _TERMINAL_REDRAW_S = 0.5, 0.1
# A log wants few lines, and none about what takes a moment.
_LOG_DELAY_S, _LOG_INTERVAL_S = 3.0, 3.0
_LOG_STEP = 0.05
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ProgressBar:
    """Bytes or rows done, rate and remaining time of one stage after the other, on stderr.

    On a terminal one line that is redrawn, from half a second on; elsewhere, from three seconds on, a line per 5 % and
    at most one every three seconds. Leaving the `with` block ends a line that is still open.
    """

    def __init__(self) -> None:
        self._begin("")
        self._line_open = False

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_line()

    def stage(self, label: str, unit: Literal["bytes", "rows"] = "bytes") -> Callable[[int, int], None]:
        """Begin a stage; returns what is to be called with the units done and in all."""
        self._end_line()
        self._begin(label, unit)
        return self._report

    def _begin(self, label: str, unit: str = "bytes") -> None:
        self._label, self._unit = label, unit
        self._start = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._drawn: tuple[float, float] | None = None

    def _report(self, done: int, total: int) -> None:
        now = time.monotonic()
        # The rate counts from the first report: what comes before it is opening files, not moving bytes.
        self._first = self._first or (now, done)
        share = done / total if total else 1.0
        if sys.stderr.isatty():
            redraw = self._drawn is None or now - self._drawn[0] >= _TERMINAL_REDRAW_S or done >= total
            if redraw and now - self._start >= _TERMINAL_DELAY_S:
                self._drawn = (now, share)
                width = shutil.get_terminal_size().columns - 1
                print(f"\r{self._line(done, total, now)[:width]}\x1b[K", end="", file=sys.stderr, flush=True)
                self._line_open = True
            if done >= total:
                self._end_line()
        elif self._log_is_due(now, share):
            self._drawn = (now, share)
            note(self._line(done, total, now))

    def _log_is_due(self, now: float, share: float) -> bool:
        if now - self._start < _LOG_DELAY_S:
            return False
        if self._drawn is None:
            return share < 1
        at, last = self._drawn
        return share >= 1 > last or (now - at >= _LOG_INTERVAL_S and share - last >= _LOG_STEP)

    def _line(self, done: int, total: int, now: float) -> str:
        assert self._first is not None, "a line is drawn after the first report"
        share = done / total if total else 1.0
        bar = ("#" * round(share * _BAR_WIDTH)).ljust(_BAR_WIDTH, ".")
        line = f"{self._label} [{bar}] {share:4.0%}  {self._amount(done)} of {self._amount(total)}"
        elapsed, moved = now - self._first[0], done - self._first[1]
        if elapsed > 0 and moved > 0:
            rate = moved / elapsed
            line += f", {self._amount(rate)}/s, {(total - done) / rate:.0f} s left"
        return line

    def _amount(self, count: float) -> str:
        return human_bytes(count) if self._unit == "bytes" else f"{human_count(round(count))} {self._unit}"

    def _end_line(self) -> None:
        if self._line_open:
            print(file=sys.stderr, flush=True)
            self._line_open = False


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
    """Print names and values in two columns; an empty name continues the line above."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name.ljust(width)}  {value}")


def shown(text: str, stream: TextIO | None = None) -> str:
    """Text of a model, for stdout or `stream`: a terminal does not get the control characters that it would obey."""
    return _CONTROL.sub("\ufffd", text) if (stream or sys.stdout).isatty() else text


def note(message: str) -> None:
    """Say something beside the data."""
    print(message, file=sys.stderr, flush=True)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)
