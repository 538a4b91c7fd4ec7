"""How much memory the machine has to spare."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")


def available_bytes(meminfo: str | None = None) -> int | None:
    """Memory that can be had without swapping, None where the system does not tell.

    Args: meminfo: text in the form of /proc/meminfo; None reads that.
    """
    if meminfo is None:
        try:
            meminfo = _MEMINFO.read_text(encoding="ascii")
        except OSError:
            return None
    lines = (line.split() for line in meminfo.splitlines())
    return next((int(words[1]) * 1024 for words in lines if words and words[0] == "MemAvailable:"), None)
