"""Who computes what in the next step: pure Python over ids and counts.

A step first serves every sequence that decodes, whatever else waits: one token each. Beside them there
is room for a number of tokens: prompts take it, in pieces; what they leave is for guesses at what comes next, which are
verified along. So a long prompt slows the others down by a known amount and
never holds them up.

Order among prompts: higher priority first; then the tenant that was served least (tokens computed, generated ones counted
double), then first come, first served. Tenants that were away do not save up service: they begin with what the least
served of the others has. Source: Sheng et al., Fairness in Serving Large Language Models, 2024 (virtual token counter).

A sequence is admitted when the pages of all its tokens are there, besides one spare page for each sequence that runs. A
running one that needs a page when there is none takes it from the last in order of priority and arrival, which starts over
later: its pages are given back, its tokens are computed again. The first in that order is never interrupted, and alone it
always fits, so something always gets done.

A prompt whose next page is being computed for another sequence waits for that page instead of computing it, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ernie45.engine.pages import PagePool


@dataclass(eq=False, kw_only=True)
class Job:
    """One sequence in numbers."""

    tokens: list[int]
    """Prompt and output so far. The engine appends; at least one token more than is computed."""
    tenant: str = ""
    salt: str = ""
    """Sequences find each other's prefixes if their salts are equal."""
    priority: int = 0
    """Larger goes first."""
    deadline: float = math.inf
    """Time, by the clock of `expire`, at which the sequence must have ended."""
    reads_cache: bool = True
    """Use known prefixes; False computes every token, as prompt log-probabilities need it."""
    drafts: Sequence[int] = ()
    """Guesses at the tokens behind `tokens`, for the next step."""

    # The scheduler's own, to be read only.
    arrival: int = -1
    computed: int = 0
    """Tokens whose keys and values are in the pages."""
    cached: int | None = None
    """Tokens that were found instead of computed when the sequence was first admitted; None before that."""
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_preemptions: int = 0

    @property
    def decoding(self) -> bool:
        """Whether everything but the last token is computed."""
        return bool(self.pages) and self.computed == len(self.tokens) - 1


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step computes of one sequence: `count` tokens from `start` on, then guesses."""

    job: Job
    start: int
    count: int
    drafts: tuple[int, ...] = ()

    @property
    def samples(self) -> bool:
        """Whether the step reaches the end of what is known, so that the next token can be chosen."""
        return self.start + self.count == len(self.job.tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens that the network runs."""
        return self.count + len(self.drafts)


