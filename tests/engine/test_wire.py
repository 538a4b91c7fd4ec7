"""Messages between the processes: the same on both sides, however they are cut; and damage is always noticed."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.engine import wire
from ernie45.engine.pages import Books
from ernie45.engine.params import SamplingParams
from ernie45.engine.pieces import Piece, TokenLogprob
from ernie45.engine.request import End, Output, PromptScores, Usage
from ernie45.engine.stats import EngineStats
from ernie45.errors import ConfigError, TransferError
from ernie45.processing.constraint import Constraint

counts = st.integers(0, 2**31 - 1)
ids = st.lists(counts, max_size=6)
text = st.text(max_size=20)
floats = st.floats(allow_nan=False, allow_infinity=False)
logprobs = st.builds(
    TokenLogprob, id=counts, logprob=floats, top=st.lists(st.tuples(counts, floats), max_size=3).map(tuple)
)
pieces = st.builds(
    Piece,
    text=text,
    ids=ids.map(tuple),
    logprobs=st.lists(logprobs, max_size=2).map(tuple),
    finish_reason=st.sampled_from([None, "stop", "length"]),
    stop_reason=st.none() | text | counts,
    finish_detail=st.sampled_from([None, "loop"]),
)
usages = st.builds(Usage, prompt_tokens=counts, completion_tokens=counts, cached_tokens=counts)
ends = st.builds(
    End,
    request_id=text,
    kind=st.sampled_from(["finished", "aborted", "failed"]),
    usage=usages,
    reason=st.none() | text,
    cause=st.sampled_from([None, "request", "timeout", "internal"]),
    queue_s=st.none() | st.floats(0, 1e6),
)
stats = st.builds(
    EngineStats,
    running=counts,
    waiting=counts,
    pages=st.builds(Books, free=counts, cached=counts, in_use=counts, total=counts),
    page_size=counts,
    steps=counts,
    prompt_tokens=counts,
    cached_tokens=counts,
    generated_tokens=counts,
    drafted_tokens=counts,
    accepted_tokens=counts,
    preemptions=counts,
)
params = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(1, 10**6),
    temperature=st.floats(0, 10),
    seed=st.none() | st.integers(0, 2**63 - 5),  # up to four choices take seeds of their own behind it
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=2).map(tuple),
    n=st.integers(1, 4),
)
submits = st.builds(
    wire.Submit,
    id=text,
    prompt=ids,
    params=params,
    constraint=st.none() | text.map(lambda one: Constraint.choice([one or "x"])),
    priority=st.integers(-1000, 1000),
    tenant=text,
    cache_salt=st.none() | text,
    timeout_s=st.none() | st.floats(0.1, 1e6),
)
launches = st.builds(
    wire.Launch, model=text, max_model_len=st.none() | counts, speculation=st.sampled_from(["none", "mtp"])
)
to_worker = (
    submits
    | launches
    | st.builds(wire.Abort, text)
    | st.builds(wire.Ping, counts)
    | st.sampled_from([wire.Pause(), wire.Resume(), wire.ForgetPrefixes(), wire.Stop()])
)
from_worker = (
    st.builds(wire.Loading, text, counts, counts)
    | st.builds(wire.NotStarted, text, text)
    | st.builds(wire.Taken, text)
    | st.builds(wire.Refused, text, st.sampled_from(["request", "internal", "aborted"]), text)
    | st.builds(wire.Pong, counts, stats)
    | st.builds(
        wire.Step,
        scores=st.lists(
            st.builds(PromptScores, request_id=text, logprobs=st.lists(logprobs, max_size=2).map(tuple)), max_size=1
        ),
        outputs=st.lists(st.builds(Output, request_id=text, index=counts, piece=pieces), max_size=2),
        ends=st.lists(ends, max_size=2),
        stats=stats,
    )
)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    at = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(at)]


@given(st.lists(to_worker, max_size=4), st.lists(st.integers(0, 10**6), max_size=8))
def test_orders_arrive_as_they_were_sent(messages: list[wire.ToWorker], places: list[int]) -> None:
    frames = wire.Frames()
    data = b"".join(map(wire.frame, messages))
    assert [wire.read_to_worker(body) for part in cut(data, places) for body in frames.push(part)] == messages


@given(st.lists(from_worker, max_size=4), st.lists(st.integers(0, 10**6), max_size=8))
def test_news_arrive_as_they_were_sent(messages: list[wire.FromWorker], places: list[int]) -> None:
    frames = wire.Frames()
    data = b"".join(map(wire.frame, messages))
    assert [wire.read_from_worker(body) for part in cut(data, places) for body in frames.push(part)] == messages


@given(to_worker | from_worker, st.data())
def test_damage_is_a_message_or_a_transfer_error(message: wire.ToWorker | wire.FromWorker, data: st.DataObject) -> None:
    """Flipped and lost bytes either give another well-formed message or the one error that ends the connection."""
    body = bytearray(wire.frame(message)[4:])
    for _ in range(data.draw(st.integers(1, 3))):
        if body:
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    del body[data.draw(st.integers(0, len(body))) :]
    for read in (wire.read_to_worker, wire.read_from_worker):
        with suppress(TransferError):
            read(bytes(body))


@given(st.binary(max_size=200))
def test_noise_is_a_transfer_error(data: bytes) -> None:
    for read in (wire.read_to_worker, wire.read_from_worker):
        with pytest.raises(TransferError):
            read(data)


def test_bottomless_nesting_is_a_transfer_error() -> None:
    for start in (b"\x91" * 100_000, b"\x81\xa4type\xa6Submit" + b"\x81\xa1a" * 100_000):
        with pytest.raises(TransferError):
            wire.read_to_worker(start)


def test_lengths_that_cannot_be_are_noticed_before_anything_is_kept() -> None:
    frames = wire.Frames()
    with pytest.raises(TransferError, match="the limit is"):
        frames.push((wire.MAX_FRAME_BYTES + 1).to_bytes(4, "little"))
    assert wire.Frames().push(wire.MAX_FRAME_BYTES.to_bytes(4, "little") + b"x") == []


def test_values_that_the_engine_would_refuse_do_not_cross() -> None:
    """What the fields' classes insist on is insisted on here as well, as damage."""
    good = wire.frame(wire.Submit(id="a", prompt=[1], params=SamplingParams(temperature=0.5)))[4:]
    raw = msgspec.msgpack.decode(good)
    raw["params"]["temperature"] = -1.0
    with pytest.raises(TransferError):
        wire.read_to_worker(msgspec.msgpack.encode(raw))


def test_guesses_without_speculation_are_refused() -> None:
    with pytest.raises(ConfigError, match="without speculation"):
        wire.Launch(model="x", num_speculative_tokens=3).engine_config()
