"""Rate limits on a clock of their own, against an obvious reference in whole numbers; and over HTTP."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.server.config import RateLimits
from ernie45.server.errors import ApiError
from ernie45.server.ratelimit import RateLimiter, Ticket
from tests.server.raw import wait_idle
from tests.server.served import Served

CHAT = "/v1/chat/completions"


class Reference:
    """One key's books in exact fractions."""

    def __init__(self, limits: RateLimits) -> None:
        self.limits = limits
        self.levels = [limits.requests_per_minute, limits.tokens_per_minute]
        self.full = [None if level is None else Fraction(level) for level in self.levels]
        self.now = list(self.full)
        self.running = 0

    def pass_time(self, seconds: Fraction) -> None:
        for at, full in enumerate(self.full):
            if full is not None:
                level = self.now[at]
                assert level is not None
                self.now[at] = min(full, level + seconds * full / 60)

    def enter(self, tokens: int) -> bool:
        most = self.limits.concurrent_requests
        if most is not None and self.running >= most:
            return False
        amounts = [Fraction(1), Fraction(tokens)]
        if any(level is not None and level < amount for level, amount in zip(self.now, amounts, strict=True)):
            return False
        self.now = [None if level is None else level - amount for level, amount in zip(self.now, amounts, strict=True)]
        self.running += 1
        return True

    def settle(self, reserved: int, used: int) -> None:
        self.running -= 1
        if self.now[1] is not None and self.full[1] is not None:
            self.now[1] = min(self.full[1], self.now[1] + reserved - used)


limits = st.builds(
    RateLimits,
    requests_per_minute=st.none() | st.integers(1, 8),
    tokens_per_minute=st.none() | st.integers(1, 200),
    concurrent_requests=st.none() | st.integers(1, 3),
)
# Times are multiples of 1/64 s: floating point holds them exactly, as the reference does.
actions = st.lists(
    st.tuples(st.just("wait"), st.integers(0, 64 * 40), st.just(0))
    | st.tuples(st.just("enter"), st.integers(0, 1), st.integers(0, 200))
    | st.tuples(st.just("settle"), st.integers(0, 5), st.integers(0, 250)),
    max_size=40,
)


@given(limits, actions)
def test_who_is_let_in_is_who_should_be(limits: RateLimits, actions: list[tuple[str, int, int]]) -> None:
    now = 0.0
    limiter = RateLimiter(limits, lambda: now)
    references = [Reference(limits), Reference(limits)]
    open_tickets: list[tuple[Ticket, int, int]] = []
    for action, one, other in actions:
        if action == "wait":
            now += one / 64
            for reference in references:
                reference.pass_time(Fraction(one, 64))
        elif action == "settle" and open_tickets:
            ticket, tenant, reserved = open_tickets.pop(one % len(open_tickets))
            ticket.settle(other)
            ticket.settle(10**6)  # the second time counts for nothing
            references[tenant].settle(reserved, other)
        elif action == "enter":
            if limits.tokens_per_minute is not None and other > limits.tokens_per_minute:
                continue
            nearly = [
                level is not None and 0 < amount - level < Fraction(1, 10**4)
                for level, amount in zip(references[one].now, (1, other), strict=True)
            ]
            if any(nearly):
                continue  # within the tolerance either answer is right
            if references[one].enter(other):
                open_tickets.append((limiter.enter(f"tenant {one}", other), one, other))
            else:
                with pytest.raises(ApiError) as refused:
                    limiter.enter(f"tenant {one}", other)
                assert refused.value.status == 429
                assert int(refused.value.headers["Retry-After"]) >= 1
    for at, reference in enumerate(references):
        headers = limiter.headers(f"tenant {at}")
        for level, unit in zip(reference.now, ("requests", "tokens"), strict=True):
            if headers and level is not None:
                assert abs(int(headers[f"x-ratelimit-remaining-{unit}"]) - max(math.floor(level), 0)) <= 1


@given(st.integers(1, 1000), st.integers(1, 50_000), st.integers(1, 50_000))
def test_who_comes_back_when_told_is_let_in(rpm: int, first: int, second: int) -> None:
    now = 0.0
    limiter = RateLimiter(RateLimits(requests_per_minute=rpm, tokens_per_minute=50_000), lambda: now)
    limiter.enter("a", first).settle(first)
    for tokens in (second, first):
        try:
            limiter.enter("a", tokens)
        except ApiError as error:
            now += int(error.headers["Retry-After"])
            limiter.enter("a", tokens)


def test_a_request_that_could_never_run_is_a_400_that_says_so() -> None:
    limiter = RateLimiter(RateLimits(tokens_per_minute=100))
    with pytest.raises(ApiError, match="can take 101 tokens, the key's limit is 100") as caught:
        limiter.enter("a", 101)
    assert caught.value.status == 400


def test_a_refused_request_takes_nothing() -> None:
    limiter = RateLimiter(RateLimits(requests_per_minute=5, tokens_per_minute=100), lambda: 0.0)
    limiter.enter("a", 60)
    for _ in range(10):
        with pytest.raises(ApiError):
            limiter.enter("a", 60)
    assert limiter.headers("a")["x-ratelimit-remaining-requests"] == "4"
    limiter.enter("a", 40)


@pytest.fixture(scope="module")
def metered(start: Callable[..., Served]) -> Served:
    """Two keys with little each."""
    options = ["--requests-per-minute", "6", "--tokens-per-minute", "2000", "--concurrent-requests", "2"]
    return start("ernie", "--max-model-len", "2048", *options, "--api-key", "the-other-key")


def _chat(served: Served, key: str, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, **fields}
    return httpx.post(served.url + CHAT, json=body, headers={"authorization": f"Bearer {key}"}, timeout=30)


def test_headers_count_down_and_keys_are_apart(metered: Served) -> None:
    first = _chat(metered, metered.key)
    assert first.headers["x-ratelimit-limit-requests"] == "6"
    assert first.headers["x-ratelimit-remaining-requests"] == "5"
    failing = [_chat(metered, metered.key, max_tokens=1900, guided_regex="(").status_code for _ in range(3)]
    assert failing == [400] * 3  # 1900 tokens each were set aside, and given back
    last = [_chat(metered, metered.key) for _ in range(3)]
    assert [answer.status_code for answer in last] == [200, 200, 429]
    refused = last[-1]
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(refused.headers["retry-after"]) <= 11
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    other = _chat(metered, "the-other-key")
    assert other.status_code == 200
    assert other.headers["x-ratelimit-remaining-requests"] == "5"


def test_requests_at_a_time_are_bounded_and_come_back_when_a_client_leaves(metered: Served) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 900, "ignore_eos": True, "stream": True}
    settings: dict[str, Any] = {"headers": {"authorization": "Bearer the-other-key"}, "timeout": 30}
    with (
        httpx.Client(base_url=metered.url, **settings) as client,
        client.stream("POST", CHAT, json=body) as one,
        client.stream("POST", CHAT, json=body) as two,
    ):
        assert (one.status_code, two.status_code) == (200, 200)
        third = client.post(CHAT, json={**body, "stream": False, "max_tokens": 1})
        assert third.status_code == 429
        assert "2 requests of this key run" in third.json()["error"]["message"]
    wait_idle(metered)
    assert _chat(metered, "the-other-key").status_code == 200
