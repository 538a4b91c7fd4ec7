"""The scheduler alone: counts in, counts out, no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.engine.pages import PagePool
from ernie45.engine.scheduler import Job, Scheduler, Work


class Simulation:
    """Plays the network: every sequence that reaches its end gets the next token of a script, its guesses judged by it."""

    def __init__(
        self, num_pages: int = 64, *, page_size: int = 4, seqs: int = 8, alone: int = 32, beside: int = 8, **pool: Any
    ) -> None:
        self.scheduler = Scheduler(
            PagePool(num_pages, page_size, **pool),
            max_num_seqs=seqs, max_step_tokens=alone, max_step_tokens_beside_decodes=beside,
        )  # fmt: skip
        self.goals: dict[Job, int] = {}
        self.finished: list[Job] = []

    def add(self, prompt: Sequence[int] | int, output: int = 4, **fields: Any) -> Job:
        tokens = (
            list(range(1000 * len(self.goals), 1000 * len(self.goals) + prompt)) if isinstance(prompt, int) else prompt
        )
        job = Job(tokens=list(tokens), **fields)
        self.goals[job] = len(job.tokens) + output
        self.scheduler.add(job)
        return job

    def step(self) -> tuple[Work, ...]:
        work = self.scheduler.plan()
        self.scheduler.check()
        assert len({id(one.job) for one in work}) == len(work)
        for one in work:
            job = one.job
            assert one.start == job.computed
            assert one.start + one.num_tokens <= len(job.pages) * self.scheduler.pool.page_size, "no room in its pages"
            chosen = 0
            if one.samples:
                for guess in (*one.drafts, None):
                    token = 7 * len(job.tokens) + job.tokens[0]
                    job.tokens.append(token)
                    chosen += 1
                    if guess != token or len(job.tokens) == self.goals[job]:
                        break
            self.scheduler.commit(one, chosen)
            if len(job.tokens) == self.goals[job]:
                self.scheduler.remove(job)
                self.finished.append(job)
        self.scheduler.check()
        return work

    def run(self, limit: int = 2000) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            assert self.step(), "nothing was planned though somebody waits"
            limit -= 1
            assert limit, "no end in sight"
        books = self.scheduler.pool.check()
        assert books.in_use == 0


def counts(work: Sequence[Work]) -> dict[Job, int]:
    return {one.job: one.num_tokens for one in work}


def test_a_prompt_alone_takes_the_large_steps_and_beside_decodes_the_small_ones() -> None:
    play = Simulation()
    first = play.add(40, 50)
    assert counts(play.step()) == {first: 32}
    assert counts(play.step()) == {first: 8}
    second = play.add(20, 3)
    assert counts(play.step()) == {first: 1, second: 8}
    assert counts(play.step()) == {first: 1, second: 8}
    assert counts(play.step()) == {first: 1, second: 4}
    assert counts(play.step()) == {first: 1, second: 1}


def test_decodes_are_served_in_every_step_whatever_waits() -> None:
    play = Simulation(num_pages=400, seqs=16)
    running = [play.add(3, 100) for _ in range(4)]
    play.step()
    for _ in range(10):
        play.add(60)
        assert all(counts(play.step()).get(job) == 1 for job in running)


def test_two_prompts_share_a_step() -> None:
    play = Simulation()
    first, second = play.add(20), play.add(30)
    assert counts(play.step()) == {first: 20, second: 12}


def test_admission_asks_for_all_pages_of_a_prompt_and_nobody_overtakes() -> None:
    play = Simulation(num_pages=10, alone=64, beside=64)
    first = play.add(20, 2)  # 5 pages
    large, small = play.add(32, 2), play.add(4, 2)
    assert counts(play.step()) == {first: 20}, (
        "the large one needs 8 pages of the 5 left; the small one stays behind it"
    )
    assert (small.pages, large.pages) == ([], [])
    play.run()
    assert play.finished[0] is first
    assert {*play.finished} == {first, large, small}


def test_one_page_is_kept_for_every_sequence_that_runs() -> None:
    play = Simulation(num_pages=8, beside=32)
    first = play.add(16, 8)
    play.step()
    second = play.add(12, 2)
    play.step()
    assert not second.pages, "three pages are free, but the first one is about to need the next"
    play.run()
    assert (first.num_preemptions, second.num_preemptions) == (0, 0)


def test_at_most_so_many_run() -> None:
    play = Simulation(seqs=2)
    jobs = [play.add(3) for _ in range(4)]
    assert counts(play.step()).keys() == set(jobs[:2])
    play.run()


def test_the_last_comer_makes_room_and_starts_over() -> None:
    play = Simulation(num_pages=8, beside=32, remembers=False)
    first, last = play.add(12, 16), play.add(11, 16)
    while not last.num_preemptions:
        assert first in counts(play.step())
    assert first.num_preemptions == 0
    assert (last.computed, last.pages) == (0, [])
    play.run()
    assert play.finished == [first, last]
    assert len(last.tokens) == 27


def test_what_was_interrupted_finds_its_own_pages_again() -> None:
    play = Simulation(num_pages=8, beside=32)
    first, last = play.add(12, 12), play.add(11, 12)
    while not last.num_preemptions:
        play.step()
    play.run()
    assert play.finished == [first, last]


def test_priority_goes_first_and_takes_places_and_pages() -> None:
    play = Simulation(num_pages=10, seqs=2)
    low = [play.add(8, 20), play.add(8, 20)]
    play.step()
    high = play.add(8, 4, priority=1)
    work = counts(play.step())
    assert high in work
    assert (low[0].num_preemptions, low[1].num_preemptions) == (0, 1), "the last comer of the lower priority"
    waiting = [play.add(8, 2), play.add(8, 2, priority=2)]
    play.run()
    assert play.finished.index(waiting[1]) < play.finished.index(waiting[0])
    equal = Simulation(num_pages=10, seqs=1)
    first, second = equal.add(8, 4, priority=1), equal.add(8, 4, priority=1)
    equal.run()
    assert (first.num_preemptions, second.num_preemptions) == (0, 0)


def test_tenants_get_equal_shares_whatever_the_number_of_their_requests() -> None:
    play = Simulation(num_pages=400, seqs=1)
    many = [play.add(8, 8, tenant="many") for _ in range(12)]
    few = [play.add(8, 8, tenant="few") for _ in range(3)]
    play.run()
    order = ["few" if job in few else "many" for job in play.finished]
    assert order[:6].count("few") == 3
    assert [job for job in play.finished if job in many] == many, "first come, first served within a tenant"


def test_a_long_prompt_of_one_tenant_does_not_hold_up_another() -> None:
    play = Simulation(num_pages=400, alone=16, beside=16)
    long = play.add(400, tenant="a")
    play.step()
    short = play.add(12, tenant="b")
    assert counts(play.step())[short] == 12
    assert long.computed == 20


def test_who_was_away_saves_up_no_service() -> None:
    play = Simulation(num_pages=400, seqs=1)
    for _ in range(6):
        play.add(8, 8, tenant="busy")
    for _ in range(40):
        play.step()
    late = [play.add(8, 8, tenant="late") for _ in range(6)]
    before = len(play.finished)
    play.run()
    assert sum(job in late for job in play.finished[before : before + 4]) <= 3, "it would get all four otherwise"
    play.add(1, 1, tenant="x")
    play.run()
    play.scheduler.plan()
    assert len(play.scheduler._served) <= 2, "accounts of those who left are closed"


def test_deadlines() -> None:
    play = Simulation(seqs=1)
    running, waiting, patient = play.add(8, 9, deadline=5.0), play.add(8, deadline=3.0), play.add(8, deadline=9.0)
    play.step()
    assert play.scheduler.expire(2.9) == ()
    assert play.scheduler.expire(3.0) == (waiting,)
    assert play.scheduler.expire(6.0) == (running,)
    assert play.scheduler.pool.books().in_use == 0
    play.run()
    assert play.finished == [patient]


def test_a_known_prefix_is_not_computed_again_but_for_the_last_token() -> None:
    play = Simulation()
    prompt = list(range(17))
    first = play.add(prompt, 6)
    play.run()
    again, longer, other = play.add(prompt), play.add([*first.tokens, 5, 6]), play.add(prompt, salt="other")
    work = counts(play.step())
    assert (work[again], again.cached) == (1, 16)
    assert (longer.cached, work[longer]) == (20, 5), "pages of the output are known, too"
    assert other.cached in (0, None)
    play.run()
    exact = play.add(list(range(16)))
    assert counts(play.step())[exact] == 4, "the last page again, as the last token must be computed"
    blind = play.add(prompt, reads_cache=False)
    play.run()
    assert blind.cached == 0


def test_equal_prompts_at_once_are_computed_once() -> None:
    play = Simulation(alone=60)  # room for all three in the first step
    prompt = list(range(19))
    jobs = [play.add(prompt) for _ in range(3)]
    urgent = play.add(prompt, priority=1)
    urgent_work = counts(play.step())
    assert urgent_work == {urgent: 19}
    play = Simulation(alone=60)
    jobs = [play.add(prompt) for _ in range(3)]
    computed = dict.fromkeys(jobs, 0)
    while any(job.computed < 19 for job in jobs) and len(play.finished) < 3:
        for one in play.step():
            if one.start < 19:
                computed[one.job] += one.count
    assert list(computed.values()) == [19, 3, 3]


def test_wrong_guesses_are_not_published() -> None:
    play = Simulation(page_size=2)
    job = play.add([0, 1, 2], 9)
    play.step()
    job.drafts = [7 * 4 + 0, 555, 556, 557]  # the first is right
    (work,) = play.step()
    assert work.drafts == (28, 555, 556, 557)
    assert (job.computed, len(job.tokens)) == (5, 6)
    keys: list[bytes] = []
    play.scheduler.pool.extend_keys(keys, [*job.tokens[:4], 28, 555], "")
    assert len(play.scheduler.pool.find(keys)) == 2
    play.run()
    assert job.tokens[3:] == [7 * at for at in range(3, 12)]


def test_guesses_take_the_room_that_prompts_leave_and_pages_that_are_free() -> None:
    play = Simulation(beside=6)
    job = play.add(3, 30)
    play.step()
    job.drafts = [1] * 20
    assert counts(play.step()) == {job: 7}
    other = play.add(20)
    job.drafts = [1] * 20
    assert counts(play.step()) == {job: 1, other: 6}
    tight = Simulation(num_pages=5)
    first, second = tight.add(3, 8), tight.add(4, 8)
    tight.step()
    for _ in range(3):
        for one in (first, second):
            one.drafts = [1] * 9
        tight.step()
    assert (first.num_preemptions, second.num_preemptions) == (0, 0)
    tight.run()


@given(
    jobs=st.lists(
        st.tuples(
            st.integers(1, 30), st.integers(1, 12), st.sampled_from("ab"), st.integers(0, 2), st.integers(0, 15), st.booleans()
        ),
        min_size=1, max_size=12,
    ),
    num_pages=st.integers(11, 30), seqs=st.integers(1, 5), alone=st.integers(1, 40), beside=st.integers(1, 9),
    remembers=st.booleans(), leave=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 30)), max_size=4),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_everybody_comes_to_an_end(
    jobs: list[Any], num_pages: int, seqs: int, alone: int, beside: int, remembers: bool, leave: list[Any]
) -> None:
    play = Simulation(num_pages, seqs=seqs, alone=alone, beside=beside, remembers=remembers)
    added: dict[int, Job] = {}
    left: set[int] = set()
    for step in range(31):
        for i, (prompt, output, tenant, priority, arrival, shared) in enumerate(jobs):
            if arrival == step:
                tokens = list(range(prompt)) if shared else prompt
                added[i] = play.add(tokens, output, tenant=tenant, priority=priority)
        for i, when in leave:
            if when == step and i in added and added[i] not in play.finished and i not in left:
                play.scheduler.remove(added[i])
                left.add(i)
        for job in play.scheduler.running:
            job.drafts = [7 * len(job.tokens) + job.tokens[0], 3]
        decoding = {job for job in play.scheduler.running if job.decoding}
        done = {one.job for one in play.step()}
        assert all(job in done or not job.pages for job in decoding), "who decodes is served or interrupted"
    play.run()
    assert len(play.finished) == len(jobs) - len(left)
    for i, (prompt, output, *_) in enumerate(jobs):
        assert i in left or len(added[i].tokens) == prompt + output


@pytest.mark.parametrize("size", [1, 4, 5])
def test_one_sequence_fills_the_pool_to_the_last_slot(size: int) -> None:
    play = Simulation(num_pages=3)
    job = play.add(size, 12 - size + 1)
    play.run()
    assert len(job.tokens) == 13
