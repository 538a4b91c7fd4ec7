"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass

from ernie45.engine.pages import Books


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Where things stand, and sums since the engine was built."""

    running: int
    waiting: int
    pages: Books
    page_size: int
    steps: int
    prompt_tokens: int
    """Of requests taken."""
    cached_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    preemptions: int

    @property
    def acceptance_rate(self) -> float | None:
        """Share of guesses that were right; None before the first guess."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None
