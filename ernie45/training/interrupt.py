"""Ctrl-C once: finish the step, save, exit. Twice: stop at once. SIGTERM counts as the first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_signal(tell: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether a stop was asked for; the old handlers come back behind the block.

    Args: tell: told once, when the first signal arrives. On other threads than the main one nothing can be handled, and the function
    always says no.
    """
    asked: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not asked:
            tell("stopping: finishing this step and saving; Ctrl-C again stops at once")
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
