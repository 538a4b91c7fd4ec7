"""Schemas, expressions and grammars that are made to hurt: refused or bounded, beside an event loop and answers that go on."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from tests.server.raw import exchange, health_s, post, wait_idle
from tests.server.served import Served

CHAT = "/v1/chat/completions"


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def doubling(levels: int) -> dict[str, Any]:
    """References that unfold to 2 ** levels places."""
    definitions: dict[str, Any] = {"d0": {"type": "string"}}
    for level in range(1, levels):
        one = {"$ref": f"#/$defs/d{level - 1}"}
        definitions[f"d{level}"] = {"type": "object", "properties": {"a": one, "b": one}, "required": ["a", "b"]}
    return {"$defs": definitions, "$ref": f"#/$defs/d{levels - 1}"}


BOMBS: dict[str, dict[str, Any]] = {
    "deep schema": {"guided_json": nested(30)},
    "schema beyond its depth": {"guided_json": nested(60)},
    "wide schema": {
        "guided_json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}
    },
    "doubling references": {"guided_json": doubling(60)},
    "endless reference": {"guided_json": {"$ref": "#"}},
    "two that refer to each other": {
        "guided_json": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    },
    "outer reference": {"guided_json": {"$ref": "http://localhost:1/schema.json"}},
    "file reference": {"guided_json": {"$ref": "file:///etc/passwd"}},
    "many alternatives": {"guided_json": {"anyOf": [{"const": f"value {i}"} for i in range(9000)]}},
    "nested alternatives": {
        "guided_json": {"allOf": [{"anyOf": [{"minimum": i}, {"maximum": -i}]} for i in range(300)]}
    },
    "huge repeat": {"guided_json": {"type": "string", "minLength": 10**9, "maxLength": 2 * 10**9}},
    "huge array": {"guided_json": {"type": "array", "items": {"type": "integer"}, "minItems": 10**8}},
    "huge number": {"guided_json": {"type": "integer", "minimum": -(10**300), "maximum": 10**300}},
    "multiple of": {"guided_json": {"type": "number", "multipleOf": 1e-300}},
    "bad pattern": {"guided_json": {"type": "string", "pattern": "(?<=a)b\\1"}},
    "pattern bomb": {"guided_json": {"type": "string", "pattern": "(((a{1,100}){1,100}){1,100}){1,100}"}},
    "bad type": {"guided_json": {"type": "strnig"}},
    "type of no type": {"guided_json": {"type": {"a": 1}}},
    "regex bomb": {"guided_regex": "(((a{1,100}){1,100}){1,100}){1,100}"},
    "backtracking": {"guided_regex": "(a+)+(b|a+)*(a|a)*$"},
    "states": {"guided_regex": "[ab]*a[ab]{40}"},
    "long regex": {"guided_regex": "a" * 100_000},
    "open groups": {"guided_regex": "(" * 5000},
    "unicode classes": {"guided_regex": "(\\p{L}{1,50}\\p{N}{1,50}){1,50}"},
    "look-behind": {"guided_regex": "(?<=x)y"},
    "grammar of itself": {"guided_grammar": "start: start"},
    "grammar ambiguous": {"guided_grammar": 'start: start start start | "a" | ""'},
    "grammar without a rule": {"guided_grammar": "start: nothing"},
    "grammar long": {
        "guided_grammar": "\n".join(["start: r0", *(f"r{i}: r{i + 1} r{i + 1}" for i in range(2000)), 'r2000: "a"'])
    },
    "gbnf deep": {"guided_grammar": "root ::= " + "(" * 1000 + '"a"' + ")" * 1000},
    "choices": {"guided_choice": [f"choice {i}" for i in range(20_000)]},
    "long choice": {"guided_choice": ["x" * (1 << 20)]},
    "no choices": {"guided_choice": []},
    "empty": {"guided_regex": ""},
}


def request(fields: dict[str, Any]) -> bytes:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 12, "reasoning_max_tokens": 1, **fields}
    return post(CHAT, json.dumps(body).encode())


@pytest.mark.parametrize("name", list(BOMBS))
def test_each_is_refused_or_served_in_bounded_time(server: Served, name: str) -> None:
    waits: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            waits.append(health_s(server))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        reply = exchange(server, request(BOMBS[name]))
    finally:
        stop.set()
        watcher.join()
    assert reply.status in (200, 400, 413), (reply.status, reply.body[:300])
    assert reply.seconds < 8, reply.seconds
    assert max(waits) < 1.0, max(waits)
    if reply.status != 200:
        assert len(reply.body) < 1500
        assert reply.error["type"] == "invalid_request_error"


def test_answers_of_others_go_on_beside_them(server: Served) -> None:
    """Compiling happens beside the engine's steps: a stream has no long pause while bombs are worked on."""
    hurlers = [
        threading.Thread(target=exchange, args=[server, request(BOMBS[name])])
        for name in ("doubling references", "states", "many alternatives", "grammar ambiguous", "regex bomb")
    ]
    pauses: list[float] = []
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 600, "ignore_eos": True}
    with server.client() as client, client.stream("POST", CHAT, json=body) as response:
        last = time.monotonic()
        for number, line in enumerate(response.iter_lines()):
            if number == 10:
                for hurler in hurlers:
                    hurler.start()
            if line:
                pauses.append(time.monotonic() - last)
                last = time.monotonic()
    for hurler in hurlers:
        hurler.join()
    assert max(pauses[5:]) < 2.0
    wait_idle(server, 15)
    assert server.chat(max_tokens=1)["model"] == "tiny"
