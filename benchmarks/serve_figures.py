"""From single answers to figures: percentiles, rates, goodput, what a long prompt does to its neighbours. Pure arithmetic.

Times are seconds. Only answers without an error count; errors are counted by kind beside them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.common import Spread, spread
from benchmarks.serve_load import Answer


@dataclass(frozen=True, kw_only=True)
class Percentiles:
    """How one quantity is distributed over requests."""

    p50: float
    p90: float
    p99: float
    medians: Spread
    """The median of every repeat: how far the figure can be trusted."""


@dataclass(frozen=True, kw_only=True)
class LoadFigures:
    """A closed loop, all repeats."""

    requests: int
    errors: Mapping[str, int]
    prompt_tokens: float
    """Mean, as the server counts them."""
    output_per_s: Spread | None
    """Output tokens per second, all streams together. This and what follows is None where no request succeeded."""
    requests_per_s: Spread | None
    ttft: Percentiles | None
    tpot: Percentiles | None
    gap: Percentiles | None
    elapsed: Percentiles | None
    tokens_per_event: float | None
    """Above 1 the server puts several tokens into one event, so that gaps are not those between tokens."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an answer must keep to be good."""

    ttft_s: float
    tpot_s: float

    def kept_by(self, answer: Answer) -> bool:
        """Whether the answer came, in time and fast enough."""
        if answer.error is not None or answer.ttft_s > self.ttft_s:
            return False
        return answer.tpot_s is None or answer.tpot_s <= self.tpot_s


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """Running streams before and while one long prompt is read."""

    quiet_tpot_s: float
    beside_tpot_s: float
    longest_gap_s: float
    """Of any stream while the prompt was read."""
    late_ttft_s: float

    @property
    def ratio(self) -> float:
        """How much slower the streams were."""
        return self.beside_tpot_s / self.quiet_tpot_s


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of all lie, between two of them on a straight line."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def percentiles(repeats: Sequence[Sequence[float]]) -> Percentiles | None:
    """Over the values of all repeats; None if there are none."""
    values = [value for repeat in repeats for value in repeat]
    if not values:
        return None
    return Percentiles(
        p50=percentile(values, 0.5),
        p90=percentile(values, 0.9),
        p99=percentile(values, 0.99),
        medians=spread([percentile(repeat, 0.5) for repeat in repeats if repeat]),
    )


def errors_of(answers: Sequence[Answer]) -> dict[str, int]:
    """How many failed, by kind."""
    return dict(Counter(answer.error for answer in answers if answer.error is not None))


def load_figures(repeats: Sequence[Sequence[Answer]]) -> LoadFigures:
    """What a load that was repeated says."""
    everything = [answer for repeat in repeats for answer in repeat]
    good = [[answer for answer in repeat if answer.error is None] for repeat in repeats]
    answered = [answer for repeat in good for answer in repeat]
    events = sum(len(answer.token_times_s) for answer in answered)
    rates = [_rates(repeat) for repeat in good if repeat]
    return LoadFigures(
        requests=len(everything),
        errors=errors_of(everything),
        prompt_tokens=sum(answer.prompt_tokens for answer in answered) / max(1, len(answered)),
        output_per_s=spread([tokens for tokens, _ in rates]) if rates else None,
        requests_per_s=spread([requests for _, requests in rates]) if rates else None,
        ttft=percentiles([[answer.ttft_s for answer in repeat] for repeat in good]),
        tpot=percentiles([[t for a in repeat if (t := a.tpot_s) is not None] for repeat in good]),
        gap=percentiles([[gap for answer in repeat for gap in answer.gaps_s] for repeat in good]),
        elapsed=percentiles([[answer.elapsed_s for answer in repeat] for repeat in good]),
        tokens_per_event=sum(answer.completion_tokens for answer in answered) / events if events else None,
    )


def goodput(answers: Sequence[Answer], limits: Limits, window_s: float) -> float:
    """Answers per second that keep the limits, over the time of arrivals or until the last of them ended, whichever is longer.

    The time behind the window counts, since a server must not look faster for working off a queue.
    """
    good = [answer for answer in answers if limits.kept_by(answer)]
    if not good:
        return 0.0
    begin = min(answer.start_s for answer in answers)
    return len(good) / max(window_s, max(answer.end_s for answer in good) - begin)


def disturbance(streams: Sequence[Answer], late: Answer) -> Disturbance | None:
    """Compare the streams before `late` was sent with the time until its first token.

    Quiet time begins with the first token of the last stream, when all prompts have been read.
    Returns: None if one of them failed, or a stream was over before `late` was sent.
    """
    if late.error is not None or any(stream.error is not None for stream in streams):
        return None
    if min(stream.token_times_s[-1] for stream in streams) <= late.start_s:
        return None
    begin = max(stream.token_times_s[0] for stream in streams)
    end = late.token_times_s[0]
    quiet = _tpot_within(streams, begin, late.start_s)
    beside = _tpot_within(streams, late.start_s, end)
    gaps = [
        b - a
        for stream in streams
        for a, b in zip(stream.token_times_s, stream.token_times_s[1:], strict=False)
        if b > late.start_s and a < end
    ]
    if quiet is None or beside is None:
        return None
    return Disturbance(
        quiet_tpot_s=quiet, beside_tpot_s=beside, longest_gap_s=max(gaps, default=0.0), late_ttft_s=late.ttft_s
    )


def _rates(answers: Sequence[Answer]) -> tuple[float, float]:
    """Output tokens and requests per second."""
    wall_s = max(answer.end_s for answer in answers) - min(answer.start_s for answer in answers)
    return sum(answer.completion_tokens for answer in answers) / wall_s, len(answers) / wall_s


def _tpot_within(streams: Sequence[Answer], begin: float, end: float) -> float | None:
    """Stream seconds per token between two times; a stream that ends before counts until its end. None without tokens."""
    seconds = tokens = 0.0
    for stream in streams:
        seconds += max(0.0, min(end, stream.token_times_s[-1]) - begin)
        events = sum(begin < at <= end for at in stream.token_times_s)
        tokens += events * stream.completion_tokens / len(stream.token_times_s)
    return seconds / tokens if tokens and seconds > 0 else None
