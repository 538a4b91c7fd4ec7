"""Rows above the limit: left out, without their oldest exchanges, cut, or an error."""

from __future__ import annotations

from typing import Any

import pytest

from ernie45.errors import RequestError
from ernie45.processing.tokenizer import Tokenizer
from ernie45.training.data.config import DataConfig, SourceConfig
from ernie45.training.data.encoding import ChatEncoder
from ernie45.training.data.fitting import fit_conversation, kept_messages
from ernie45.training.data.rows import Conversation, RowDroppedError

MESSAGES: tuple[dict[str, Any], ...] = (
    {"role": "system", "content": "system text"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "3 3 3"},
)


def config(max_seq_len: int, long_rows: Any) -> DataConfig:
    return DataConfig(train=(SourceConfig(path="x"),), max_seq_len=max_seq_len, long_rows=long_rows)


def conversation(messages: Any = MESSAGES) -> Conversation:
    learnt = tuple(message["role"] == "assistant" for message in messages)
    return Conversation(messages=tuple(messages), learnt=learnt, origin="f:9")


@pytest.fixture
def encoder(ernie: Tokenizer) -> ChatEncoder:
    return ChatEncoder(ernie)


@pytest.fixture
def size(encoder: ChatEncoder) -> int:
    """What the network reads of all messages."""
    return len(encoder.encode(MESSAGES).ids) - 1


def test_a_row_that_just_fits(encoder: ChatEncoder, size: int) -> None:
    for policy in ("drop", "left", "right", "error"):
        fitted = fit_conversation(encoder, conversation(), config(size, policy), 1)
        assert fitted.size == fitted.full_size == fitted.item.num_inputs == size
        assert fitted.num_learnt == int(fitted.item.learnt.sum())
        assert fitted.item.num_unread == 1
        assert fitted.item.origin == "f:9"


def test_dropped_or_an_error(encoder: ChatEncoder, size: int) -> None:
    with pytest.raises(RowDroppedError) as dropped:
        fit_conversation(encoder, conversation(), config(size - 1, "drop"), 0)
    assert (dropped.value.reason, dropped.value.size) == ("too_long", size)
    with pytest.raises(RequestError, match=rf"f:9 has {size} tokens, the limit is {size - 1}: raise max_seq_len"):
        fit_conversation(encoder, conversation(), config(size - 1, "error"), 0)


@pytest.mark.parametrize("dropped", [1, 2])
def test_left_drops_as_few_of_the_oldest_exchanges_as_needed(encoder: ChatEncoder, dropped: int) -> None:
    kept = (MESSAGES[0], *MESSAGES[1 + 2 * dropped :])
    expected = encoder.encode(kept)
    room = (
        len(encoder.encode((MESSAGES[0], *MESSAGES[2 * dropped - 1 :])).ids) - 2
    )  # one exchange more just does not fit
    fitted = fit_conversation(encoder, conversation(), config(room, "left"), 0)
    assert fitted.item.ids.tolist() == expected.ids
    assert fitted.item.learnt.tolist() == expected.learnt
    assert fitted.size < fitted.full_size


def test_left_gives_up_on_a_last_exchange_that_is_too_long(encoder: ChatEncoder) -> None:
    with pytest.raises(RowDroppedError) as dropped:
        fit_conversation(encoder, conversation(), config(8, "left"), 0)
    assert dropped.value.reason == "too_long"


@pytest.mark.parametrize(("num_mtp", "cut", "unread"), [(0, 1, 1), (0, 3, 1), (1, 3, 2), (2, 2, 3), (5, 2, 3)])
def test_right_cuts_tokens_and_keeps_what_mtp_blocks_look_at(
    encoder: ChatEncoder, size: int, num_mtp: int, cut: int, unread: int
) -> None:
    whole = encoder.encode(MESSAGES)
    document = fit_conversation(encoder, conversation(), config(size - cut, "right"), num_mtp).item
    assert (document.num_inputs, document.num_unread) == (size - cut, unread)
    assert document.ids.tolist() == whole.ids[: size - cut + unread]
    assert document.targets is not None
    assert document.targets.tolist() == whole.targets[: size - cut + unread]


def test_nothing_learnt(encoder: ChatEncoder) -> None:
    row = conversation(MESSAGES[:3])
    muted = Conversation(messages=row.messages, learnt=(False,) * 3)
    with pytest.raises(RowDroppedError) as dropped:
        fit_conversation(encoder, muted, config(100, "drop"), 0)
    assert dropped.value.reason == "nothing_learnt"
    start = encoder.encode(row.messages).answers[0].start
    with pytest.raises(RowDroppedError):
        fit_conversation(encoder, row, config(start - 1, "right"), 0)
    assert fit_conversation(encoder, row, config(start, "right"), 0).num_learnt == 1


def test_exchanges_begin_with_the_user() -> None:
    roles = (
        "system",
        "developer",
        "assistant",
        "user",
        "system",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
    )
    messages = tuple({"role": role, "content": role} for role in roles)
    assert kept_messages(messages, 0) == list(range(10))
    assert kept_messages(messages, 1) == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert kept_messages(messages, 2) == [0, 1, 4, 8, 9], "system text stays wherever it stands"
