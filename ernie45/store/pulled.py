"""What a pull answers, and how it reports on its way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ernie45.checkpoint.load import Progress

Stages = Callable[[str], Progress]
"""Called with the name of a stage; returns what is called with the bytes done and in all."""


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """Where a model is now."""

    name: str
    path: Path
    fresh: bool
    """False if it was there already."""


def stage(progress: Stages | None, name: str) -> Progress | None:
    """Begin a stage, if anybody listens."""
    return None if progress is None else progress(name)