class Scheduler:
    """Decides; knows nothing of tensors, texts or requests."""

    def __init__(
        self, pool: PagePool, *, max_num_seqs: int, max_step_tokens: int, max_step_tokens_beside_decodes: int
    ) -> None:
        """Args: max_num_seqs: sequences that run at a time. max_step_tokens: prompt tokens of a step in which nothing decodes.
        max_step_tokens_beside_decodes: prompt tokens and guesses of a step in which something does; may be set anew at any time.
        """
        self.pool = pool
        self._max_num_seqs = max_num_seqs
        self._room_alone = max_step_tokens
        self.max_step_tokens_beside_decodes = max_step_tokens_beside_decodes
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.num_preemptions = 0
        self._arrivals = 0
        self._served: dict[str, int] = {}
        self._least_served = 0

    def add(self, job: Job) -> None:
        """Queue a sequence. Alone, with all the tokens that it may grow to, it must fit into the pool."""
        job.arrival = self._arrivals
        self._arrivals += 1
        if all(other.tenant != job.tenant for other in self._jobs()):
            self._served[job.tenant] = max(self._served.get(job.tenant, 0), self._least_served)
        self.waiting.append(job)

    def remove(self, job: Job) -> None:
        """Forget a sequence that has ended, for whatever reason; its pages go back."""
        (self.running if job in self.running else self.waiting).remove(job)
        self._release(job)

    def expire(self, now: float) -> tuple[Job, ...]:
        """Remove the sequences whose deadline has passed, and return them."""
        expired = tuple(job for job in self._jobs() if job.deadline <= now)
        for job in expired:
            self.remove(job)
        return expired

    def plan(self) -> tuple[Work, ...]:
        """Decide on the next step; takes pages, admits and interrupts. All work must be committed, or its job removed."""
        self._settle()
        work: dict[Job, Work] = {}
        num_preemptions = self.num_preemptions
        for job in sorted((job for job in self.running if job.decoding), key=_rank):
            if job.pages and self._make_room(job, work):
                work[job] = Work(job=job, start=job.computed, count=1)
        room = self.max_step_tokens_beside_decodes if work else self._room_alone
        # Whoever was just interrupted must not come back at once, at the cost of the one who needed the pages.
        room -= self._add_prompts(work, room, may_admit=self.num_preemptions == num_preemptions)
        self._add_drafts(work, room)
        return tuple(work.values())

    def commit(self, work: Work, num_chosen: int = 0) -> None:
        """Note that planned work is done.

        Args: num_chosen: tokens that were chosen and stand at the end of `job.tokens` now; all but the last are guesses that
            were right, so their keys and values are there.
        """
        job = work.job
        num_accepted = max(num_chosen - 1, 0)
        job.computed = work.start + work.count + num_accepted
        job.drafts = ()
        self._served[job.tenant] += work.count + num_accepted + num_chosen
        self._publish(job)

    def check(self) -> None:
        """Prove the books. Raises: AssertionError."""
        self.pool.check(job.pages for job in self._jobs())
        for job in self.waiting:
            assert not job.pages, "a waiting sequence holds pages"
        for job in self.running:
            assert len(job.pages) >= self.pool.pages_for(job.computed), "a sequence has more tokens than its pages hold"

    def _jobs(self) -> list[Job]:
        return [*self.running, *self.waiting]

    def _make_room(self, job: Job, work: dict[Job, Work]) -> bool:
        """Pages for all tokens of a running sequence, by interrupting others if need be; False if it hit itself."""
        needed = self.pool.pages_for(len(job.tokens)) - len(job.pages)
        while needed > self.pool.available:
            last = max(self.running, key=_rank)
            self._preempt(last, work)
            if last is job:
                return False
        job.pages += self.pool.take(max(needed, 0))
        return True

    def _add_prompts(self, work: dict[Job, Work], room: int, *, may_admit: bool) -> int:
        """Plan pieces of prompts, admitting sequences where they fit; returns their tokens."""
        prefilling = [job for job in self.running if not job.decoding]
        coming = self._coming(prefilling)
        left = room
        for job in sorted([*prefilling, *self.waiting], key=self._order):
            if left <= 0:
                break
            if not job.pages:
                if not may_admit or self._waits_for_page(job, coming):
                    continue
                may_admit = self._admit(job, work)
                if not may_admit:  # nobody overtakes, or a large prompt would wait for ever
                    continue
                coming.update(self._coming([job]))
            count = min(len(job.tokens) - job.computed, left)
            work[job] = Work(job=job, start=job.computed, count=count)
            left -= count
        return room - left

    def _add_drafts(self, work: dict[Job, Work], room: int) -> None:
        """Let guesses ride along where there is room, and pages without interrupting anybody."""
        for job, planned in list(work.items()):
            slots = (len(job.pages) + self.pool.available) * self.pool.page_size - len(job.tokens)
            drafts = tuple(job.drafts[: max(min(room, slots), 0)]) if planned.samples else ()
            if drafts:
                needed = self.pool.pages_for(len(job.tokens) + len(drafts)) - len(job.pages)
                job.pages += self.pool.take(max(needed, 0))
                work[job] = replace(planned, drafts=drafts)
                room -= len(drafts)

    def _admit(self, job: Job, work: dict[Job, Work]) -> bool:
        """Give a waiting sequence its pages and let it run, if it fits; sequences of lower priority make room."""
        while True:
            known = self.pool.find(self._keys_to_look_up(job))
            needed = self.pool.pages_for(len(job.tokens)) - len(known)
            spare = len(self.running)
            fits = needed + spare + self.pool.num_unused(known) <= self.pool.available
            if fits and len(self.running) < self._max_num_seqs:
                break
            lower = [other for other in self.running if other.priority < job.priority]
            if not lower:
                return False
            self._preempt(max(lower, key=_rank), work)
        self.pool.share(known)
        job.pages = known + self.pool.take(needed)
        job.computed = len(known) * self.pool.page_size
        job.num_published = len(known)
        if job.cached is None:
            job.cached = job.computed
        self.waiting.remove(job)
        self.running.append(job)
        return True

    def _preempt(self, job: Job, work: dict[Job, Work]) -> None:
        """Interrupt a running sequence: it waits again and keeps its place in the order."""
        work.pop(job, None)
        self.running.remove(job)
        self._release(job)
        self.waiting.append(job)
        job.num_preemptions += 1
        self.num_preemptions += 1

    def _release(self, job: Job) -> None:
        self.pool.give_back(job.pages)
        job.pages = []
        job.drafts = ()
        job.computed, job.num_published = 0, 0

    def _publish(self, job: Job) -> None:
        """Make the full pages known whose tokens are certain: those computed, guesses that were wrong not among them."""
        full = job.computed // self.pool.page_size
        if full > job.num_published:
            self.pool.extend_keys(job.keys, job.tokens, job.salt)
            for at in range(job.num_published, full):
                self.pool.publish(job.pages[at], job.keys[at])
            job.num_published = full

    def _keys_to_look_up(self, job: Job) -> list[bytes]:
        """Keys of the pages that may be shared: the last token is always computed, for the logits behind it."""
        if not job.reads_cache:
            return []
        self.pool.extend_keys(job.keys, job.tokens, job.salt)
        return job.keys[: (len(job.tokens) - 1) // self.pool.page_size]

    def _coming(self, prefilling: Sequence[Job]) -> dict[bytes, int]:
        """Pages that are being computed now, with the priority at which that is done."""
        coming = {}
        for job in prefilling:
            self.pool.extend_keys(job.keys, job.tokens, job.salt)
            coming.update(dict.fromkeys(job.keys[job.num_published :], job.priority))
        return coming

    def _waits_for_page(self, job: Job, coming: dict[bytes, int]) -> bool:
        keys = self._keys_to_look_up(job)
        known = len(self.pool.find(keys))
        return known < len(keys) and coming.get(keys[known], -math.inf) >= job.priority

    def _order(self, job: Job) -> tuple[int, int, int]:
        return -job.priority, self._served[job.tenant], job.arrival

    def _settle(self) -> None:
        """Keep the tenants' accounts: where newcomers begin, and nothing about those who are away and not ahead."""
        present = {job.tenant for job in self._jobs()}
        if present:
            self._least_served = max(self._least_served, min(self._served[tenant] for tenant in present))
        for tenant in [t for t in self._served if t not in present and self._served[t] <= self._least_served]:
            del self._served[tenant]


def _rank(job: Job) -> tuple[int, int]:
    """Order in which running sequences keep their pages."""
    return -job.priority, job.arrival
