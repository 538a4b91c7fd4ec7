"""How many prompt tokens a step may carry beside sequences that decode: as many as make it less than twice as long.

Where many sequences wait for few that decode, a step may take longer in proportion: holding up one for the sake of seven is fair,
and the sooner they decode together, the more each step brings.

What a step costs depends on model, machine, context and company, so it is measured: the time of steps that only decode, by the
number of sequences, and what each further token adds. Results do not depend on how prompts are cut, only times do.
"""

from __future__ import annotations

_SLOWDOWN = 1.8
"""How much longer a step may take than one without prompts. Below 2: steps grow with the prompt, and averages lag behind."""
_PER_WAITING, _MOST = 2.0, 16.0
"""What each waiting sequence per decoding one adds to the share of prompts, and the most that it becomes: steps stay short enough
for a reader."""
_FIRST = 32
"""Tokens while nothing has been measured."""
_LEAST = 4
"""Fewer would hardly get a prompt done: most of such a step is the weights' way through memory, which decodes take anyway."""
_WEIGHT = 0.25
"""Of the newest measurement in an average."""


class Pace:
    """Watches steps and says how much the next one may take on."""

    def __init__(self, most: int, *, fixed: int | None = None) -> None:
        """Args: most: tokens at most. fixed: always so many, whatever they take."""
        self._most, self._fixed = most, fixed
        self._quiet_s: dict[int, float] = {}
        self._per_token_s: float | None = None

    def room(self, num_decodes: int, num_waiting: int = 0) -> int:
        """Tokens beside so many decoding sequences, while so many others wait or are being read."""
        if self._fixed is not None:
            return self._fixed
        quiet_s = self._quiet(num_decodes)
        if quiet_s is None or self._per_token_s is None:
            return min(_FIRST, self._most)
        share = min(max(_PER_WAITING * num_waiting / max(num_decodes, 1), 1.0), _MOST)
        return min(max(int((_SLOWDOWN - 1) * share * quiet_s / self._per_token_s), _LEAST), self._most)

    def observe(self, num_decodes: int, num_others: int, seconds: float) -> None:
        """A step with so many decoding sequences and other tokens has taken so long."""
        if not num_decodes:
            return
        if not num_others:
            self._quiet_s[num_decodes] = _mixed(self._quiet_s.get(num_decodes), seconds)
            return
        quiet_s = self._quiet(num_decodes)
        if quiet_s is not None:
            # Never nothing: a step that happened to be quick would let the next one take on everything.
            added_s = max(seconds - quiet_s, 0.05 * quiet_s)
            self._per_token_s = _mixed(self._per_token_s, added_s / num_others)

    def _quiet(self, num_decodes: int) -> float | None:
        """Seconds of a step that only decodes, measured with so many sequences or with the number next to it."""
        nearest = min(self._quiet_s, key=lambda known: abs(known - num_decodes), default=None)
        return None if nearest is None else self._quiet_s[nearest]


def _mixed(average: float | None, newest: float) -> float:
    return newest if average is None else (1 - _WEIGHT) * average + _WEIGHT * newest
