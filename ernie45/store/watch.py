"""Progress of a download that somebody else performs: the size of the folder that it fills."""

from __future__ import annotations

import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ernie45.checkpoint.load import Progress

_POLL_S = 0.2


@contextmanager
def watched(folder: Path, total_bytes: int, report: Progress | None) -> Iterator[None]:
    """Report the bytes in `folder` while the block runs, never more than `total_bytes`; None reports nothing."""
    if report is None:
        yield
        return
    done = threading.Event()

    def poll() -> None:
        while not done.wait(_POLL_S):
            report(min(_size(folder), total_bytes), total_bytes)

    thread = threading.Thread(target=poll, name="download progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            found = file.lstat()
        except OSError:  # renamed or removed since it was listed
            continue
        if stat.S_ISREG(found.st_mode):
            total += found.st_size
    return total
