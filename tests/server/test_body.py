"""Bodies that are no JSON, too much JSON, or no bodies at all: refused at once, in little memory, beside others that are served."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.server.body import MAX_COMMAS, parse
from ernie45.server.errors import ApiError
from tests.server.raw import AUTH, exchange, head, health_s, post
from tests.server.served import Served

CHAT = "/v1/chat/completions"
USER = b'{"messages":[{"role":"user","content":"%s"}],"max_tokens":1}'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"{",
        b"nonsense",
        b"{}x",
        USER % b"\xff",
        USER % b"\xc0\xaf",  # overlong
        USER % b"\xed\xa0\x80",  # a surrogate in UTF-8
        USER % b"\xf4\x90\x80\x80",  # beyond Unicode
        USER % b"\\ud800",
        USER % b"\\udc00\\ud800",
        USER % b"\x00",
        USER % b"\x1f",
        USER % b"\\x41",
        b"\xef\xbb\xbf" + USER % b"x",
        (USER % b"x").decode().encode("utf-16"),
        (USER % b"x").decode().encode("utf-32"),
        USER.replace(b":1}", b":NaN}") % b"x",
        USER.replace(b":1}", b":Infinity}") % b"x",
        USER.replace(b":1}", b":-Infinity}") % b"x",
        USER.replace(b":1}", b":1e999}") % b"x",
        USER.replace(b":1}", b":-1e999}") % b"x",
        USER.replace(b":1}", b":" + b"9" * 100_000 + b"}") % b"x",
        USER.replace(b":1}", b":1,}") % b"x",
        USER.replace(b":1}", b":01}") % b"x",
        USER.replace(b":1}", b':1,"max_tokens":2}') % b"x",
        USER.replace(b"}]", b',"role":"system"}]') % b"x",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"messages":' + b"[" * 100 + b"]" * 100 + b"}",
    ],
)
def test_what_is_no_strict_json_is_a_400_with_the_reason(server: Served, body: bytes) -> None:
    reply = exchange(server, post(CHAT, body))
    assert reply.status == 400
    assert reply.error["code"] == "invalid_json"
    assert reply.seconds < 0.5


@pytest.mark.parametrize("body", [b"[]", b"1", b"null", b'"text"', b"true"])
def test_what_is_no_object_is_a_400(server: Served, body: bytes) -> None:
    assert exchange(server, post(CHAT, body)).status == 400


def test_places_are_named() -> None:
    with pytest.raises(ApiError, match="line 2 column 6"):
        parse(b'{"a": 1,\n"b": \xff}')
    with pytest.raises(ApiError, match="several members 'b'"):
        parse(b'{"a": {"b": 1, "c": 2, "b": 3}}')
    with pytest.raises(ApiError, match="no UTF-8 at line 3 column 8"):
        parse(b'{"a": 1,\n\n"b": "x\xff"}')
    with pytest.raises(ApiError, match="is no JSON: unterminated string starting at line 2 column 2"):
        parse(b'[\n "abc')
    with pytest.raises(ApiError, match="is no JSON: expected ',' delimiter at line 1 column 4"):
        parse(b"[1 2]")
    with pytest.raises(ApiError, match="whole number that is too long"):
        parse(b"[" + b"9" * 5000 + b"]")
    with pytest.raises(ApiError, match="holds NaN"):
        parse(b'{"a": NaN}')
    with pytest.raises(ApiError, match="half of a surrogate pair"):
        parse(b'{"a": "\\ud83d \\ude00"}')
    with pytest.raises(ApiError, match="beyond 1.8e\\+308"):
        parse(b'{"a": [1, -2e400]}')
    with pytest.raises(ApiError, match="more than 64 levels deep"):
        parse(b"[" * 65 + b"]" * 65)
    assert parse(b"[" * 64 + b"]" * 64)


def test_pairs_of_surrogates_and_what_only_looks_like_them_are_text() -> None:
    assert parse(b'["\\ud83d\\ude00", "\\\\ud800", "\\u00e9"]') == ["😀", "\\ud800", "é"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_all_json_is_read_as_it_was_written(value: Any) -> None:
    assert parse(json.dumps(value).encode()) == value
    assert parse(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.binary(max_size=80) | st.text(alphabet='{}[]",:0.eE-+\\u d8\x00\ufeffNaInfity', max_size=40).map(str.encode))
def test_no_bytes_break_the_reader_and_what_it_takes_is_valid(data: bytes) -> None:
    try:
        value = parse(data)
    except ApiError:
        return
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


def test_a_nul_that_is_escaped_is_a_character_like_others(server: Served) -> None:
    ids = server.post("/v1/tokenize", {"prompt": "a\0b", "add_special_tokens": False}).json()["tokens"]
    assert server.post("/v1/detokenize", {"tokens": ids}).json()["prompt"] == "a\0b"


def test_names_twice_are_found_quickly_in_large_objects() -> None:
    names = b",".join(b'"%d":1' % number for number in range(190_000))
    start = time.process_time()
    with pytest.raises(ApiError, match="several members '189999'"):
        parse(b"{" + names + b',"189999":1}')
    assert time.process_time() - start < 2


@pytest.mark.parametrize("character", ["x", "\n", "你", "😀", '"'])
def test_a_large_text_takes_little_more_than_it_takes_pythons_own_reader(character: str) -> None:
    data = json.dumps({"prompt": character * (4 << 20)}).encode()

    def least_s(read: Callable[[bytes], Any]) -> float:
        times = []
        for _ in range(5):
            start = time.process_time()
            read(data)
            times.append(time.process_time() - start)
        return min(times)

    assert least_s(parse) < 6 * least_s(json.loads) + 0.02


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("application/json; charset=utf-8", 200),
        ("APPLICATION/JSON", 200),
        ("", 415),
    ],
)
def test_content_types(server: Served, kind: str, status: int) -> None:
    assert exchange(server, post(CHAT, USER % b"x", f"{AUTH}Content-Type: {kind}\r\n")).status == status


def test_compressed_bodies_are_refused_unread(server: Served) -> None:
    bomb = gzip.compress(b"0" * (64 << 20))
    reply = exchange(server, post(CHAT, bomb, f"{AUTH}Content-Encoding: gzip\r\n"))
    assert (reply.status, reply.error["code"]) == (415, "unsupported_encoding")


def test_a_large_body_hears_why_while_it_is_still_being_sent(server: Served) -> None:
    """A connection that is closed at once loses the answer to a client that sends first and reads then."""
    size = 24 << 20
    piece = b"x" * (1 << 20)
    reply = exchange(server, head(CHAT, method="POST", headers=f"{AUTH}Content-Length: {size}\r\n"), [piece] * 24)
    assert (reply.status, reply.error["code"]) == (413, "request_too_large")
    assert server.post(CHAT, {"messages": [{"role": "user", "content": "x" * (9 << 20)}]}).status_code == 413


def _rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has taken, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _chunks(size: int) -> Iterator[bytes]:
    """A chunked body of that many bytes, without an end."""
    piece = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    return itertools.repeat(piece, size >> 20)


@pytest.mark.parametrize(("path", "key"), [(CHAT, AUTH), ("/v1/nothing", AUTH), ("/health", "")])
def test_a_gigabyte_is_neither_read_nor_kept(server: Served, path: str, key: str) -> None:
    before = _rss(server.process.pid)
    start = time.monotonic()
    declared = exchange(
        server,
        head(path, method="POST", headers=f"{key}Content-Length: {1 << 30}\r\n"),
        itertools.repeat(b"x" * (1 << 20), 1 << 10),
    )
    streamed = exchange(
        server, head(path, method="POST", headers=f"{key}Transfer-Encoding: chunked\r\n"), _chunks(1 << 30)
    )
    # Either the client sees the answer, or it went on sending for so long that it was cut.
    assert {declared.status, streamed.status} <= {0, 401, 404, 405, 413}
    assert time.monotonic() - start < 8
    assert _rss(server.process.pid) - before < 48 << 20
    assert exchange(server, head("/health")).status == 200


def _object(**fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, **fields}).encode()


MANY = 10**6
HUGE = {
    "messages": lambda: b'{"messages":[' + b'{"role":"user"},' * 199_000 + b'{"role":"user"}]}',
    "wrong messages": lambda: b'{"messages":[' + b"1," * MANY + b"1]}",
    "4096 wrong messages": lambda: b'{"messages":[' + b'{"x":1},' * 4095 + b'{"x":1}]}',
    "content parts": lambda: _object(messages=[{"role": "user", "content": [{"type": "text"}] * 199_000}]),
    "one content": lambda: _object(messages=[{"role": "user", "content": "x" * (4 << 20)}]),
    "stop": lambda: _object(stop=["x"] * MANY),
    "bad words": lambda: _object(bad_words=["x"] * MANY),
    "logit bias": lambda: _object(logit_bias={str(number): 1 for number in range(199_000)}),
    "n": lambda: _object(n=10**9),
    "n of 64 bits": lambda: _object(n=2**63),
    "best_of": lambda: _object(best_of=2**63),
    "max_tokens": lambda: _object(max_tokens=2**63),
    "negative max_tokens": lambda: _object(max_tokens=-(2**63)),
    "huge max_tokens": lambda: _object(max_tokens=10**400),
    "seed": lambda: _object(seed=2**64),
    "top_logprobs": lambda: _object(logprobs=True, top_logprobs=10**6),
    "tools": lambda: _object(tools=[{"type": "function", "function": {"name": "f"}}] * 10_000),
    "stop ids": lambda: _object(stop_token_ids=[1] * 199_000),
    "unknown fields": lambda: _object(n=-1, **{f"field_{number}": 1 for number in range(190_000)}),
    "prompt ids": lambda: _object(prompt_token_ids=[5] * 199_000),
    "values": lambda: _object(x=[0] * (MAX_COMMAS + 1)),
    "names": lambda: _object(model="x" * (1 << 20)),
}


@pytest.mark.parametrize("name", list(HUGE))
def test_too_much_of_anything_is_refused_quickly(server: Served, name: str) -> None:
    body = HUGE[name]()
    before, cpu_before = _rss(server.process.pid), _cpu_s(server.process.pid)
    reply = exchange(server, post(CHAT, body))
    assert reply.status in (400, 404, 413), reply.body[:300]
    assert len(reply.body) < 2000
    # Of the processor, not of the clock: a busy machine takes longer, but not much more of that.
    assert _cpu_s(server.process.pid) - cpu_before < 0.6, name
    assert _rss(server.process.pid) - before < 200 << 20


def test_others_are_served_meanwhile(server: Served) -> None:
    """The probe answers within a part of a second whatever is being refused beside it."""
    stop = threading.Event()

    def hurl() -> None:
        bodies = [HUGE[name]() for name in ("4096 wrong messages", "stop", "logit bias", "one content")]
        while not stop.is_set():
            for body in bodies:
                exchange(server, post(CHAT, body))

    thread = threading.Thread(target=hurl)
    thread.start()
    try:
        waits = sorted(health_s(server) for _ in range(60))
        assert server.chat(max_tokens=4)["usage"]["completion_tokens"] == 4
    finally:
        stop.set()
        thread.join()
    assert waits[-1] < 1.5
    assert waits[len(waits) // 2] < 0.4
