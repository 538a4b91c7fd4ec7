"""The engine: many requests at once, one step after the other.

A step is: drop what is over time, plan, run the network once, sample, publish. One thread owns an engine and calls all its
methods; it never waits, and nothing happens between calls.

    engine = Engine(model, tokenizer)
    engine.add(Request(id="a", prompt=(5, 6, 7)))
    while engine.has_work:
        for event in engine.step():
            ...
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ernie45.engine.config import EngineConfig, num_pages, resolve
from ernie45.engine.drafts import MtpSpeculation, NgramDrafter, NgramSpeculation
from ernie45.engine.generation import Generation
from ernie45.engine.meanwhile import meanwhile
from ernie45.engine.memory import available_bytes
from ernie45.engine.pace import Pace
from ernie45.engine.pages import PagePool
from ernie45.engine.pieces import Piece, TokenLogprob, join
from ernie45.engine.prompts import check_ids, room_for_answer
from ernie45.engine.request import End, EndCause, EndKind, Event, Output, PromptScores, Request, Usage
from ernie45.engine.runner import Runner, kv_bytes_per_token
from ernie45.engine.sampling import token_logprob
from ernie45.engine.scheduler import Job, Scheduler, Work
from ernie45.engine.stats import EngineStats
from ernie45.errors import ConfigError, Ernie45Error, RequestError
from ernie45.models.text import CausalLM
from ernie45.processing.tokenizer import Tokenizer

_logger = logging.getLogger(__name__)

_STEP_ERRORS = (RuntimeError, MemoryError, Ernie45Error)


@dataclass(eq=False, kw_only=True)
class _Choice:
    """One of the outputs of a request."""

    entry: _Entry
    index: int
    job: Job
    generation: Generation
    drafter: NgramDrafter | None
    held: list[Piece] = field(default_factory=list)
    """Pieces that wait for the choice among `best_of`."""

    @property
    def most_drafts(self) -> int:
        """Guesses that could still become output besides the token that is sampled anyway."""
        return max(self.generation.max_tokens - len(self.generation.output) - 1, 0)


@dataclass(eq=False, kw_only=True)
class _Entry:
    """A request that has not ended."""

    request: Request
    added: float
    """By the engine's clock."""
    queue_s: float | None = None
    """From then to the first step that computed something of it; None before that."""
    choices: list[_Choice] = field(default_factory=list)
    scores: list[TokenLogprob] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0


