"""Small jobs on another thread while this one is busy with something that leaves Python's lock alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache


@contextmanager
def meanwhile(jobs: Sequence[Callable[[], object]]) -> Iterator[None]:
    """Do as many jobs as the block leaves time for, in order; when it ends, none is running any more.

    What a job raises is dropped, and so are jobs that did not get their turn: a job prepares what the caller can also do
    itself, and meets the same error then.
    """
    if not jobs:
        yield
        return
    over = False

    def work() -> None:
        for job in jobs:
            if over:
                return
            with suppress(Exception):
                job()

    working: Future[None] | None = None
    # A RuntimeError: the interpreter is on its way out and begins nothing new, but this thread may still finish.
    with suppress(RuntimeError):
        working = _worker(os.getpid()).submit(work)
    try:
        yield
    finally:
        over = True
        if working is not None and not working.cancel():
            working.exception()  # waits


@cache
def _worker(pid: int) -> ThreadPoolExecutor:
    """One thread for the process `pid`: threads do not survive a fork. The library ends it with the interpreter."""
    return ThreadPoolExecutor(1, thread_name_prefix=f"meanwhile-{pid}")
