"""`LLM`: a model by name and many prompts at once, in this process. The same engine that serves, without a server.

llm = ernie45.LLM("smollm2-135m", max_model_len=2048)
for answer in llm.chat([[{"role": "user", "content": "Hello"}], [{"role": "user", "content": "Who are you?"}]]):
    print(answer.text)
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ernie45.config.nearest import nearest
from ernie45.engine.config import EngineConfig
from ernie45.engine.engine import Engine
from ernie45.engine.grammar_mask import grammar_masks
from ernie45.engine.params import SamplingParams
from ernie45.engine.pieces import Completion, Piece, TokenLogprob, join
from ernie45.engine.prompts import prompt_ids
from ernie45.engine.request import End, Output, PromptScores, Request, Usage
from ernie45.engine.sampling import LogitsMask
from ernie45.engine.stats import EngineStats
from ernie45.errors import ConfigError, RequestError
from ernie45.models.text import CausalLM
from ernie45.processing.constraint import Constraint
from ernie45.processing.grammar import Grammars
from ernie45.processing.messages import check_messages
from ernie45.processing.tokenizer import Tokenizer
from ernie45.store.api import load_model, load_tokenizer

Messages = Sequence[Mapping[str, Any]]

_REDRAW_S = 0.1
_BAR_WIDTH = 24


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of one prompt."""

    prompt_ids: tuple[int, ...]
    choices: tuple[Completion, ...]
    """`n` of them; by number, or best first with `best_of`."""
    usage: Usage
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """Of every prompt token but the first, if asked for."""

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text


