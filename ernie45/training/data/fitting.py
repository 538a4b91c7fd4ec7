"""Dialogues made to fit: which of their oldest exchanges go, and how one becomes a document.

An exchange is a user's turn with everything up to the user's next one, so that calls stay with their results. System text is
never touched.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ernie45.errors import RequestError
from ernie45.training.batch import Document
from ernie45.training.data.config import DataConfig
from ernie45.training.data.encoding import ChatEncoder, Encoded
from ernie45.training.data.rows import Conversation, Messages, RowDroppedError

_SYSTEM = ("system", "developer")

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Fitted(Generic[Item]):
    """What became of a row."""

    item: Item
    size: int
    """Tokens of a packed row that it takes."""
    num_learnt: int
    full_size: int
    """Tokens of the row as it was; more than `size` where something was left out."""


def fit_conversation(encoder: ChatEncoder, row: Conversation, config: DataConfig, num_mtp: int) -> Fitted[Document]:
    """Make a document of a dialogue.

    Raises: RowDroppedError if it is too long or nothing of it is learnt; RequestError if it cannot be written, or is too
        long and the configuration wants to know.
    """
    room = config.max_seq_len + 1  # the last token is not read

    def encode(dropped: int) -> Encoded:
        kept = kept_messages(row.messages, dropped)
        return encoder.encode(tuple(row.messages[idx] for idx in kept), row.tools, [row.learnt[idx] for idx in kept])

    encoded = encode(0)
    full, unread = len(encoded.ids), 1
    if full > room:
        refuse_long(config, full - 1, config.max_seq_len, row.origin)
        if config.long_rows == "left":
            encoded = shortest_loss(encode, num_exchanges(row.messages), lambda found: len(found.ids) <= room, full - 1)
        else:
            unread = min(1 + num_mtp, full - config.max_seq_len)
            encoded = encoded.cut(config.max_seq_len + unread)
    learnt = sum(encoded.learnt[1 : len(encoded.ids) - unread + 1])
    if not learnt:
        raise RowDroppedError("nothing_learnt", full - 1)
    document = encoded.document(row.origin, unread)
    return Fitted(document, document.num_inputs, learnt, full - 1)


def refuse_long(config: DataConfig, size: int, limit: int, origin: str) -> None:
    """Leave out a row that is too long, if the configuration does not want it shortened."""
    if config.long_rows == "drop":
        raise RowDroppedError("too_long", size)
    if config.long_rows == "error":
        raise TooLongError(
            f"{origin} has {size} tokens, the limit is {limit}: raise max_seq_len (or max_prompt_len), or let long_rows be"
            " drop, left or right"
        )


class TooLongError(RequestError):
    """A row is too long and the configuration says that this is an error; stops the run, other than a bad row."""


def shortest_loss(encode: Callable[[int], Made], num: int, fits: Callable[[Made], bool], size: int) -> Made:
    """Encode with as few of the oldest exchanges dropped as makes the row fit.

    Args: encode: takes how many to drop. num: exchanges there are; the last one stays. Raises: RowDroppedError.
    """
    dropped = bisect_left(range(num), True, lo=1, key=lambda count: fits(encode(count)))
    if dropped >= num:
        raise RowDroppedError("too_long", size)
    return encode(dropped)


def num_exchanges(messages: Messages) -> int:
    """How many exchanges follow the system text."""
    return len(_starts(messages))


def kept_messages(messages: Messages, dropped: int) -> list[int]:
    """Which messages are left without the first `dropped` exchanges."""
    starts = _starts(messages)
    first = starts[dropped] if starts else 0
    return [idx for idx, message in enumerate(messages) if idx >= first or message["role"] in _SYSTEM]


def without_exchanges(messages: Messages, dropped: int) -> Messages:
    """The messages without the first `dropped` exchanges."""
    return tuple(messages[idx] for idx in kept_messages(messages, dropped))


def _starts(messages: Messages) -> list[int]:
    first = next((idx for idx, message in enumerate(messages) if message["role"] not in _SYSTEM), len(messages))
    later = (idx for idx in range(first + 1, len(messages)) if messages[idx]["role"] == "user")
    return [*([first] if first < len(messages) else []), *later]
