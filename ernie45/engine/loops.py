"""Outputs that repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence

from ernie45.engine.params import LoopDetection


class LoopDetector:
    """Sees every token once; a token costs one comparison per pattern length."""

    def __init__(self, what: LoopDetection) -> None:
        self._what = what
        # For each distance, how many tokens at the end equal the one that far before them.
        self._equal = [0] * (what.max_pattern + 1)

    def push(self, output: Sequence[int]) -> bool:
        """Whether `output`, which is one token longer than at the call before, now ends in a loop."""
        what, token, size = self._what, output[-1], len(output)
        found = False
        for distance in range(1, min(what.max_pattern, size - 1) + 1):
            if output[size - 1 - distance] != token:
                self._equal[distance] = 0
                continue
            self._equal[distance] += 1
            stretch = self._equal[distance] + distance
            found |= stretch >= max(what.repeats * distance, what.min_tokens)
        return found