class Engine:
    """Continuous batching over one network; see the module for the loop."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: model: float32 activations on the CPU, plain or packed; gets kernel leaves and loses its gradients, in place. clock:
            seconds, for timeouts.
        Raises: ConfigError, CapacityError.
        """
        own = str(model.kv_dtype or model.dtype).removeprefix("torch.")
        self.config = resolve(config or EngineConfig(), context=model.config.max_position_embeddings, kv_dtype=own)
        assert self.config.kv_dtype is not None, "filled in by resolve"
        guesses = isinstance(self.config.speculation, MtpSpeculation)
        if guesses and not model.config.num_nextn_predict_layers:
            raise ConfigError("the model has no multi-token prediction block to guess with: use NgramSpeculation")
        layers = model.config.num_hidden_layers + guesses
        self.kv_bytes_per_token = kv_bytes_per_token(model, self.config.kv_dtype, layers)
        available = available_bytes()
        spare = None if available is None else available - model.mapped_bytes
        count = num_pages(self.config, self.kv_bytes_per_token, spare)
        self._runner = Runner(
            model,
            num_pages=count,
            page_size=self.config.page_size,
            kv_dtype=self.config.kv_dtype,
            guesses=guesses,
        )
        self._pace = Pace(self.config.max_step_tokens, fixed=self.config.max_step_tokens_beside_decodes)
        self._scheduler = Scheduler(
            PagePool(count, self.config.page_size, remembers=self.config.prefix_cache),
            max_num_seqs=self.config.max_num_seqs,
            max_step_tokens=self.config.max_step_tokens,
            max_step_tokens_beside_decodes=self._pace.room(1),
        )
        self._tokenizer, self._vocab_size, self._clock = tokenizer, model.config.vocab_size, clock
        self._entries: dict[str, _Entry] = {}
        self._choices: dict[Job, _Choice] = {}
        self._events: list[Event] = []
        self.paused = False
        self._steps = self._prompt_tokens = self._cached_tokens = self._generated = self._drafted = self._accepted = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would compute or publish something. A paused engine still wants steps now and then, for timeouts."""
        return bool(self._events) or (bool(self._entries) and not self.paused)

    def add(self, request: Request) -> None:
        """Take a request; from now on it has exactly one end.

        Raises: RequestError if it cannot be honoured as it stands; then it was not taken.
        """
        params = request.params
        if request.id in self._entries:
            raise RequestError(f"request id {request.id!r} is in use by a request that runs: choose another")
        check_ids(request.prompt, self._vocab_size)
        assert self.config.max_model_len is not None, "filled in by resolve"
        room = room_for_answer(len(request.prompt), params.max_tokens, self.config.max_model_len)
        entry = _Entry(request=request, added=self._clock())
        for index in range(params.num_generated):
            entry.choices.append(self._new_choice(entry, index, params.max_tokens or room))
        self._entries[request.id] = entry
        for choice in entry.choices:
            self._choices[choice.job] = choice
            self._scheduler.add(choice.job)
        self._prompt_tokens += len(request.prompt)

    def abort(self, request_id: str) -> bool:
        """End a request now and give its pages back; the next step publishes the end. False if it has ended already."""
        entry = self._entries.get(request_id)
        if entry is not None:
            self._end(entry, "aborted")
        return entry is not None

    def pause(self) -> None:
        """Compute nothing until `resume`. Requests keep their pages; aborts and timeouts go on."""
        self.paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        self.paused = False

    def step(self) -> list[Event]:
        """Compute one step and return what happened since the last; never raises for what one request caused."""
        self._expire()
        work = () if self.paused else self._plan()
        if work:
            num_decodes = sum(one.job.decoding for one in work)
            num_tokens = sum(one.num_tokens for one in work)
            start = time.perf_counter()
            self._run(work)
            self._pace.observe(num_decodes, num_tokens - num_decodes, time.perf_counter() - start)
            self._steps += 1
        events, self._events = self._events, []
        return events

    def stats(self) -> EngineStats:
        """Where things stand."""
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            pages=self._scheduler.pool.books(),
            page_size=self.config.page_size,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            preemptions=self._scheduler.num_preemptions,
        )

    def forget_prefixes(self) -> None:
        """Empty the prefix cache."""
        self._scheduler.pool.forget_all()

    def check(self) -> None:
        """Prove that the page books balance. Raises: AssertionError."""
        self._scheduler.check()

    def _new_choice(self, entry: _Entry, index: int, max_tokens: int) -> _Choice:
        request = entry.request
        generation = Generation(
            self._tokenizer,
            request.prompt,
            request.params,
            max_tokens=max_tokens,
            choice=index,
            mask=None if request.new_mask is None else request.new_mask(),
        )
        job = Job(
            tokens=list(request.prompt),
            tenant=request.tenant,
            salt=request.tenant if request.cache_salt is None else request.cache_salt,
            priority=request.priority,
            deadline=math.inf if request.timeout_s is None else self._clock() + request.timeout_s,
            reads_cache=index > 0 or request.params.prompt_logprobs is None,
        )
        looks_up = self.config.speculation
        drafter = NgramDrafter(looks_up) if isinstance(looks_up, NgramSpeculation) else None
        return _Choice(entry=entry, index=index, job=job, generation=generation, drafter=drafter)

    def _plan(self) -> tuple[Work, ...]:
        for job in self._scheduler.running:
            choice = self._choices[job]
            if job.decoding and choice.drafter is not None:
                job.drafts = choice.drafter.propose(job.tokens)[: choice.most_drafts]
        num_decodes = sum(job.decoding for job in self._scheduler.running)
        self._scheduler.max_step_tokens_beside_decodes = self._pace.room(num_decodes, len(self._choices) - num_decodes)
        work = self._scheduler.plan()
        self._end_waiting(work)
        return work

    def _end_waiting(self, work: Sequence[Work]) -> None:
        """Note how long those requests have waited whose first step this is."""
        for one in work:
            entry = self._choices[one.job].entry
            if entry.queue_s is None:
                entry.queue_s = self._clock() - entry.added

    def _run(self, work: Sequence[Work]) -> None:
        try:
            with meanwhile(self._preparations(work)):
                hidden_TH = self._runner.hidden(work)
                logits = self._runner.logits_to_sample(hidden_TH, work)
        except _STEP_ERRORS as error:
            self._fail(work, error)
            return
        going_on: list[tuple[Work, int]] = []
        start, end = 0, 0
        for one, rows in zip(work, logits, strict=True):
            start, end = end, end + one.num_tokens
            rows_TH = hidden_TH[start : start + one.count]
            choice = self._choices.get(one.job)
            if choice is None:  # its request ended with another choice of this step
                continue
            try:
                self._score_prompt(choice, one, rows_TH)
                self._advance(choice, one, rows)
            except Exception as error:  # masks are others' code
                expected = isinstance(error, RequestError)
                if not expected:
                    _logger.exception("request %s failed", choice.entry.request.id)
                reason = str(error) or type(error).__name__
                self._end(choice.entry, "failed", reason, "request" if expected else "internal")
            going_on.append((one, start))
        if isinstance(self.config.speculation, MtpSpeculation):
            self._guess(hidden_TH, [(one, row) for one, row in going_on if one.job in self._choices])

    def _preparations(self, work: Sequence[Work]) -> list[Callable[[], None]]:
        """What can be done for the choices that this step samples, before their logits are there."""
        found = (self._choices[one.job].generation.preparation for one in work if one.samples)
        return [prepare for prepare in found if prepare is not None]

    def _guess(self, hidden_TH: Tensor, work: Sequence[tuple[Work, int]]) -> None:
        """Let the prediction block follow the step and guess."""
        assert isinstance(self.config.speculation, MtpSpeculation), "asked for with it alone"
        if not work:
            return
        try:
            guesses = self._runner.guess(hidden_TH, work, self.config.speculation.max_tokens)
        except _STEP_ERRORS as error:
            self._fail([one for one, _ in work], error)
            return
        for (one, _), drafts in zip(work, guesses, strict=True):
            one.job.drafts = drafts[: self._choices[one.job].most_drafts]

    def _fail(self, work: Sequence[Work], error: Exception) -> None:
        """End the requests of a step that broke: which sequence it was cannot be told; the rest of the queue can go on."""
        _logger.error("a step of %d sequences failed", len(work), exc_info=error)
        for entry in [self._choices[one.job].entry for one in work]:
            self._end(entry, "failed", f"the model failed: {error}", "internal")

    def _advance(self, choice: _Choice, work: Work, logits_RV: Tensor) -> None:
        """Sample behind the last known token and behind every guess that was right; publish; give pages back at the end."""
        entry, generation = choice.entry, choice.generation
        num_chosen = 0
        for at, row_V in enumerate(logits_RV):
            piece = generation.step(row_V)
            token = generation.output[-1]
            choice.job.tokens.append(token)
            num_chosen += 1
            self._publish(choice, piece)
            if generation.finished or at == len(work.drafts) or work.drafts[at] != token:
                break
        self._count(choice, work, num_chosen)
        self._scheduler.commit(work, num_chosen)
        if generation.finished:
            self._scheduler.remove(choice.job)
            del self._choices[choice.job]
            if all(other.generation.finished for other in entry.choices):
                self._end(entry, "finished")

    def _score_prompt(self, choice: _Choice, work: Work, rows_TH: Tensor) -> None:
        """Log-probabilities of the prompt tokens behind those computed, if asked for and not known from before a preemption."""
        entry = choice.entry
        num_top, prompt = entry.request.params.prompt_logprobs, entry.request.prompt
        first = work.start + 1  # the token that the first row predicts
        if num_top is None or choice.index > 0 or first > len(prompt) - 1 or choice.job.reads_cache:
            return
        rows_TH = rows_TH[len(entry.scores) + 1 - first : len(prompt) - first]
        if not len(rows_TH):
            return
        for row_V in self._runner.logits_to_score(rows_TH):
            token = prompt[len(entry.scores) + 1]
            entry.scores.append(token_logprob(row_V, token, num_top))
        if len(entry.scores) == len(prompt) - 1:
            choice.job.reads_cache = True  # nothing is missing, should it be interrupted
            self._events.append(PromptScores(request_id=entry.request.id, logprobs=tuple(entry.scores)))

    def _publish(self, choice: _Choice, piece: Piece) -> None:
        entry = choice.entry
        params = entry.request.params
        if params.num_generated > params.n:
            choice.held.append(piece)
        else:
            self._events.append(Output(request_id=entry.request.id, index=choice.index, piece=piece))

    def _count(self, choice: _Choice, work: Work, num_chosen: int) -> None:
        accepted = max(num_chosen - 1, 0)
        if choice.drafter is not None:
            choice.drafter.learn(len(work.drafts), accepted)
        choice.entry.drafted += len(work.drafts)
        choice.entry.accepted += accepted
        self._drafted += len(work.drafts)
        self._accepted += accepted
        self._generated += num_chosen

    def _expire(self) -> None:
        """End the requests whose time is over."""
        for choice in [self._choices.pop(job) for job in self._scheduler.expire(self._clock())]:
            timeout = choice.entry.request.timeout_s
            self._end(choice.entry, "failed", f"the request did not end within its timeout of {timeout:g} s", "timeout")

    def _end(self, entry: _Entry, kind: EndKind, reason: str | None = None, cause: EndCause | None = None) -> None:
        """The one place where requests end."""
        request_id = entry.request.id
        if self._entries.pop(request_id, None) is None:
            return
        for choice in entry.choices:
            if self._choices.pop(choice.job, None) is not None:
                self._scheduler.remove(choice.job)
        if kind == "finished":
            self._publish_best(entry)
        usage = self._usage(entry)
        self._cached_tokens += usage.cached_tokens
        end = End(request_id=request_id, kind=kind, usage=usage, reason=reason, cause=cause, queue_s=entry.queue_s)
        self._events.append(end)

    def _publish_best(self, entry: _Entry) -> None:
        """Of `best_of` choices the `n` of the highest mean log-probability, best first, each in one piece."""
        params = entry.request.params
        if params.num_generated == params.n:
            return
        ranked = sorted(entry.choices, key=lambda c: -c.generation.logprob_sum / len(c.generation.output))
        for index, choice in enumerate(ranked[: params.n]):
            whole = join(choice.held, 0)
            piece = Piece(
                text=whole.text,
                ids=whole.ids,
                logprobs=whole.logprobs,
                finish_reason=whole.finish_reason,
                stop_reason=whole.stop_reason,
                finish_detail=whole.finish_detail,
            )
            self._events.append(Output(request_id=entry.request.id, index=index, piece=piece))

    def _usage(self, entry: _Entry) -> Usage:
        generations = [choice.generation for choice in entry.choices]
        return Usage(
            prompt_tokens=len(entry.request.prompt),
            cached_tokens=entry.choices[0].job.cached or 0,
            completion_tokens=sum(len(generation.output) for generation in generations),
            reasoning_tokens=sum(generation.thought.num_tokens for generation in generations),
            drafted_tokens=entry.drafted,
            accepted_tokens=entry.accepted,
        )
