"""Answers that are compared or judged, as tokens: what preference methods learn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ernie45.errors import RequestError, ShapeError
from ernie45.training.data.config import DataConfig
from ernie45.training.data.encoding import ChatEncoder, Encoded, bools, int64s
from ernie45.training.data.fitting import Fitted, num_exchanges, refuse_long, shortest_loss, without_exchanges
from ernie45.training.data.rows import KtoRow, Messages, PreferenceRow, RowDroppedError


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two ways to go on behind one prompt. `*_learnt` marks the tokens that are scored."""

    prompt: Tensor
    """int64 (p,), at least one token."""
    chosen: Tensor
    """int64 (c,)."""
    chosen_learnt: Tensor
    """bool (c,)."""
    rejected: Tensor
    """int64 (r,)."""
    rejected_learnt: Tensor
    """bool (r,)."""
    score_chosen: float = 1.0
    score_rejected: float = 0.0
    origin: str = ""

    def __post_init__(self) -> None:
        _check_ids(self.origin, self.prompt)
        _check_ids(self.origin, self.chosen, self.chosen_learnt)
        _check_ids(self.origin, self.rejected, self.rejected_learnt)


@dataclass(frozen=True, kw_only=True)
class KtoExample:
    """One way to go on behind a prompt, and whether it is wanted."""

    prompt: Tensor
    """int64 (p,), at least one token."""
    completion: Tensor
    """int64 (c,)."""
    learnt: Tensor
    """bool (c,): the tokens that are scored."""
    desirable: bool
    origin: str = ""

    def __post_init__(self) -> None:
        _check_ids(self.origin, self.prompt)
        _check_ids(self.origin, self.completion, self.learnt)


@dataclass(frozen=True)
class _Side:
    """An answer behind the prompt."""

    ids: list[int]
    scored: list[bool]

    def cut(self, size: int) -> _Side:
        return _Side(self.ids[:size], self.scored[:size])


@dataclass(frozen=True)
class _Split:
    """A prompt and its answers as tokens."""

    prompt: list[int]
    sides: tuple[_Side, ...]

    @property
    def size(self) -> int:
        return len(self.prompt) + sum(len(side.ids) for side in self.sides)

    def fits(self, config: DataConfig) -> bool:
        return self.size <= config.max_seq_len and len(self.prompt) <= (config.max_prompt_len or config.max_seq_len)

    def cut(self, config: DataConfig) -> _Split:
        """With answers that end where the row is full, the longer one first. The prompt cannot be cut."""
        room = config.max_seq_len - len(self.prompt)
        if len(self.prompt) > (config.max_prompt_len or config.max_seq_len) or room < len(self.sides):
            raise RowDroppedError("too_long", self.size)
        left, shares = len(self.sides), {}
        for idx, side in sorted(enumerate(self.sides), key=lambda entry: len(entry[1].ids)):
            shares[idx] = min(len(side.ids), room // left)
            room, left = room - shares[idx], left - 1
        return replace(self, sides=tuple(side.cut(shares[idx]) for idx, side in enumerate(self.sides)))


def fit_pair(encoder: ChatEncoder, row: PreferenceRow, config: DataConfig) -> Fitted[PreferencePair]:
    """Make a pair of a row; its size is prompt and both answers. Raises: as `fitting.fit_conversation`."""

    def split(dropped: int) -> _Split:
        prompt = without_exchanges(row.prompt, dropped)
        sides = [_encoded(encoder, prompt, answer, row) for answer in (row.chosen, row.rejected)]
        return _split(len(prompt), sides, config.mask_out_eos)

    whole = split(0)
    fitted = _fit(whole, split, row, config)
    chosen, rejected = fitted.sides
    pair = PreferencePair(
        prompt=int64s(fitted.prompt),
        chosen=int64s(chosen.ids),
        chosen_learnt=bools(chosen.scored),
        rejected=int64s(rejected.ids),
        rejected_learnt=bools(rejected.scored),
        score_chosen=row.score_chosen,
        score_rejected=row.score_rejected,
        origin=row.origin,
    )
    return Fitted(pair, fitted.size, sum(chosen.scored) + sum(rejected.scored), whole.size)


def fit_kto(encoder: ChatEncoder, row: KtoRow, config: DataConfig) -> Fitted[KtoExample]:
    """Make an example of a row; its size is prompt and answer. Raises: as `fitting.fit_conversation`."""

    def split(dropped: int) -> _Split:
        prompt = without_exchanges(row.prompt, dropped)
        return _split(len(prompt), [_encoded(encoder, prompt, row.completion, row)], config.mask_out_eos)

    whole = split(0)
    fitted = _fit(whole, split, row, config)
    (side,) = fitted.sides
    example = KtoExample(
        prompt=int64s(fitted.prompt),
        completion=int64s(side.ids),
        learnt=bools(side.scored),
        desirable=row.desirable,
        origin=row.origin,
    )
    return Fitted(example, fitted.size, sum(side.scored), whole.size)


def _fit(whole: _Split, split: Callable[[int], _Split], row: PreferenceRow | KtoRow, config: DataConfig) -> _Split:
    fitted = whole
    if not whole.fits(config):
        refuse_long(config, whole.size, config.max_seq_len, row.origin)
        if config.long_rows == "left":
            fitted = shortest_loss(split, num_exchanges(row.prompt), lambda found: found.fits(config), whole.size)
        else:
            fitted = whole.cut(config)
    if not all(any(side.scored) for side in fitted.sides):
        raise RowDroppedError("nothing_learnt", whole.size)
    return fitted


def _encoded(encoder: ChatEncoder, prompt: Messages, answer: Messages, row: PreferenceRow | KtoRow) -> Encoded:
    learnt = [False] * len(prompt) + [message["role"] == "assistant" for message in answer]
    return encoder.encode((*prompt, *answer), row.tools, learnt)


def _split(num_prompt: int, sides: list[Encoded], mask_out_eos: bool) -> _Split:
    """Cut behind what all sides are given before their first answer."""
    starts = [next(answer.start for answer in side.answers if answer.message >= num_prompt) for side in sides]
    size = min(starts)
    prompt = sides[0].ids[:size]
    if any(side.ids[:size] != prompt for side in sides):
        raise RequestError("the chat template writes the prompt differently before chosen and rejected")
    return _Split(prompt, tuple(_Side(side.ids[size:], _scored(side, mask_out_eos)[size:]) for side in sides))


def _scored(side: Encoded, mask_out_eos: bool) -> list[bool]:
    """What of a side is scored: answers, and the tokens that end them where they are what the model would write."""
    scored = list(side.learnt)
    for answer in side.answers:
        end = answer.end - 1
        if mask_out_eos or side.targets[end] != side.ids[end]:
            scored[end] = False
    return scored


def _check_ids(origin: str, ids: Tensor, marks: Tensor | None = None) -> None:
    if ids.ndim != 1 or ids.dtype != torch.int64 or not len(ids) or (marks is not None and marks.shape != ids.shape):
        raise ShapeError(
            f"{origin or 'a pair'} has ids {tuple(ids.shape)} of {ids.dtype}, expected int64 (n,) of at least one token, and"
            " as many marks"
        )
