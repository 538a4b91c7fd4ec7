"""What a request asks of the sampler: checked once, here; later code trusts it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from ernie45.errors import RequestError

MAX_LOGPROBS = 20
MAX_CHOICES = 128
SpecialTokens = Literal["skip", "answer_tags", "keep"]
_MAX_SEED = 2**63 - 1
_MAX_STRINGS = 64
_MAX_BIASED = 1024
_MAX_LISTED = 1024


@dataclass(frozen=True, kw_only=True)
class LoopDetection:
    """When an output counts as a loop: it ends in one pattern of tokens, over and over."""

    repeats: int = 8
    """How often the pattern stands there, one behind the other; from 2 on."""
    max_pattern: int = 64
    """Longest pattern that is looked for, in tokens."""
    min_tokens: int = 64
    """Fewest tokens that all repetitions have together, so that a ruled line is no loop."""

    def __post_init__(self) -> None:
        for name, low, high in (("repeats", 2, 1000), ("max_pattern", 1, 1024), ("min_tokens", 2, 2**20)):
            check_range(f"loop_detection.{name}", getattr(self, name), low, high)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue one prompt. Defaults change nothing: plain sampling from the model's distribution."""

    max_tokens: int | None = None
    """Most tokens to generate; None = what the context leaves."""
    min_tokens: int = 0
    """No end token and no stop string before this many tokens."""
    temperature: float = 1.0
    """Divides the logits; 0 = greedy."""
    top_p: float = 1.0
    """Keep the most probable tokens up to this sum, the crossing one included; 1 = off."""
    top_k: int = 0
    """Keep this many most probable tokens; 0 or -1 = off."""
    min_p: float = 0.0
    """Drop tokens less probable than this share of the most probable one; 0 = off."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output; 1 = off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output; -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the output; -2 to 2."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these ids after the penalties; -100 to 100, at most 1024 ids."""
    bad_words: tuple[str, ...] = ()
    """Texts that the output may not hold as the tokenizer writes them, at the beginning of a text or behind a space: the last
    token of such a sequence is banned while its others stand at the end of the output."""
    bad_words_token_ids: tuple[int, ...] = ()
    """Ids that are never chosen."""
    seed: int | None = None
    """None draws a seed; equal seeds give equal output. Choice i of `n` uses the seed plus i."""
    n: int = 1
    """Choices to return, 1 to 128."""
    best_of: int | None = None
    """Choices to generate; the `n` with the highest mean log-probability are returned, best first. None = `n`."""
    stop: tuple[str, ...] = ()
    """Strings that end the output; they are not part of it."""
    include_stop_str_in_output: bool = False
    """Make the stop string that ended the output part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the output, beside the tokenizer's own."""
    special_tokens: SpecialTokens = "skip"
    """Special tokens in the text: left out, all but the tags of thoughts and tool calls left out, or all written."""
    ignore_eos: bool = False
    """Go on past the tokenizer's end tokens (not past `stop_token_ids`)."""
    logprobs: int | None = None
    """Report log-probabilities of each token and this many alternatives, 0 to 20."""
    prompt_logprobs: int | None = None
    """The same for every prompt token but the first."""
    reasoning_max_tokens: int | None = None
    """Most tokens of a thought; then the end-of-thinking token is forced. The model goes on with its answer."""
    response_max_tokens: int | None = None
    """Most tokens of the answer proper, the thought not counted; then the output ends (finish reason `length`)."""
    loop_detection: LoopDetection | None = None
    """End an output that repeats itself (finish reason `stop`, detail `loop`); None = off."""

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for name in ("stop_token_ids", "bad_words_token_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        if self.special_tokens not in get_args(SpecialTokens):
            raise RequestError(
                f"special_tokens is {self.special_tokens!r}, expected one of {', '.join(get_args(SpecialTokens))}"
            )
        self._check_ranges()
        self._check_choices()
        self._check_lists()

    @property
    def num_generated(self) -> int:
        """Choices that are generated, of which `n` are returned."""
        return self.n if self.best_of is None else self.best_of

    def _check_ranges(self) -> None:
        self._check("temperature", 0.0, 100.0)
        self._check("top_p", 0.0, 1.0)
        self._check("min_p", 0.0, 1.0)
        self._check("presence_penalty", -2.0, 2.0)
        self._check("frequency_penalty", -2.0, 2.0)
        self._check("repetition_penalty", 1e-3, 100.0)
        self._check("top_k", -1, 2**31)
        self._check("min_tokens", 0, 2**31)
        if self.top_p == 0:
            raise RequestError(
                "top_p is 0, expected a value above 0 and up to 1: use temperature 0 for greedy decoding"
            )
        for name, low, high in (
            ("max_tokens", 1, 2**31),
            ("seed", 0, _MAX_SEED),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
            ("reasoning_max_tokens", 0, 2**31),
            ("response_max_tokens", 1, 2**31),
        ):
            if getattr(self, name) is not None:
                self._check(name, low, high)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}")

    def _check_choices(self) -> None:
        self._check("n", 1, MAX_CHOICES)
        if self.best_of is not None:
            self._check("best_of", 1, MAX_CHOICES)
            if self.best_of < self.n:
                raise RequestError(f"best_of {self.best_of} is less than n {self.n}: generate at least what you return")
        if self.seed is not None and self.seed + self.num_generated - 1 > _MAX_SEED:
            raise RequestError(f"seed {self.seed} leaves no seeds for {self.num_generated} choices up to {_MAX_SEED}")

    def _check_lists(self) -> None:
        for name in ("stop", "bad_words"):
            strings = getattr(self, name)
            if len(strings) > _MAX_STRINGS or any(not isinstance(s, str) or not s for s in strings):
                raise RequestError(
                    f"{name} holds {len(strings)} entries; expected at most {_MAX_STRINGS} strings, none empty"
                )
        for name in ("stop_token_ids", "bad_words_token_ids"):
            ids = getattr(self, name)
            if len(ids) > _MAX_LISTED:
                raise RequestError(f"{name} holds {len(ids)} ids, expected at most {_MAX_LISTED}")
            for token in ids:
                check_range(f"an id in {name}", token, 0, 2**31)
        if len(self.logit_bias) > _MAX_BIASED:
            raise RequestError(f"logit_bias holds {len(self.logit_bias)} ids, expected at most {_MAX_BIASED}")
        for token, bias in self.logit_bias.items():
            check_range("an id in logit_bias", token, 0, 2**31)
            check_range(f"logit_bias of id {token}", bias, -100.0, 100.0)

    def _check(self, name: str, low: float, high: float) -> None:
        check_range(name, getattr(self, name), low, high)


def check_range(name: str, value: object, low: float, high: float) -> None:
    """Insist on a number within bounds; whole bounds ask for a whole number. Raises: RequestError."""
    whole = isinstance(low, int)
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type,operator]  # a number
        # Not :g for whole numbers, which would round a limit of 2147483648 to 2.14748e+09.
        bounds = f"a whole number from {low} to {high}" if whole else f"a number from {low:g} to {high:g}"
        raise RequestError(f"{name} is {value!r}, expected {bounds}")
