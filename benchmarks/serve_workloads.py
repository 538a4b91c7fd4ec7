"""The loads: what is sent to a server, in which order, and what is kept of it.

All servers get the same prompts: every load draws them from a seed of its own. Repeats are the outermost loop, so that a drift of
the machine shows in the spread of each figure.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.common import CoresMeter
from benchmarks.serve_figures import Limits, load_figures
from benchmarks.serve_load import Answer, Load, closed_loop, disturbed_streams, open_loop, poisson_times
from benchmarks.serve_servers import Running
from ernie45.errors import Ernie45Error

WORKLOADS = ("load", "prefix", "interference", "overload", "overhead", "startup")
_WARM_UP_TOKENS = 8
_PAIRS = 3
_SETTLE_LIMIT_S = 300.0
_TEXT = (
    "a ship comes in at dusk and the keeper of the light puts down his book to write the hour the wind and the number of lamps"
    " he can see from the stairs before the fog takes the coast and all that is left of it is a bell"
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is sent."""

    prompts: tuple[int, ...]
    """Lengths of prompts in tokens; the first is that of all workloads but `load`."""
    concurrency: tuple[int, ...]
    output_tokens: int
    rounds: int
    """Requests of each client per repeat."""
    repeats: int
    chat: bool
    deadline_s: float
    """When a client hangs up."""
    shared_tokens: int
    own_tokens: int
    streams: int
    stream_tokens: int
    late_tokens: int
    quiet_s: float
    limits: Limits
    overload_factors: tuple[float, ...]
    """Rates of arrivals, in what the server manages."""
    overload_s: float

    def longest(self, workloads: Sequence[str]) -> int:
        """Tokens of the longest sequence; conversations get room for a template."""
        lengths = [
            max(self.prompts) + self.output_tokens,
            self.shared_tokens + self.own_tokens + _WARM_UP_TOKENS if "prefix" in workloads else 0,
            max(self.late_tokens + 1, self.prompts[0] + self.stream_tokens) if "interference" in workloads else 0,
        ]
        return -(-(max(lengths) + 64) // 64) * 64

    def most_streams(self, workloads: Sequence[str]) -> int:
        """Sequences that run at once, without those of an overload."""
        return max(*self.concurrency, self.streams + 1 if "interference" in workloads else 1)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One load, once."""

    server: str
    workload: str
    case: Mapping[str, float | str]
    repeat: int
    answers: tuple[Answer, ...]
    wall_s: float
    client_cpu_s: float
    server_cpu_s: float
    other_cores: float | None
    """Cores that were busy with neither the server nor the client."""


class Prompts:
    """Seeded prompts without a common beginning."""

    def __init__(self, seed: str, vocab_size: int, tokenizer: Tokenizer | None) -> None:
        """Args: tokenizer: of the network, for text; None = token ids."""
        self._random, self._vocab_size, self._tokenizer = random.Random(seed), vocab_size, tokenizer

    def draw(self, tokens: int) -> list[int] | str:
        """A prompt of that many tokens; of text possibly one more or less, since a cut may change how its end is read."""
        if self._tokenizer is None:
            # From the middle of the vocabulary: special tokens lie at its ends.
            return [self._random.randrange(self._vocab_size // 8, 3 * self._vocab_size // 4) for _ in range(tokens)]
        text = ""
        ends: list[int] = []
        while len(ends) < tokens:
            text += " ".join(self._random.choices(_TEXT.split(), k=tokens // 4 + 1)) + " "
            ends = [end for _, end in self._tokenizer.encode(text, add_special_tokens=False).offsets]
        return text[: ends[tokens - 1]]


def overhead_prompts(plan: Plan, repeat: int, vocab_size: int) -> list[list[int] | str]:
    """The prompts of the workload `overhead` as token ids, for the engine without a server."""
    prompts = Prompts(f"overhead/{repeat}", vocab_size, None)
    return [prompts.draw(plan.prompts[0]) for _ in range(plan.rounds)]


class Workloads:
    """The loads of one server that runs."""

    def __init__(
        self, running: Running, plan: Plan, vocab_size: int, tokenizer_file: Path, note: Callable[[str], None]
    ) -> None:
        self._running, self._plan, self._note = running, plan, note
        self._vocab_size = vocab_size
        self._endpoint = running.endpoint(chat=plan.chat)
        ids = running.server.takes_ids and not plan.chat
        self._tokenizer = None if ids else Tokenizer.from_file(str(tokenizer_file))

    def run(self, workload: str) -> Iterator[Measured]:
        """Measure one of `WORKLOADS`, as far as a running server can."""
        yield from {
            "load": self._load,
            "prefix": self._prefix,
            "interference": self._interference,
            "overload": self._overload,
            "overhead": self._overhead,
            "startup": self._startup,
        }[workload]()

    def first_token_s(self) -> float:
        """From the start of the server's process to the first token of a first, short prompt. Raises: Ernie45Error."""
        body = self._bodies("first", 1, prompt=_WARM_UP_TOKENS, output=2)
        (answer,) = closed_loop(self._endpoint, body, 1, _SETTLE_LIMIT_S).answers
        if answer.error is not None:
            raise Ernie45Error(f"its first answer failed: {answer.error} {answer.detail}")
        return answer.token_times_s[0] - self._running.begin_s

    def _load(self) -> Iterator[Measured]:
        plan = self._plan
        cases = [(prompt, together) for prompt in plan.prompts for together in plan.concurrency]
        for repeat in range(plan.repeats):
            for prompt, together in cases:
                if repeat == 0:
                    self._warm_up(together)
                case = {"prompt": prompt, "output": plan.output_tokens, "together": together}
                seed = f"load/{prompt}/{together}/{repeat}"
                bodies = self._bodies(seed, together * plan.rounds, prompt=prompt, output=plan.output_tokens)
                yield self._closed("load", case, repeat, bodies, together)

    def _overhead(self) -> Iterator[Measured]:
        plan = self._plan
        self._warm_up(1)
        for repeat in range(plan.repeats):
            case = {"prompt": plan.prompts[0], "output": plan.output_tokens}
            bodies = self._bodies(f"overhead/{repeat}", plan.rounds, prompt=plan.prompts[0], output=plan.output_tokens)
            yield self._closed("overhead", case, repeat, bodies, 1)

    def _prefix(self) -> Iterator[Measured]:
        """One after the other: a prompt that begins like an earlier one, and one that does not."""
        plan = self._plan
        tokens = plan.shared_tokens + plan.own_tokens
        for repeat in range(plan.repeats):
            prompts = self._prompts(f"prefix/{repeat}")
            shared = prompts.draw(plan.shared_tokens)
            self._closed_loop([self._body(_joined(shared, prompts.draw(plan.own_tokens)), 2)], 1)
            for kind in ("miss", "hit") * _PAIRS:
                prompt = prompts.draw(tokens) if kind == "miss" else _joined(shared, prompts.draw(plan.own_tokens))
                case = {"kind": kind, "shared": plan.shared_tokens, "own": plan.own_tokens}
                yield self._closed("prefix", case, repeat, [self._body(prompt, 2)], 1)

    def _interference(self) -> Iterator[Measured]:
        plan = self._plan
        self._warm_up(plan.streams)
        for repeat in range(plan.repeats):
            case = {"streams": plan.streams, "prompt": plan.prompts[0], "late": plan.late_tokens}
            bodies = self._bodies(
                f"interference/{repeat}", plan.streams, prompt=plan.prompts[0], output=plan.stream_tokens
            )
            (late,) = self._bodies(f"late/{repeat}", 1, prompt=plan.late_tokens, output=1)
            yield self._watched(
                "interference",
                case,
                repeat,
                partial(disturbed_streams, self._endpoint, bodies, late, plan.quiet_s, plan.deadline_s),
            )

    def _overload(self) -> Iterator[Measured]:
        """What the server manages in a closed loop with all its streams, then arrivals at multiples of that rate."""
        plan, together = self._plan, max(self._plan.concurrency)
        self._warm_up(together)
        for repeat in range(plan.repeats):
            case: dict[str, float | str] = {
                "prompt": plan.prompts[0],
                "output": plan.output_tokens,
                "factor": "capacity",
            }
            bodies = self._bodies(
                f"capacity/{repeat}", together * plan.rounds, prompt=plan.prompts[0], output=plan.output_tokens
            )
            measured = self._closed("overload", case, repeat, bodies, together)
            yield measured
            capacity = load_figures([measured.answers]).requests_per_s
            if capacity is None:
                raise Ernie45Error(f"no request of the closed loop succeeded: {measured.answers[0].error}")
            for factor in plan.overload_factors:
                due_s = poisson_times(factor * capacity.median, plan.overload_s, seed=repeat) or [0.0]
                seed = f"overload/{factor}/{repeat}"
                arrivals = self._bodies(seed, len(due_s), prompt=plan.prompts[0], output=plan.output_tokens)
                offered = {**case, "factor": factor, "rate": factor * capacity.median}
                yield self._watched(
                    "overload",
                    offered,
                    repeat,
                    partial(open_loop, self._endpoint, arrivals, due_s, plan.deadline_s),
                )
                # Whatever still waits there must not burden the next rate.
                closed_loop(self._endpoint, self._bodies("settle", 1, prompt=8, output=2), 1, _SETTLE_LIMIT_S)

    def _startup(self) -> Iterator[Measured]:
        """Nothing: whoever starts the server has the times."""
        return iter(())

    def _warm_up(self, together: int) -> None:
        bodies = self._bodies(f"warm-up/{together}", together, prompt=_WARM_UP_TOKENS, output=_WARM_UP_TOKENS)
        failed = [answer for answer in self._closed_loop(bodies, together).answers if answer.error is not None]
        if failed:
            raise Ernie45Error(
                f"{len(failed)} of {together} requests of the warm-up failed: {failed[0].error} {failed[0].detail}"
            )

    def _closed(
        self,
        workload: str,
        case: Mapping[str, float | str],
        repeat: int,
        bodies: Sequence[Mapping[str, object]],
        together: int,
    ) -> Measured:
        return self._watched(workload, case, repeat, lambda: self._closed_loop(bodies, together))

    def _closed_loop(self, bodies: Sequence[Mapping[str, object]], together: int) -> Load:
        return closed_loop(self._endpoint, bodies, together, self._plan.deadline_s)

    def _watched(
        self, workload: str, case: Mapping[str, float | str], repeat: int, load: Callable[[], Load]
    ) -> Measured:
        name = self._running.server.name
        self._note(
            f"{name}: {workload} {' '.join(f'{key}={value}' for key, value in case.items())}, repeat {repeat + 1}"
        )
        meter, cpu_s, begin = CoresMeter(self._running.cpu_s), self._running.cpu_s(), time.perf_counter()
        done = load()
        wall_s = time.perf_counter() - begin
        return Measured(
            server=name,
            workload=workload,
            case=case,
            repeat=repeat,
            answers=done.answers,
            wall_s=wall_s,
            client_cpu_s=done.client_cpu_s,
            server_cpu_s=self._running.cpu_s() - cpu_s,
            other_cores=None if self._running.begin_s == 0.0 else meter.others(),
        )

    def _bodies(self, seed: str, count: int, *, prompt: int, output: int) -> list[dict[str, object]]:
        prompts = self._prompts(seed)
        return [self._body(prompts.draw(prompt), output) for _ in range(count)]

    def _body(self, prompt: Sequence[int] | str, output: int) -> dict[str, object]:
        return self._running.server.body(prompt, output, chat=self._plan.chat)

    def _prompts(self, seed: str) -> Prompts:
        return Prompts(seed, self._vocab_size, self._tokenizer)


def _joined(shared: list[int] | str, own: list[int] | str) -> list[int] | str:
    if isinstance(shared, str):
        assert isinstance(own, str), "prompts of one workload are of one kind"
        return shared + own
    assert not isinstance(own, str), "prompts of one workload are of one kind"
    return shared + own
