"""Find stop strings in text that arrives in pieces."""

from __future__ import annotations


class StopChecker:
    """Passes text through, holding back what might be the beginning of a stop string.

    The string that is complete first wins; of those that complete at the same character, the one that began first. So
    the outcome does not depend on how the text was cut into pieces.
    """

    def __init__(self, stop: tuple[str, ...], *, included: bool = False) -> None:
        """Args: included: whether the string that is met may be shown."""
        self._stop = stop
        self._included = included
        self._held = ""

    def push(self, text: str, *, armed: bool) -> tuple[str, str | None]:
        """Add text; returns what may be shown and the stop string that was met, if any.

        Args: armed: False lets stop strings pass, as before `min_tokens`.
        """
        if not self._stop:
            return text, None
        text = self._held + text
        if not armed:
            self._held = ""
            return text, None
        found = [(text.index(stop) + len(stop), text.index(stop), stop) for stop in self._stop if stop in text]
        if found:
            end, begin, stop = min(found)
            self._held = ""
            return text[: end if self._included else begin], stop
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def finish(self) -> str:
        """The text still held back; no stop string can complete any more."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
