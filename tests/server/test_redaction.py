"""Keys and what people write are nowhere but where they belong: not in logs, not in metrics, not in errors of the server."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.server.redaction import RedactingFormatter
from tests.server.raw import AUTH, connect, exchange, head, post, reset
from tests.server.served import KEY, Served

CHAT = "/v1/chat/completions"
CANARY = "kanarienvogel"
OTHER_KEY = "ek-a-key-that-is-none-of-this-server"


def formatted(message: str, *arguments: object, error: BaseException | None = None) -> str:
    record = logging.LogRecord("x", logging.INFO, "f", 1, message, arguments, None)
    if error is not None:
        record.exc_info = (type(error), error, error.__traceback__)
    return RedactingFormatter("%(message)s", ["my key/with+signs", "my key"]).format(record)


def test_known_keys_are_taken_out_wherever_they_are() -> None:
    assert formatted("got %s", "my key/with+signs!") == "got [redacted]!"
    try:
        raise ValueError("my key")
    except ValueError as error:
        shown = formatted("failed", error=error)
    assert "my key" not in shown
    assert "ValueError: [redacted]" in shown


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer abcdefgh",
        "authorization: bearer 'abcdefgh'",
        "{'x-api-key': 'abcdefgh'}",
        "x-api-key=abcdefgh",
        "X-Api-Key: abcdefgh",
        "/v1/models/sk-abcdefgh",
        "ek-abcdefgh",
    ],
)
def test_what_looks_like_a_key_is_taken_out(text: str) -> None:
    assert "abcdefgh" not in formatted("%s", text)
    assert "[redacted]" in formatted("%s", text)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40), st.text(max_size=40))
def test_no_text_around_a_key_brings_it_back(before: str, behind: str) -> None:
    assert "my key/with+signs" not in formatted("%s", f"{before}my key/with+signs{behind}")


def mistakes() -> list[bytes]:
    """Requests that fail in every place, each with both canaries wherever it can carry them."""
    turns = [{"role": "user", "content": CANARY}]

    def chat(**fields: Any) -> bytes:
        return post(
            CHAT, json.dumps({"messages": turns, "max_tokens": 2, **fields}).encode(), AUTH + f"X-Note: {CANARY}\r\n"
        )

    return [
        head("/v1/models", headers=f"Authorization: Bearer {OTHER_KEY}\r\n"),
        head("/v1/models", headers=f"x-api-key: {OTHER_KEY}\r\n"),
        head(f"/v1/models?key={KEY}&q={CANARY}", headers=""),
        head(f"/v1/models?key={KEY}&q={CANARY}"),
        head(f"/v1/models/{KEY}"),
        head("/v1/models", headers=f"{AUTH}x-request-id: {KEY}\r\n"),
        head("/v1/models", headers=f"{AUTH}Cookie: {CANARY}={KEY}\r\nReferer: http://x/{CANARY}\r\n"),
        head("/v1/models", headers=AUTH, host=f"{CANARY}.example"),
        head("/health", method=f"X{CANARY[:3]}"),
        chat(),
        chat(stream=True),
        chat(temperature=-1),
        chat(n=1000),
        chat(max_tokens=10**6),
        chat(model=f"x-{OTHER_KEY}"),
        chat(guided_regex=f"({CANARY}"),
        chat(guided_json={"type": "object", "properties": {CANARY: {"not": {}}}}),
        chat(guided_grammar=f"start: {CANARY}"),
        chat(stop=[CANARY]),
        chat(
            tools=[{"type": "function", "function": {"name": "x", "parameters": {"type": CANARY}}}],
            tool_choice="required",
        ),
        chat(messages=[{"role": CANARY, "content": CANARY}]),
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": CANARY}}]}]),
        chat(messages=[{"role": "tool", "content": CANARY, "tool_call_id": CANARY}]),
        chat(cache_salt=CANARY, user=CANARY, metadata={CANARY: CANARY}),
        chat(**{CANARY: 1}),
        post(CHAT, b'{"messages": "' + CANARY.encode()),
        post(CHAT, CANARY.encode() * 1000),
        post("/v1/completions", json.dumps({"prompt": CANARY, "max_tokens": 1, "echo": True}).encode()),
        post("/v1/completions", json.dumps({"prompt": CANARY * 500, "max_tokens": 1}).encode()),
        post("/v1/tokenize", json.dumps({"prompt": CANARY}).encode()),
        post(CHAT + "/render", json.dumps({"messages": turns}).encode()),
    ]


def test_canaries_appear_in_no_log_and_no_metric(server: Served) -> None:
    for request in mistakes():
        reply = exchange(server, request)
        assert reply.status, request[:200]
        assert reply.status < 500, (request[:300], reply.body)
        for name, value in reply.headers.items():
            assert KEY not in value or name == "x-request-id"
        if not request.startswith(b"GET /v1/models/" + KEY.encode()):
            assert KEY.encode() not in reply.body.replace(b"".join([b'"request_id":"', KEY.encode(), b'"']), b"")
    with connect(server) as sock:
        sock.sendall(mistakes()[10])
        sock.recv(10)
        reset(sock)
    time.sleep(0.2)
    log, metrics = "".join(server.log), server.get("/metrics").text
    for canary in (KEY, OTHER_KEY):
        assert canary not in log
        assert canary not in metrics
    lines = [line for line in server.log if CANARY in line]
    assert not lines
    assert CANARY not in metrics


def test_every_answer_has_one_line_that_no_path_can_forge(server: Served) -> None:
    before = len(server.log)
    exchange(server, head("/v1/x%0a2026 INFO ernie45.access: GET /forged 200".replace(" ", "%20")))
    exchange(server, head("/v1/" + "y" * 5000))
    time.sleep(0.2)
    lines = [line for line in server.log[before:] if "ernie45.access" in line]
    assert len([line for line in lines if "GET /v1/" in line]) == 2
    assert not [line for line in server.log if line.startswith("2026 INFO")]
    assert all(len(line) < 600 for line in lines)


def test_lines_name_caller_and_request_but_not_who_it_is(server: Served) -> None:
    reply = exchange(server, head("/v1/models"))
    time.sleep(0.2)
    (line,) = [line for line in server.log if reply.headers["x-request-id"] in line]
    assert " tenant=" in line
    assert "tenant=-" not in line
