"""Requests and tokens per minute, and requests at a time, for each key."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ernie45.server.config import RateLimits
from ernie45.server.errors import ApiError

_MINUTE_S = 60.0
_ROUNDING_S = 1e-6
"""Who comes back exactly when told is let in, whatever floating point makes of the time."""


class Bucket:
    """A token bucket: holds a minute's worth, and fills evenly. What was set aside and not used comes back."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._level, self._at = float(per_minute), clock()

    @property
    def remaining(self) -> float:
        """What can be taken now; negative after more was used than was set aside."""
        now = self._clock()
        self._level = min(self._level + (now - self._at) * self.per_minute / _MINUTE_S, float(self.per_minute))
        self._at = now
        return self._level

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` is there."""
        return max(amount - self.remaining, 0.0) * _MINUTE_S / self.per_minute

    def take(self, amount: float) -> None:
        """Take, or with a negative amount give back."""
        self._level = min(self.remaining - amount, float(self.per_minute))


class Ticket:
    """A request that was let in; `settle` it once."""

    def __init__(self, account: _Account, reserved_tokens: int) -> None:
        self._account, self._reserved = account, reserved_tokens
        self._settled = False

    def settle(self, used_tokens: int) -> None:
        """The request has ended and used so many tokens. Further calls do nothing."""
        if self._settled:
            return
        self._settled = True
        self._account.running -= 1
        if self._account.tokens is not None:
            self._account.tokens.take(used_tokens - self._reserved)


class _Account:
    """What one caller has used."""

    def __init__(self, limits: RateLimits, clock: Callable[[], float]) -> None:
        rpm, tpm = limits.requests_per_minute, limits.tokens_per_minute
        self.requests = None if rpm is None else Bucket(rpm, clock)
        self.tokens = None if tpm is None else Bucket(tpm, clock)
        self.running = 0


class RateLimiter:
    """Lets requests in, or says when to come back."""

    def __init__(self, limits: RateLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._accounts: dict[str, _Account] = {}

    def enter(self, tenant: str, tokens: int) -> Ticket:
        """Let a request in.

        Args: tokens: the most that it can use: its prompt, and what its answers may take. Raises: ApiError, 429 with
            Retry-After; 400 if it could never be let in.
        """
        account = self._accounts.setdefault(tenant, _Account(self._limits, self._clock))
        most = self._limits.concurrent_requests
        if most is not None and account.running >= most:
            raise self._too_many(tenant, f"{account.running} requests of this key run, the limit is {most}", 1.0)
        if account.tokens is not None and tokens > account.tokens.per_minute:
            raise ApiError(
                400,
                f"the request can take {tokens} tokens, the key's limit is {account.tokens.per_minute} per minute: shorten the "
                "prompt or lower max_tokens",
                code="rate_limit_unreachable",
                param="max_tokens",
            )
        for bucket, amount, unit in ((account.requests, 1, "requests"), (account.tokens, tokens, "tokens")):
            if bucket is not None and (wait := bucket.wait_s(amount)) > _ROUNDING_S:
                message = f"the key's limit of {bucket.per_minute} {unit} per minute is reached"
                raise self._too_many(tenant, message, wait)
        for bucket, amount in ((account.requests, 1), (account.tokens, tokens)):
            if bucket is not None:
                bucket.take(amount)
        account.running += 1
        return Ticket(account, tokens)

    def headers(self, tenant: str) -> dict[str, str]:
        """What is left, in OpenAI's headers."""
        account = self._accounts.get(tenant)
        if account is None:
            return {}
        shown: dict[str, str] = {}
        for bucket, unit in ((account.requests, "requests"), (account.tokens, "tokens")):
            if bucket is not None:
                left = max(math.floor(bucket.remaining + _ROUNDING_S), 0)
                shown[f"x-ratelimit-limit-{unit}"] = str(bucket.per_minute)
                shown[f"x-ratelimit-remaining-{unit}"] = str(left)
                shown[f"x-ratelimit-reset-{unit}"] = f"{bucket.wait_s(bucket.per_minute):.3f}s"
        return shown

    def _too_many(self, tenant: str, message: str, wait_s: float) -> ApiError:
        retry = str(max(math.ceil(wait_s), 1))
        return ApiError(
            429,
            f"{message}: try again in {retry} s",
            code="rate_limit_exceeded",
            headers={"Retry-After": retry, **self.headers(tenant)},
        )