class LLM:
    """Answers batches of prompts. Prefixes stay cached between calls."""

    def __init__(self, model: str | Path | CausalLM, *, tokenizer: Tokenizer | None = None, **settings: Any) -> None:
        """Args: model: a name in the store, a folder or a .gguf file, loaded in float32 or as packed; or a loaded network, which
            gets the kernel leaves in place. tokenizer: needed with a loaded network, else None for the model's own. settings:
            the fields of `EngineConfig`.
        Raises: ConfigError for a setting that is unknown or does not fit, and what loading raises.
        """
        config = _config(settings)
        if tokenizer is None:
            if isinstance(model, CausalLM):
                raise ConfigError(
                    "a loaded network comes without a tokenizer: pass tokenizer=ernie45.load_tokenizer(..)"
                )
            tokenizer = load_tokenizer(model)
        self.tokenizer = tokenizer
        self.model = model if isinstance(model, CausalLM) else load_model(model)
        self._engine = Engine(self.model, tokenizer, config)
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        constraint: Constraint | Sequence[Constraint | None] | None = None,
        progress: bool | None = None,
    ) -> list[Answer]:
        """Continue prompts as they stand.

        Args: prompts: texts or lists of token ids; a single one will do. params: one for all, or one per prompt; None = plain
            sampling. constraint: what answers are forced to, behind the thought where the format has one; one for all, or one
            per prompt; None = nothing. progress: draw a bar on stderr; None = if that is a terminal.
        Returns: an answer per prompt, in their order. Raises: RequestError for a prompt, parameters or a constraint that cannot
        be honoured, before anything is computed, and for one that fails on the way; nothing is left running then. ConfigError
        for a constraint without the library that it needs.
        """
        single = isinstance(prompts, str) or (bool(prompts) and all(isinstance(item, int) for item in prompts))
        many: Sequence[Any] = [prompts] if single else prompts
        return self._answer([prompt_ids(self.tokenizer, prompt) for prompt in many], params, constraint, progress)

    def chat(
        self,
        conversations: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        continue_final_message: bool = False,
        constraint: Constraint | Sequence[Constraint | None] | None = None,
        progress: bool | None = None,
    ) -> list[Answer]:
        """Answer conversations, rendered with the tokenizer's chat template.

        Args: conversations: lists of messages; a single one will do. tools, thinking: for the template. continue_final_message: go
            on with the text of each last message, an assistant's; answers hold what is new, and a constraint holds for both
            together. The rest, result and errors are those of `generate`.
        """
        single = bool(conversations) and all(isinstance(item, Mapping) for item in conversations)
        many: Sequence[Any] = [conversations] if single else conversations
        ids = [
            prompt_ids(
                self.tokenizer,
                messages,
                tools=tools,
                thinking=thinking,
                continue_final_message=continue_final_message,
            )
            for messages in many
        ]
        begun = [check_messages(messages)[-1].text for messages in many] if continue_final_message else None
        return self._answer(ids, params, constraint, progress, begun)

    def stats(self) -> EngineStats:
        """The engine's counts: prefix hits, guesses that were right, pages."""
        return self._engine.stats()

    def forget_prefixes(self) -> None:
        """Empty the prefix cache, as it must be when `model` has got other weights: keys and values belong to the old ones."""
        self._engine.forget_prefixes()

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer)

    def _new_mask(
        self, constraint: Constraint | None, prompt: Sequence[int], begun: str | None
    ) -> Callable[[], LogitsMask] | None:
        if constraint is None:
            return None
        return grammar_masks(self._grammars, self.tokenizer, constraint, prompt, begun=begun)

    def _answer(
        self,
        prompts: list[list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        constraint: Constraint | Sequence[Constraint | None] | None,
        progress: bool | None,
        begun: Sequence[str | None] | None = None,
    ) -> list[Answer]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise RequestError(f"{len(params)} sampling parameters for {len(prompts)} prompts")
        if constraint is None or isinstance(constraint, Constraint):
            constraint = [constraint] * len(prompts)
        if len(constraint) != len(prompts):
            raise RequestError(f"{len(constraint)} constraints for {len(prompts)} prompts")
        begun = begun or [None] * len(prompts)
        masks = [self._new_mask(*each) for each in zip(constraint, prompts, begun, strict=True)]
        # A request is forgotten when it has ended, so numbers of calls that broke off do not come back.
        names = [str(next(self._numbers)) for _ in prompts]
        collected = {name: _Collected() for name in names}
        bar = _Bar(len(prompts), sys.stderr.isatty() if progress is None else progress)
        try:
            for name, prompt, wanted, new_mask in zip(names, prompts, params, masks, strict=True):
                self._engine.add(Request(id=name, prompt=tuple(prompt), params=wanted, new_mask=new_mask))
            while self._engine.has_work:
                self._step(collected, bar)
        finally:  # whatever happened, such as Ctrl-C: the next call finds an idle engine
            for name in names:
                self._engine.abort(name)
            self._engine.step()
            bar.close()
        return [
            collected[name].answer(prompt, wanted) for name, prompt, wanted in zip(names, prompts, params, strict=True)
        ]

    def _step(self, collected: dict[str, _Collected], bar: _Bar) -> None:
        for event in self._engine.step():
            if event.request_id not in collected:  # the end of a request of a call that broke off
                continue
            into = collected[event.request_id]
            if isinstance(event, Output):
                into.pieces.setdefault(event.index, []).append(event.piece)
                bar.add(len(event.piece.ids))
            elif isinstance(event, PromptScores):
                into.scores = event.logprobs
            else:
                if event.kind != "finished":
                    at = list(collected).index(event.request_id)
                    raise RequestError(f"prompt {at}: {event.reason}")
                into.end = event
                bar.end_one()


@dataclass(kw_only=True)
class _Collected:
    """The events of one request."""

    pieces: dict[int, list[Piece]] = field(default_factory=dict)
    scores: tuple[TokenLogprob, ...] = ()
    end: End | None = None

    def answer(self, prompt: list[int], params: SamplingParams) -> Answer:
        assert self.end is not None, "every request has an end"
        return Answer(
            prompt_ids=tuple(prompt),
            choices=tuple(join(self.pieces[index], len(prompt)) for index in range(params.n)),
            usage=self.end.usage,
            prompt_logprobs=None if params.prompt_logprobs is None else self.scores,
        )


class _Bar:
    """Prompts done and tokens per second, in one line that is redrawn."""

    def __init__(self, total: int, shown: bool) -> None:
        self._total, self._shown = total, shown
        self._done = self._tokens = 0
        self._start = time.monotonic()
        self._drawn = self._start

    def add(self, num_tokens: int) -> None:
        """Tokens that have come."""
        self._tokens += num_tokens
        if time.monotonic() - self._drawn >= _REDRAW_S:
            self._draw()

    def end_one(self) -> None:
        """A prompt has its answer."""
        self._done += 1

    def close(self) -> None:
        """Draw the last state and end the line."""
        self._draw()
        if self._shown:
            print(file=sys.stderr, flush=True)

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        if not self._shown:
            return
        filled = "#" * round(_BAR_WIDTH * self._done / max(self._total, 1))
        rate = self._tokens / max(self._drawn - self._start, 1e-9)
        line = f"[{filled:.<{_BAR_WIDTH}}] {self._done} of {self._total} prompts, {rate:.1f} tokens/s"
        print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)


def _config(settings: Mapping[str, Any]) -> EngineConfig:
    known = [f.name for f in fields(EngineConfig)]
    for name in settings:
        if name not in known:
            raise ConfigError(f"LLM has no setting {name!r}, the nearest is {nearest(name, known)}")
    return EngineConfig(**settings)
