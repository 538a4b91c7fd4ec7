"""Prompts for reinforcement learning: rows without answers, encoded as serving would, in an endless order that can be resumed.

A row has `messages` (chat messages that end with something to answer, and `tools` with them), or `prompt` (a user's question, or
messages), or `text` (continued as it stands). Everything else in it is for the rewards: the row reaches them whole.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ernie45.errors import CheckpointError, ConfigError, RequestError, ShapeError
from ernie45.processing.tokenizer import Tokenizer
from ernie45.training.data.config import SourceConfig
from ernie45.training.data.sources import open_source


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Something to answer."""

    ids: tuple[int, ...]
    text: str = ""
    """For the rewards: what was asked last, without the marks of the chat format."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The row it comes from, for the rewards."""
    subset: str = ""
    """Part of the data whose rewards are normalised together."""
    origin: str = ""
    """As `file:line`, for messages."""


def load_prompts(
    sources: Sequence[SourceConfig],
    tokenizer: Tokenizer,
    *,
    thinking: bool | None = None,
    max_prompt_len: int | None = None,
) -> list[Prompt]:
    """Read all prompts. A row's `subset`, or else the name of its file, says what its rewards are normalised with.

    Args: thinking: whether the model shall think first; None leaves it to the chat format. max_prompt_len: longest prompt in tokens.
    Raises: RequestError, with the row, for one that is malformed or too long; NotFoundError, ConfigError for the file.
    """
    prompts = []
    for config in sources:
        source = open_source(config)
        for number in range(len(source)):
            origin = source.origin(number)
            try:
                prompt = prompt_of_row(
                    source.read(number), tokenizer, thinking=thinking, origin=origin, subset=Path(config.path).stem
                )
            except RequestError as error:
                raise RequestError(f"{origin}: {error}") from error
            if max_prompt_len is not None and len(prompt.ids) > max_prompt_len:
                raise RequestError(
                    f"{origin}: the prompt has {len(prompt.ids)} tokens, max_prompt_len is {max_prompt_len}: raise it, or "
                    "leave the row out"
                )
            prompts.append(prompt)
    return prompts


def prompt_of_row(
    row: Mapping[str, Any], tokenizer: Tokenizer, *, thinking: bool | None = None, origin: str = "", subset: str = ""
) -> Prompt:
    """Encode a row. Raises: RequestError if it has no prompt, or one that cannot be written."""
    found = next((row[name] for name in ("messages", "prompt", "text") if row.get(name)), None)
    if found is None:
        raise RequestError("the row has no messages, prompt or text")
    if isinstance(found, str) and "prompt" not in row:
        text, ids = found, tokenizer.encode(found)
    else:
        messages = [{"role": "user", "content": found}] if isinstance(found, str) else found
        ids = tokenizer.encode(tokenizer.render(messages, row.get("tools"), thinking=thinking))
        text = str(messages[-1].get("content") or "")
    return Prompt(ids=tuple(ids), text=text, row=row, subset=str(row.get("subset", subset)), origin=origin)


class PromptList:
    """Prompts in endless order: shuffled anew for every round, from the seed alone. A `RowStream` of one prompt per row."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int = 0) -> None:
        """Raises: ConfigError without prompts; ShapeError for one without tokens."""
        if not prompts:
            raise ConfigError("there are no prompts to learn from")
        for prompt in prompts:
            if not prompt.ids:
                raise ShapeError(f"{prompt.origin or 'a prompt without origin'} has no tokens")
        self._prompts, self._seed = list(prompts), seed
        digest = blake2b(digest_size=8)
        for prompt in prompts:
            digest.update(repr(prompt.ids).encode())
        self._fingerprint = digest.hexdigest()
        self._round, self._at, self._order = 0, 0, self._shuffled(0)

    def next_row(self) -> Sequence[Prompt]:
        """The next prompt."""
        if self._at == len(self._order):
            self._round, self._at = self._round + 1, 0
            self._order = self._shuffled(self._round)
        self._at += 1
        return (self._prompts[self._order[self._at - 1]],)

    def state(self) -> dict[str, Any]:
        """See `RowStream`."""
        return {"round": self._round, "at": self._at, "prompts": self._fingerprint}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `RowStream`."""
        if state.get("prompts") != self._fingerprint:
            raise CheckpointError("the checkpoint was written with other prompts: resume with the same data")
        self._round, self._at = int(state["round"]), int(state["at"])
        self._order = self._shuffled(self._round)

    def _shuffled(self, number: int) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(derived_seed(self._seed, number)).shuffle(order)
        return order


def derived_seed(*parts: int) -> int:
    """A seed of 60 bits that follows from whole numbers, far from those of other numbers."""
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 4
