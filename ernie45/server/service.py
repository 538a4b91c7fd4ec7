"""What all routes share: the model behind this server, and the way of a request into the engine."""

from __future__ import annotations

import asyncio
import difflib
import math
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ernie45.engine.client import Answer, EngineClient
from ernie45.engine.prompts import check_ids, room_for_answer
from ernie45.engine.wire import Started, Submit
from ernie45.errors import EngineDownError
from ernie45.processing.tokenizer import Tokenizer
from ernie45.server.answering import Answering, Plan
from ernie45.server.config import ServerConfig
from ernie45.server.errors import ApiError
from ernie45.server.keys import Caller
from ernie45.server.metrics import Metrics
from ernie45.server.ratelimit import RateLimiter, Ticket

_Result = TypeVar("_Result")

RENDERERS = 2
"""Threads that render and encode prompts: a long one holds up neither the event loop nor a short one."""


class Service:
    """One model, served."""

    def __init__(
        self, config: ServerConfig, tokenizer: Tokenizer, engine: EngineClient, sampling_defaults: dict[str, Any]
    ) -> None:
        """Args: sampling_defaults: fields of `SamplingParams` that requests may leave out."""
        self.config, self.tokenizer, self.engine, self.sampling_defaults = config, tokenizer, engine, sampling_defaults
        self.model_name = config.served_model_names[0]
        self.metrics = Metrics(engine, self.model_name)
        self.limiter = RateLimiter(config.rate_limits)
        self.started_at = int(time.time())
        self.draining = False
        self.running: dict[Answering, tuple[Caller, str]] = {}
        """Requests that the engine has and that have not ended, each with its caller and its id."""
        self._entering = self._in_threads = 0
        self._mean_s = 0.0
        self._threads = ThreadPoolExecutor(RENDERERS, thread_name_prefix="render")

    @property
    def busy(self) -> bool:
        """Whether a request is on its way into the engine, or in it."""
        return bool(self._entering or self.running)

    @property
    def facts(self) -> Started:
        """What the engine says of itself. Raises: EngineDownError before it has said anything."""
        if self.engine.facts is None:
            raise EngineDownError("the model is being loaded: try again shortly")
        return self.engine.facts

    def check_model(self, name: str | None) -> None:
        """Insist on a model that is served here; none named is the one there is. Raises: ApiError, 404."""
        known = {served.lower(): served for served in self.config.served_model_names}
        if name is None or name.lower() in known:
            return
        close = difflib.get_close_matches(name.lower(), known, n=1)
        meant = known[close[0]] if close else self.model_name
        message = f"there is no model {name[:120]!r} here. Did you mean {meant!r}? GET /v1/models lists what there is"
        raise ApiError(404, message, code="model_not_found", param="model")

    def check_plans(self, plans: Sequence[Plan]) -> None:
        """Insist on what a caller may ask for. Raises: ApiError."""
        choices = sum(plan.params.num_generated for plan in plans)
        if choices > self.config.limits.choices:
            raise ApiError(
                400,
                f"the request asks for {choices} answers, the limit is {self.config.limits.choices}: lower n, best_of or the "
                "number of prompts",
                code="invalid_value",
                param="n",
            )
        if len(self.config.api_keys) > 1 and any(plan.priority > 0 for plan in plans):
            raise ApiError(
                403, "priority above 0 would go before the requests of others: send 0 or less", param="priority"
            )

    def check_operator(self, caller: Caller) -> None:
        """Insist on the key that may hold up everybody: the first. Raises: ApiError."""
        if not caller.is_first:
            raise ApiError(403, "this holds up the requests of all keys: send the first key of this server")

    async def in_thread(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """Run what takes the processor for a while beside the event loop. Raises: ApiError if too many wait for that."""
        if self._in_threads >= RENDERERS + self.config.limits.waiting:
            raise self._overloaded(self._in_threads - RENDERERS)
        self._in_threads += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        finally:
            self._in_threads -= 1

    async def answer(self, plans: Sequence[Plan], caller: Caller, request_id: str) -> Answering:
        """Let a request in and hand it to the engine.

        Raises: ApiError for what does not fit or is too much; RequestError for what the engine refuses.
        """
        arrived = time.monotonic()
        self._check_open()
        most = sum(self._most_tokens(plan) for plan in plans)
        ticket = self.limiter.enter(caller.tenant, most)
        self._entering += 1
        try:
            answers = await self._submit_all([self._submit(plan, caller) for plan in plans])
        except BaseException:
            ticket.settle(0)
            raise
        finally:
            self._entering -= 1
        answering = Answering(plans, answers, arrived, lambda ended: self._ended(ended, ticket))
        self.running[answering] = (caller, request_id)
        return answering

    def abort(self, request_ids: Collection[str], caller: Caller) -> int:
        """End the requests of these ids that run: the caller's own, for the first key those of all. Returns how many it were."""
        found = [
            answering
            for answering, (whose, name) in self.running.items()
            if name in request_ids and (caller.is_first or whose == caller)
        ]
        for answering in found:
            answering.abort()
        return len(found)

    async def _submit_all(self, submits: Sequence[Submit]) -> list[Answer]:
        """All or none."""
        if len(submits) == 1:
            return [await self.engine.submit(submits[0])]
        results = await asyncio.gather(*map(self.engine.submit, submits), return_exceptions=True)
        answers = [result for result in results if isinstance(result, Answer)]
        failure = next((result for result in results if isinstance(result, BaseException)), None)
        if failure is not None:
            for answer in answers:
                answer.abort()
            raise failure
        return answers

    def _check_open(self) -> None:
        """Overload and shutdown are said at once, not after a wait."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})
        if self.engine.state != "ready":
            raise EngineDownError("the engine is being started: try again shortly")
        waiting = self.engine.in_flight - self.facts.max_num_seqs
        if waiting >= self.config.limits.waiting or self._expected_s(waiting) > self.config.limits.wait_s:
            raise self._overloaded(waiting)

    def _expected_s(self, waiting: int) -> float:
        """Until the last of those that wait begins, from what answers took lately."""
        return waiting * self._mean_s / self.facts.max_num_seqs

    def _overloaded(self, waiting: int) -> ApiError:
        expected, limits = self._expected_s(waiting), self.config.limits
        return ApiError(
            429,
            f"{waiting} requests wait already, for about {expected:.0f} s; the limits are {limits.waiting} and {limits.wait_s:g} s: "
            "try again later",
            code="overloaded",
            headers={"Retry-After": str(min(max(math.ceil(expected), 1), 60))},
        )

    def _most_tokens(self, plan: Plan) -> int:
        """Tokens that a plan can take at most. Raises: RequestError if it does not fit."""
        room = room_for_answer(len(plan.prompt), plan.params.max_tokens, self.facts.max_model_len)
        check_ids(plan.prompt, self.facts.vocab_size)  # what is too long was refused unread
        return len(plan.prompt) + plan.params.num_generated * (plan.params.max_tokens or room)

    def _submit(self, plan: Plan, caller: Caller) -> Submit:
        # Behind a tenant's own salt a caller may tell its end users apart, but never reach another tenant's prefixes.
        salt = caller.tenant if plan.cache_salt is None else f"{caller.tenant}/{plan.cache_salt}"
        return Submit(
            id=secrets.token_hex(12),
            prompt=list(plan.prompt),
            params=plan.params,
            constraint=plan.constraint,
            begun=plan.begun,
            priority=plan.priority,
            tenant=caller.tenant,
            cache_salt=salt,
            timeout_s=self.config.limits.request_timeout_s,
        )

    def _ended(self, answering: Answering, ticket: Ticket) -> None:
        self.running.pop(answering, None)
        usage, timings = answering.usage, answering.timings
        ticket.settle(usage.prompt_tokens + usage.completion_tokens)
        self.metrics.ended(answering)
        assert timings.ended is not None, "it has ended"
        took = timings.ended - timings.arrived - max(answering.queue_times, default=0.0)
        self._mean_s = took if not self._mean_s else 0.9 * self._mean_s + 0.1 * took
