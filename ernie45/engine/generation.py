"""One output on its way: from logits to the next token, and from tokens to text, stops and an end.

The reference generator and the engine both go through here, so they cannot sample or stop differently.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from ernie45.engine.loops import LoopDetector
from ernie45.engine.params import SamplingParams
from ernie45.engine.pieces import FinishDetail, FinishReason, Piece, TokenLogprob
from ernie45.engine.sampling import LogitsMask, PreparedMask, sample, token_logprob
from ernie45.engine.stops import StopChecker
from ernie45.engine.thinking import Thought, ThoughtMarkers
from ernie45.errors import RequestError
from ernie45.processing.detokenizer import Detokenizer
from ernie45.processing.tokenizer import Tokenizer


class Generation:
    """One choice of one request. `step` takes the logits behind prompt and output so far, and gives the next piece."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        max_tokens: int,
        choice: int = 0,
        mask: LogitsMask | None = None,
    ) -> None:
        """Args: prompt: ids, checked before. max_tokens: length of the output at most. choice: its number among `n`.

        Raises: RequestError for what the parameters ask and the tokenizer cannot do.
        """
        _check_ids(params, tokenizer.vocab_size)
        self.prompt, self.params, self.max_tokens = prompt, params, max_tokens
        self.output: list[int] = []
        self.finished = False
        self.logprob_sum = 0.0
        """Of all output tokens; kept for `best_of` alone."""
        self.thought = Thought(ThoughtMarkers.of(tokenizer), prompt, params.reasoning_max_tokens)
        self._seed = secrets.randbits(62) + choice if params.seed is None else params.seed + choice
        self._vocab_size = tokenizer.vocab_size
        self._mask = mask
        self.preparation: Callable[[], None] | None = None
        """Makes the next `step` quicker; may be called on another thread, while none of the other methods is."""
        if isinstance(mask, PreparedMask):
            self.preparation = partial(mask.prepare, self.output)
        kept = tokenizer.answer_tag_ids if params.special_tokens == "answer_tags" else frozenset()
        self._detokenizer = Detokenizer(tokenizer, params.special_tokens != "keep", keep=kept)
        self._stops = StopChecker(params.stop, included=params.include_stop_str_in_output)
        ends = frozenset() if params.ignore_eos else tokenizer.stop_ids
        self._end_ids = ends | set(params.stop_token_ids)
        self._bad_words = _bad_words(tokenizer, params.bad_words)
        self._loops = None if params.loop_detection is None else LoopDetector(params.loop_detection)

    def step(self, logits_V: Tensor) -> Piece:
        """Choose the next token, add it, and say what it adds to the text. Raises: RequestError if none can be chosen."""
        # Published tables end in padding rows, which stand for no text.
        logits_V = logits_V[: self._vocab_size]
        token = self._choose(logits_V)
        logprobs: tuple[TokenLogprob, ...] = ()
        if self.params.logprobs is not None:
            logprobs = (token_logprob(logits_V, token, self.params.logprobs),)
        if self.params.num_generated > self.params.n:
            self.logprob_sum += (logprobs[0] if logprobs else token_logprob(logits_V, token, 0)).logprob
        return self._accept(token, logprobs)

    def _choose(self, logits_V: Tensor) -> int:
        allowed_V = None if self._mask is None else self._mask.allowed(self.output)
        forced = self.thought.forced
        # A grammar of text does not let a thought end inside a character: then that is written out first.
        if forced is not None and (allowed_V is None or allowed_V[forced]):
            return forced
        banned = {words[-1] for words in self._bad_words if self._ends_with(words[:-1])}
        banned.update(self.params.bad_words_token_ids)
        if len(self.output) < self.params.min_tokens:
            banned |= self._end_ids
        return sample(
            logits_V,
            self.params,
            seed=self._seed,
            prompt=self.prompt,
            output=self.output,
            banned=sorted(i for i in banned if i < len(logits_V)),
            allowed_V=allowed_V,
        )

    def _ends_with(self, tokens: Sequence[int]) -> bool:
        return not tokens or self.output[-len(tokens) :] == tokens

    def _accept(self, token: int, logprobs: tuple[TokenLogprob, ...]) -> Piece:
        self.output.append(token)
        self.thought.push(token)
        looping = self._loops is not None and self._loops.push(self.output)
        if token in self._end_ids:
            return self._finish("", token, logprobs, "stop", stop_reason=token)
        text, stop = self._stops.push(self._detokenizer.push(token), armed=len(self.output) >= self.params.min_tokens)
        if stop is not None:
            self.finished = True
            return Piece(text=text, ids=(token,), logprobs=logprobs, finish_reason="stop", stop_reason=stop)
        if self._mask is not None and self._mask.finished(self.output):
            return self._finish(text, token, logprobs, "stop")
        if looping:
            return self._finish(text, token, logprobs, "stop", detail="loop")
        if len(self.output) >= self.max_tokens or self._answered_enough:
            return self._finish(text, token, logprobs, "length")
        return Piece(text=text, ids=(token,), logprobs=logprobs)

    @property
    def _answered_enough(self) -> bool:
        limit = self.params.response_max_tokens
        return limit is not None and self.thought.num_answer_tokens >= limit

    def _finish(
        self,
        text: str,
        token: int,
        logprobs: tuple[TokenLogprob, ...],
        reason: FinishReason,
        *,
        stop_reason: int | None = None,
        detail: FinishDetail | None = None,
    ) -> Piece:
        """The last piece, with all text that was held back; a stop string that completes in it comes first."""
        self.finished = True
        rest, stop = self._stops.push(self._detokenizer.finish(), armed=True)
        text += rest if stop is not None else rest + self._stops.finish()
        if stop is not None:
            return Piece(text=text, ids=(token,), logprobs=logprobs, finish_reason="stop", stop_reason=stop)
        return Piece(
            text=text,
            ids=(token,),
            logprobs=logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            finish_detail=detail,
        )


def _check_ids(params: SamplingParams, vocab_size: int) -> None:
    for name, ids in (
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
        ("bad_words_token_ids", params.bad_words_token_ids),
    ):
        unknown = [i for i in ids if i >= vocab_size]
        if unknown:
            raise RequestError(f"{name} holds id {unknown[0]}, the tokenizer knows 0 to {vocab_size - 1}")


def _bad_words(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[int]]:
    """The token sequences that must not appear: each text at the beginning of a text and behind a space."""
    found: list[list[int]] = []
    for word in words:
        for text in (word, f" {word}"):
            ids = tokenizer.encode(text)
            if ids and ids not in found:
                found.append(ids)
    return found
