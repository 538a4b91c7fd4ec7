"""Prompts to answer: dialogues that end where the model shall go on.

A row has `messages`, or `prompt` (messages, or the text of one question), and may have `tools`, `subset` (part of the data whose rewards are
normalised together) and whatever its rewards read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ernie45.errors import ConfigError, RequestError
from ernie45.processing.messages import check_messages
from ernie45.processing.tokenizer import Tokenizer
from ernie45.training.data.config import DataConfig
from ernie45.training.data.row_formats import read_tools
from ernie45.training.data.sources import Subset, open_source
from ernie45.training.rollout import Prompt, PromptList

_logger = logging.getLogger(__name__)
_LOGGED = 5


def prompt_rows(config: DataConfig, tokenizer: Tokenizer) -> PromptList:
    """The training prompts of a configuration, each once per round.

    Bad rows and prompts above `max_prompt_len` are left out and logged, or stop the run where `strict` is set.
    Raises: ConfigError without a usable prompt; RequestError for a bad row if strict.
    """
    limit = config.max_prompt_len or config.max_seq_len
    prompts: list[Prompt] = []
    left_out: list[str] = []
    for source_config in config.sources("train"):
        source = Subset(open_source(source_config), config.share("train"))
        for idx in range(len(source)):
            try:
                prompts.append(_prompt(source.read(idx), tokenizer, source.origin(idx), limit))
            except RequestError as error:
                left_out.append(f"{source.origin(idx)}: {error}")
                if config.strict:
                    raise RequestError(f"{left_out[0]}; repair the row, or let strict be off") from error
    for line in left_out[:_LOGGED]:
        _logger.warning("left out %s", line)
    if not prompts:
        raise ConfigError(
            f"none of the {len(left_out)} rows is a prompt{f', the first because: {left_out[0]}' if left_out else ''}"
        )
    return PromptList(prompts, seed=config.seed)


def _prompt(row: Mapping[str, Any], tokenizer: Tokenizer, origin: str, limit: int) -> Prompt:
    given = row.get("messages", row.get("prompt"))
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    last = check_messages(messages)[-1]
    if last.role == "assistant":
        raise RequestError("the last turn is an assistant's: end where the model shall answer")
    ids = tokenizer.encode(tokenizer.render(messages, read_tools(row) or None))
    if len(ids) > limit:
        raise RequestError(
            f"the prompt has {len(ids)} tokens, the limit is {limit}: raise max_prompt_len or leave it out"
        )
    subset = row.get("subset", "")
    if not isinstance(subset, str):
        raise RequestError(f"subset is {subset!r}, expected a text")
    return Prompt(ids=tuple(ids), text=last.text, row=row, subset=subset, origin=origin)
