"""`/messages` of a real server with a small random model, asked by Anthropic's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal

import httpx
import pydantic
import pytest

from ernie45.processing.answer_parser import ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallBegun, ToolCallEnded
from ernie45.server.blocks import Blocks
from tests.server.served import Served

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: pip install ernie45[test]")
anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed: pip install ernie45[test]")

TOOL: dict[str, Any] = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CACHED = {"type": "text", "text": "Hel", "cache_control": {"type": "ephemeral"}}
THINKING: dict[str, Any] = {"type": "enabled", "budget_tokens": 4}
USER = {"role": "user", "content": "Hi"}
TEXT = {"type": "text", "text": "x"}
RESULT = {"type": "tool_result", "tool_use_id": "c"}
FORCED = {"type": "any", "disable_parallel_tool_use": True}


class City(pydantic.BaseModel):
    name: Literal["Bonn", "Xi'an"]
    large: bool


@pytest.fixture
def client(server: Served) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server.url, api_key=server.key, max_retries=0) as made:
        yield made


def ask(server: Served, path: str = "/v1/messages", **fields: Any) -> httpx.Response:
    body = {"messages": [USER], "max_tokens": 12, "thinking": THINKING, "seed": 3, **fields}
    if path.endswith("count_tokens"):
        body = {name: body[name] for name in body if name not in ("max_tokens", "seed")}
    headers = {"x-api-key": server.key, "anthropic-version": "2023-06-01"}
    return httpx.post(
        server.url + path, json=body, headers=headers, timeout=60, verify=False
    )  # no certificates to load


def post(server: Served, **fields: Any) -> dict[str, Any]:
    response = ask(server, **fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def count(server: Served, **fields: Any) -> int:
    response = ask(server, "/v1/messages/count_tokens", **fields)
    assert response.status_code == 200, response.text
    return int(response.json()["input_tokens"])


def comparable(message: dict[str, Any]) -> dict[str, Any]:
    """A message without ids, and without what the cache knew."""
    content = [{key: value for key, value in block.items() if key != "id"} for block in message["content"]]
    return {"content": content, **{key: message[key] for key in ("stop_reason", "stop_sequence", "role", "model")}}


def check_order(events: list[dict[str, Any]]) -> None:
    """Insist on the documented sequence: the message starts; blocks start, grow, stop, one behind the other; it stops."""
    kinds = [event["type"] for event in events if event["type"] != "ping"]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    follows = {
        "message_start": {"content_block_start", "message_delta"},
        "content_block_start": {"content_block_delta", "content_block_stop"},
        "content_block_delta": {"content_block_delta", "content_block_stop"},
        "content_block_stop": {"content_block_start", "message_delta"},
        "message_delta": {"message_stop"},
    }
    assert all(after in follows[before] for before, after in pairwise(kinds))
    deltas = {
        "thinking": {"thinking_delta", "signature_delta"},
        "text": {"text_delta"},
        "tool_use": {"input_json_delta"},
    }
    begun: list[str] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(begun)
            begun.append(event["content_block"]["type"])
        elif event["type"].startswith("content_block"):
            assert event["index"] == len(begun) - 1
            if "delta" in event:
                assert event["delta"]["type"] in deltas[begun[-1]]


# Whole messages


def test_a_message_has_anthropics_form(client: Any) -> None:
    message = client.messages.create(
        model="tiny",
        system="Be brief.",
        messages=[USER],
        max_tokens=20,
        thinking=THINKING,
        extra_body={"seed": 1, "min_tokens": 20, "temperature": 0.5},
    )
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.model) == ("message", "assistant", "tiny")
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].signature
    assert message.content[0].thinking
    assert message.content[1].text
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    assert message.usage.output_tokens == 20
    assert message.usage.output_tokens_details.thinking_tokens == 4


def test_the_counts_of_the_input_exclude_each_other(server: Served) -> None:
    messages = [{"role": "user", "content": "cached once more " * 12}]
    total = count(server, messages=messages)
    first = post(server, messages=messages, thinking=None, max_tokens=1)["usage"]
    second = post(server, messages=messages, thinking=None, max_tokens=1)["usage"]
    for usage in (first, second):
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == total
        assert usage["cache_creation_input_tokens"] == 0
    assert second["input_tokens"] <= 17


def test_tokens_are_counted_as_they_are_used(client: Any) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": [USER], "system": "Be kind.", "tools": [TOOL]}
    counted = client.messages.count_tokens(**fields)
    used = client.messages.create(max_tokens=1, **fields).usage
    assert counted.input_tokens == used.input_tokens + used.cache_read_input_tokens


def test_parsed_output_is_an_object_of_the_class(client: Any) -> None:
    message = client.messages.parse(
        model="tiny", messages=[USER], max_tokens=200, thinking=THINKING, output_format=City, extra_body={"seed": 3}
    )
    assert message.stop_reason == "end_turn"
    assert isinstance(message.parsed_output, City)


# Streams


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 40},
        {"max_tokens": 2, "thinking": None},
        {"thinking": {**THINKING, "display": "omitted"}},
        {"tools": [TOOL], "tool_choice": FORCED, "max_tokens": 400},
        {"tools": [{**TOOL, "eager_input_streaming": True}], "tool_choice": FORCED, "max_tokens": 400},
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "get_weather"}, "max_tokens": 60},
    ],
    ids=["text", "cut-thought", "omitted", "call", "eager-call", "cut-call"],
)
def test_a_stream_keeps_the_order_and_adds_up_to_the_whole(server: Served, client: Any, fields: dict[str, Any]) -> None:
    body: dict[str, Any] = {"messages": [USER], "max_tokens": 12, "thinking": THINKING, "seed": 3, **fields}
    check_order(server.events("/v1/messages", body))
    known = {
        name: body[name] for name in ("messages", "max_tokens", "tools", "tool_choice", "thinking") if body.get(name)
    }
    with client.messages.stream(model="tiny", extra_body={"seed": 3}, **known) as stream:
        final = stream.get_final_message()
    whole = post(server, **fields)
    assert comparable(final.to_dict()) == comparable(whole)
    if final.stop_reason != "tool_use":  # the engine is a token or two ahead when the one call ends the answer
        assert final.usage.output_tokens == whole["usage"]["output_tokens"]
    used = final.usage.input_tokens + final.usage.cache_read_input_tokens
    assert used == whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"]


def test_calls_stream_whole_unless_asked_otherwise(server: Served) -> None:
    def pieces(**more: Any) -> list[str]:
        body = {"messages": [USER], "max_tokens": 400, "thinking": THINKING, "seed": 3, "tool_choice": FORCED}
        events = server.events("/v1/messages", {**body, "tools": [{**TOOL, **more}]})
        return [event["delta"]["partial_json"] for event in events if "partial_json" in event.get("delta", {})]

    (whole,) = pieces()
    eager = pieces(eager_input_streaming=True)
    assert len(eager) > 3
    assert "".join(eager) == whole


def test_the_clients_text_stream(client: Any) -> None:
    with client.messages.stream(
        model="tiny", messages=[USER], max_tokens=30, thinking=THINKING, extra_body={"seed": 5, "min_tokens": 30}
    ) as stream:
        text = "".join(stream.text_stream)
        assert text == stream.get_final_text() != ""


def test_a_ping_follows_the_start(server: Served) -> None:
    events = server.events("/v1/messages", {"messages": [USER], "max_tokens": 1})
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]


# Tools


def test_a_call_goes_round(client: Any) -> None:
    fields: dict[str, Any] = {"model": "tiny", "tools": [TOOL], "thinking": THINKING, "extra_body": {"seed": 3}}
    turns: list[Any] = [{"role": "user", "content": "Weather?"}]
    first = client.messages.create(messages=turns, tool_choice=FORCED, max_tokens=400, **fields)
    assert first.stop_reason == "tool_use"
    assert [block.type for block in first.content] == ["thinking", "tool_use"]
    call = first.content[-1]
    assert call.name == "get_weather"
    jsonschema.validate(call.input, TOOL["input_schema"])
    turns.append({"role": "assistant", "content": first.content})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    turns.append({"role": "user", "content": [result, {"type": "text", "text": "And now?"}]})
    second = client.messages.create(messages=turns, max_tokens=8, **fields)
    assert second.usage.input_tokens + second.usage.cache_read_input_tokens > first.usage.input_tokens


def test_no_tools_are_told_where_none_may_be_called(server: Served) -> None:
    assert count(server, tools=[TOOL], tool_choice={"type": "none"}) == count(server)
    assert count(server, tools=[TOOL], tool_choice={"type": "auto"}) > count(server)


def test_blocks_of_any_order_begin_and_end_once() -> None:
    blocks = Blocks()
    steps = blocks.push(
        [ReasoningDelta("hm"), ContentDelta("one"), ToolCallBegun(0, "c0", "f"), ArgumentsDelta(0, "{}")]
    )
    steps += blocks.push(
        [ToolCallEnded(0), ToolCallBegun(1, "c1", "g"), ArgumentsDelta(1, '{"a'), ToolCallEnded(1, "cut")]
    )
    steps += blocks.push([ContentDelta("t"), ContentDelta("wo")])
    steps += blocks.finish(cut=True)
    assert [(block.kind, block.text, block.complete) for block in blocks.all] == [
        ("thought", "hm", True),
        ("text", "one", True),
        ("call", "{}", True),
        ("call", '{"a', False),
        ("text", "two", False),
    ]
    assert [(step.what, step.block.index) for step in steps if step.what != "grow"] == [
        (what, index) for index in range(5) for what in ("begin", "end")
    ]


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("", {}),
        ('{"a": 1}', {"a": 1}),
        ('{"a": [1, "b', {"a": [1]}),
        ('{"a": nope}', {"INVALID_JSON": '{"a": nope}'}),
        ('{"a": NaN}', {"INVALID_JSON": '{"a": NaN}'}),
        ("[1]", {"INVALID_JSON": "[1]"}),
    ],
)
def test_input_is_an_object_whatever_the_model_wrote(written: str, shown: dict[str, Any]) -> None:
    from ernie45.server.messages import called_input, valid_json

    assert called_input(written) == shown
    assert called_input(valid_json(written)) == shown


# Input


def test_blocks_become_the_turns_of_a_chat(server: Served) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": [CACHED, {"type": "text", "text": "lo"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "a greeting", "signature": "unsigned"},
                {"type": "redacted_thinking", "data": "xyz"},
                {"type": "text", "text": "Hey!"},
                {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}},
                {"type": "tool_use", "id": "c2", "name": "g", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": "one"},
                {"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "two"}], "is_error": True},
                {"type": "text", "text": "More"},
            ],
        },
    ]  # fmt: skip
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    messages = [
        {"role": "system", "content": "Be\nkind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "reasoning_content": "a greeting", "content": "Hey!", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": "Error: two"},
        {"role": "user", "content": "More"},
    ]
    system = [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind."}]
    message = post(server, messages=turns, system=system, max_tokens=16, temperature=0)
    chat = server.post(
        "/v1/chat/completions",
        {"messages": messages, "max_tokens": 16, "temperature": 0, "reasoning_max_tokens": 4},
    ).json()
    usage = message["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == chat["usage"]["prompt_tokens"]
    assert message["content"][0]["thinking"] == chat["choices"][0]["message"]["reasoning_content"]
    assert "".join(block["text"] for block in message["content"][1:]) == chat["choices"][0]["message"]["content"]


def test_a_last_turn_of_the_assistant_is_gone_on_with(plain_server: Served) -> None:
    turns = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "one, two"}]
    body: dict[str, Any] = {"messages": turns, "max_tokens": 5, "temperature": 0}
    message = plain_server.post("/v1/messages", body).json()
    chat = plain_server.post("/v1/chat/completions", {**body, "continue_final_message": True}).json()
    assert message["content"] == [{"type": "text", "text": chat["choices"][0]["message"]["content"]}]


def test_an_omitted_thought_comes_back_in_its_signature(server: Served) -> None:
    shown = post(server)["content"][0]
    assert post(server, thinking={**THINKING, "display": "summarized"})["content"][0] == shown
    hidden = post(server, thinking={**THINKING, "display": "omitted"})["content"][0]
    assert hidden["thinking"] == ""
    call = {"type": "tool_use", "id": "c1", "name": "f", "input": {}}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "1"}]}

    def tokens(*thoughts: dict[str, Any]) -> int:
        return count(server, messages=[USER, {"role": "assistant", "content": [*thoughts, call]}, result])

    assert tokens(shown) == tokens(hidden) > tokens()
    for signature in ("of another server", "ernie45.thought.x", "ernie45.thought._w==", "ernie45.thought.é"):
        assert tokens({**hidden, "signature": signature}) == tokens()


# Fields


def texts(message: dict[str, Any]) -> list[str]:
    return [block.get("thinking") or block.get("text") for block in message["content"]]


def test_sampling_fields_have_an_effect(server: Served) -> None:
    base: dict[str, Any] = {"temperature": 1.0, "max_tokens": 40, "min_tokens": 40}
    answer = texts(post(server, **base))
    assert answer == texts(post(server, **base))
    assert answer != texts(post(server, **base, **{"seed": 9}))
    assert texts(post(server, **base, seed=-1)) != texts(post(server, **base, seed=-1))
    assert texts(post(server, temperature=0, seed=1)) == texts(post(server, temperature=0, seed=2))
    for narrow in ({"top_k": 1}, {"top_p": 0.001}):
        assert texts(post(server, **base, **narrow, seed=1)) == texts(post(server, **base, **narrow, seed=2))


def test_a_stop_sequence_ends_the_message_and_is_named(server: Served) -> None:
    thought, text = texts(post(server, max_tokens=40))
    stop = next(char for char in text[1:] if char not in thought + "</think>\n<response>" + text[0])
    stopped = post(server, max_tokens=40, stop_sequences=["never met", stop])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", stop)
    assert texts(stopped)[-1] == text.split(stop)[0]


def test_a_budget_and_an_effort_end_thoughts(server: Served) -> None:
    fields: dict[str, Any] = {"max_tokens": 30, "min_tokens": 30}
    budget = post(server, thinking={"type": "enabled", "budget_tokens": 7}, **fields)["usage"]
    assert budget["output_tokens_details"]["thinking_tokens"] == 7
    adaptive = post(server, thinking={"type": "adaptive"}, output_config={"effort": "low"}, **fields)
    assert adaptive["content"][0]["type"] == "thinking"


def test_more_tokens_than_the_context_holds_end_with_it(plain_server: Served) -> None:
    turns = [{"role": "user", "content": "x" * 1900}]
    used = plain_server.post("/v1/messages/count_tokens", {"messages": turns}).json()["input_tokens"]
    body = {"messages": turns, "max_tokens": 100_000, "min_tokens": 2048 - used}
    message = plain_server.post("/v1/messages", body).json()
    assert message["stop_reason"] == "model_context_window_exceeded"
    assert message["usage"]["output_tokens"] == 2048 - used


def test_harmless_fields_are_taken_and_unknown_ones_named(server: Served) -> None:
    fields: dict[str, Any] = {
        "metadata": {"user_id": "u"},
        "service_tier": "standard_only",
        "cache_control": {"type": "ephemeral"},
        "diagnostics": {"previous_message_id": None},
        "user_profile_id": "u",
        "workspace_id": "w",
        "speed": "standard",
        "container": None,
        "fancy_new": 1,
    }
    response = ask(server, **fields)
    assert response.status_code == 200, response.text
    assert response.headers["x-ernie45-ignored-fields"] == "fancy_new"


def test_betas_are_ignored_and_said_to_be(client: Any) -> None:
    answer = client.beta.messages.with_raw_response.create(
        model="tiny", messages=[USER], max_tokens=1, betas=["interleaved-thinking-2025-05-14"]
    )
    assert answer.headers["x-ernie45-ignored-fields"] == "anthropic_beta"
    assert answer.parse().usage.output_tokens == 1


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages is []"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role is 'robot'"),
        ({"messages": [{**USER, "name": "x"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "expected a block of type text, image"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text is missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x/y"}}]}]},
            "messages[0]: the chat format ernie_thinking takes no image",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64", "data": "x"}}]}]},
            "messages[0].content[0].source is base64 and needs media_type and data",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]}]},
            "messages[0].content[0] has the type tool_use, which no turn of the user has",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "c"}]}]},
            "messages[1].content[0] has the type tool_result, which no turn of the assistant has",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]}]},
            "messages[1] has tool calls, which are whole: end with a user turn",
        ),
        ({"system": 5}, "system is 5"),
        ({"system": [TEXT] * 1025}, "system is"),
        ({"system": [TEXT] * 1025}, "at most 1024 items"),
        ({"messages": [{"role": "user", "content": [TEXT] * 1025}]}, "messages[0].content is"),
        ({"messages": [USER, {"role": "assistant", "content": [TEXT] * 1025}, USER]}, "at most 1024 items"),
        ({"messages": [{"role": "user", "content": [{**RESULT, "content": [TEXT] * 1025}]}]}, "messages[0].content[0].content is"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema is missing"),
        ({"tools": [{**TOOL, "input_schema": {"type": "array"}}], "tool_choice": FORCED}, "tools[0].input_schema.type is 'array'"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "no"}}, "'no'"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name is None"),
        ({"tools": [TOOL], "tool_choice": {"type": "required"}}, "tool_choice.type is 'required'"),
        ({"tool_choice": {"type": "any"}}, "no tools"),
        ({"thinking": {"type": "disabled"}}, "always thinks"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens is None"),
        ({"thinking": {"type": "adaptive", "budget_tokens": 5}}, "a budget goes with enabled"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens is 0"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort is 'huge'"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "nope"}}}}, "output_config.format.schema"),
        ({"output_format": {"type": "json_schema"}}, "send output_config.format"),
        ({"mcp_servers": [{"name": "x"}]}, "mcp_servers is not supported"),
        ({"container": "c"}, "container is not supported"),
        ({"context_management": {"edits": []}}, "shorten the messages"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type is 'between_tools'"),
        ({"thinking": {"type": "adaptive", "display": "full"}}, "thinking.display is 'full'"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading is True"),
        ({"tools": [{**TOOL, "allowed_callers": ["code_execution_20250825"]}]}, "tools[0].allowed_callers[0] is"),
        ({"inference_geo": "eu"}, "inference_geo is not supported"),
        ({"speed": "fast"}, "speed is not supported"),
        ({"service_tier": "priority"}, "service_tier is not supported"),
        ({"n": 2}, "n is a field of /chat/completions"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_named(server: Served, path: str, fields: dict[str, Any], message: str) -> None:
    response = ask(server, path, **fields)
    assert response.status_code == 400, response.text
    body = response.json()
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert message in body["error"]["message"]
    assert body["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": None}, "max_tokens is None"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": 1.5}, "temperature is 1.5"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": -2}, "top_k is -2"),
        ({"stop_sequences": [""]}, "stop_sequences[0] is ''"),
        ({"stop_sequences": ["x" * 1025]}, "stop_sequences[0] is"),
        ({"stop_sequences": ["x" * 1025]}, "at most 1024 characters"),
        ({"stop_sequences": ["x"] * 65}, "at most 64 items"),
        ({"seed": -2}, "seed is -2"),
        ({"metadata": {"user": "x"}}, "metadata.user"),
        ({"stream": 1}, "stream is 1"),
        ({"thinking": {"type": "enabled", "budget_tokens": 12}}, "max_tokens 12, which leaves nothing"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "context holds 2048"),
    ],
)
def test_what_a_message_cannot_be_asked_for(server: Served, fields: dict[str, Any], message: str) -> None:
    response = ask(server, **fields)
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]


def test_the_number_of_tokens_is_required(server: Served) -> None:
    response = server.post("/v1/messages", {"messages": [USER]})
    assert (response.status_code, response.json()["error"]["message"]) == (400, "max_tokens is missing")


def test_another_version_is_refused(server: Served) -> None:
    headers = {"x-api-key": server.key, "anthropic-version": "2023-01-01"}
    body = {"messages": [USER], "max_tokens": 1, "temperature": 0.5}
    response = httpx.post(f"{server.url}/v1/messages", json=body, headers=headers)
    assert response.status_code == 400
    assert "the server speaks 2023-06-01 and 2026-10-21" in response.json()["error"]["message"]
    for known in ("2023-06-01", "2026-10-21"):
        headers["anthropic-version"] = known
        assert httpx.post(f"{server.url}/v1/messages", json=body, headers=headers).status_code == 200
    assert server.post("/v1/messages", body).status_code == 200  # none named, and a bearer key


def test_the_clients_errors_have_their_classes(server: Served, client: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match="'robot'"):
        client.messages.create(model="tiny", messages=[{"role": "robot", "content": "x"}], max_tokens=1)
    with pytest.raises(anthropic.NotFoundError, match="'tiny'"):
        client.messages.create(model="tinny", messages=[USER], max_tokens=1)
    stranger = anthropic.Anthropic(base_url=server.url, api_key="wrong-key", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError, match="authentication_error"):
        stranger.messages.create(model="tiny", messages=[USER], max_tokens=1)


def test_models_without_tools_and_thinking(plain_server: Served) -> None:
    body: dict[str, Any] = {"messages": [USER], "max_tokens": 4, "min_tokens": 4}
    for thinking in ({"type": "adaptive"}, {"type": "disabled"}, None):
        message = plain_server.post("/v1/messages", {**body, "thinking": thinking}).json()
        assert [block["type"] for block in message["content"]] == ["text"]
    refused = plain_server.post("/v1/messages", {**body, "tools": [TOOL]})
    assert (refused.status_code, "has no tools" in refused.text) == (400, True)


def test_both_routes_are_documented_with_their_errors(server: Served) -> None:
    document = server.get("/openapi.json").json()
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        schema = document["paths"][path]["post"]["responses"]["400"]["content"]["application/json"]["schema"]
        assert schema["$ref"].endswith("/MessageErrorBody")
    assert json.dumps(document).count("max_tokens") > 1
