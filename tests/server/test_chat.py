"""`/chat/completions` of a real server with a small random model: what OpenAI's clients rely on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.served import Served

jsonschema = pytest.importorskip("jsonschema")

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def joined(events: list[Any], index: int = 0) -> dict[str, Any]:
    """The message that a stream adds up to, as a client puts it together."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": {}, "finish_reason": None}
    for event in events:
        for choice in event["choices"] if isinstance(event, dict) else ():
            if choice["index"] != index:
                continue
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls", ()):
                known = message["tool_calls"].setdefault(call["index"], {"name": "", "arguments": ""})
                known["name"] += call["function"].get("name", "")
                known["arguments"] += call["function"].get("arguments", "")
            message["finish_reason"] = choice["finish_reason"] or message["finish_reason"]
    return message


def test_a_whole_answer_has_openais_form(server: Served) -> None:
    answer = server.chat(max_tokens=8, temperature=0)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["role"] == "assistant"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8


@pytest.mark.parametrize(
    "fields", [{}, {"n": 3, "seed": 4}, {"max_streaming_response_tokens": 5}, {"stop": ["a", "é"]}]
)
def test_a_stream_adds_up_to_the_whole_answer(server: Served, fields: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 40, "temperature": 1.0, "seed": 3} | fields
    whole = server.post("/v1/chat/completions", body).json()
    events = server.events("/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    for key in ("prompt_tokens", "completion_tokens", "total_tokens", "completion_tokens_details"):
        assert events[-2]["usage"][key] == whole["usage"][key]
    for choice in whole["choices"]:
        message = joined(events[:-1], choice["index"])
        assert message["content"] == choice["message"]["content"]
        assert message["reasoning_content"] == choice["message"].get("reasoning_content", "")
        assert message["finish_reason"] == choice["finish_reason"]


def test_a_stream_begins_with_the_role_and_has_no_chunk_without_choices(server: Served) -> None:
    events = server.events("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6})
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(event["choices"] for event in events[:-1])
    assert len({event["id"] for event in events[:-1]}) == 1


def test_each_choice_of_a_stream_ends_with_its_reason_alone(server: Served) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "n": 2, "logprobs": True, "seed": 1}
    choices = [event["choices"][0] for event in server.events("/v1/chat/completions", body)[:-1]]
    for index in (0, 1):
        *before, end = (choice for choice in choices if choice["index"] == index)
        assert (end["delta"], end["finish_reason"], end["logprobs"]) == ({}, "length", None)
        assert {choice["finish_reason"] for choice in before} == {None}
        assert sum(len(choice["logprobs"]["content"]) for choice in before if choice["logprobs"]) == 6


def test_seeds_repeat_and_temperature_zero_is_greedy(server: Served) -> None:
    def text(**fields: Any) -> str:
        message = server.chat(max_tokens=24, **fields)["choices"][0]["message"]
        return str(message.get("reasoning_content", "")) + str(message["content"])

    assert text(seed=5, temperature=1.5) == text(seed=5, temperature=1.5)
    assert text(seed=5, temperature=1.5) != text(seed=6, temperature=1.5)
    assert text(seed=-1, temperature=1.5) != text(seed=-1, temperature=1.5)
    assert text(temperature=0, seed=1) == text(temperature=0, seed=2)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_forced_calls_are_valid(server: Served, choice: Any, stream: bool) -> None:
    body = {
        "messages": [{"role": "user", "content": "Weather?"}],
        "tools": [TOOL],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "reasoning_max_tokens": 4,
        "max_tokens": 400,
        "seed": 2,
    }
    if stream:
        message = joined(server.events("/v1/chat/completions", body))
        (call,) = message["tool_calls"].values()
        reason = message["finish_reason"]
    else:
        (answer,) = server.post("/v1/chat/completions", body).json()["choices"]
        (found,) = answer["message"]["tool_calls"]
        call, reason = found["function"], answer["finish_reason"]
    assert reason == "tool_calls"
    assert call["name"] == "get_weather"
    jsonschema.validate(json.loads(call["arguments"]), TOOL["function"]["parameters"])


@pytest.mark.parametrize("parallel", [False, True])
def test_a_call_that_was_cut_says_so(server: Served, parallel: bool) -> None:
    body = {
        "messages": [{"role": "user", "content": "Weather?"}],
        "tools": [TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": parallel,
        "reasoning_max_tokens": 2,
        "max_tokens": 75,
        "seed": 2,
    }
    (choice,) = server.post("/v1/chat/completions", body).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    with pytest.raises(json.JSONDecodeError):
        json.loads(call["function"]["arguments"])
    assert choice["finish_reason"] == "length"
    assert joined(server.events("/v1/chat/completions", body))["finish_reason"] == "length"


def test_a_strict_schema_without_properties_gives_empty_arguments(server: Served) -> None:
    empty = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "transfer_to_billing", "strict": True, "parameters": empty}}
    body: dict[str, Any] = {"tools": [tool], "tool_choice": "required", "reasoning_max_tokens": 2, "max_tokens": 300}
    answer = server.chat("Bill?", **body, parallel_tool_calls=False)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {}
    assert answer["choices"][0]["message"]["content"] is None
    turns = [
        {"role": "user", "content": "Bill?"},
        answer["choices"][0]["message"],
        {"role": "tool", "tool_call_id": call["id"], "content": "{}"},
    ]
    again = server.post("/v1/chat/completions", {"messages": turns, "max_tokens": 4, "tools": [tool]})
    assert again.status_code == 200, again.text


def test_legacy_functions_get_a_legacy_call(server: Served) -> None:
    answer = server.chat(
        functions=[TOOL["function"]],
        function_call={"name": "get_weather"},
        reasoning_max_tokens=2,
        max_tokens=300,
        seed=1,
    )
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"]["name"] == "get_weather"


def test_answers_keep_to_a_schema(server: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "id": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["ok", "id"],
        "additionalProperties": False,
    }
    spellings: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}},
        {"guided_json": schema},
        {"structured_outputs": {"json": schema}},
    ]
    for fields in spellings:
        (choice,) = server.chat(**fields, reasoning_max_tokens=3, max_tokens=300, seed=9)["choices"]
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)


def test_tools_and_a_schema_together_give_either(server: Served) -> None:
    """As agents with tools and a typed result ask for: every answer is a call or the result, whichever the model prefers."""
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    answer = server.chat(
        tools=[{**TOOL, "function": {**TOOL["function"], "strict": True}}],
        response_format={"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}},
        reasoning_max_tokens=2,
        max_tokens=300,
        n=12,
        seed=3,
        parallel_tool_calls=False,
    )
    kinds = set()
    for choice in answer["choices"]:
        kinds.add(choice["finish_reason"])
        if choice["finish_reason"] == "tool_calls":
            (call,) = choice["message"]["tool_calls"]
            jsonschema.validate(json.loads(call["function"]["arguments"]), TOOL["function"]["parameters"])
        else:
            jsonschema.validate(json.loads(choice["message"]["content"]), schema)
    assert kinds == {"tool_calls", "stop"}


def test_log_probabilities_have_openais_form(server: Served) -> None:
    (choice,) = server.chat(max_tokens=3, logprobs=True, top_logprobs=2, temperature=0)["choices"]
    entries = choice["logprobs"]["content"]
    assert len(entries) == 3
    for entry in entries:
        assert len(entry["top_logprobs"]) == 2
        assert entry["logprob"] == pytest.approx(entry["top_logprobs"][0]["logprob"])
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]


def test_thoughts_are_apart_and_can_be_left_out(server: Served) -> None:
    fields: dict[str, Any] = {"reasoning_max_tokens": 5, "min_tokens": 8, "max_tokens": 30, "temperature": 0}
    message = server.chat(**fields)["choices"][0]["message"]
    assert message["reasoning_content"] == message["reasoning"] != ""
    hidden = server.chat(**fields, include_reasoning=False)
    assert "reasoning_content" not in hidden["choices"][0]["message"]
    assert hidden["choices"][0]["message"]["content"] == message["content"]
    assert hidden["usage"]["completion_tokens_details"]["reasoning_tokens"] == 5


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_thinking": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"options": {"thinking_mode": "close"}}},
        {"metadata": {"enable_thinking": "false"}},
        {"reasoning_effort": "none"},
    ],
)
def test_thinking_that_cannot_be_switched_off_is_refused(server: Served, fields: dict[str, Any]) -> None:
    response = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], **fields})
    assert response.status_code == 400
    assert "always thinks" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "messages is []"),
        ({"temperature": 1000}, "temperature", "less than or equal to 100"),
        ({"top_p": 0}, "top_p", "top_p is 0"),
        ({"n": 17}, "n", "the limit is 16"),
        ({"n": 10**9}, "n", "n is 1000000000"),
        ({"stop": ["x"] * 65}, "stop", "at most 64"),
        ({"stop": ["x" * 1025]}, "stop[0]", "at most 1024 characters"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 1025}]},
            None,
            "at most 1024 items",
        ),
        ({"max_tokens": 2**63}, "max_tokens", "max_tokens is 9223372036854775808"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "holds id 999999"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice", "'no'"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "not supported"),
        ({"store": True}, "store", "not supported"),
        ({"audio": {"voice": "x"}}, "audio", "not supported"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs is not true"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "differ"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "expected text, json_object or json_schema"),
        ({"guided_regex": "("}, "guided_regex", "cannot be used"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, None, "exclude each other"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            None,
            "image",
        ),
        ({"messages": [{"role": "user", "content": "x", "bogus": 1}]}, "messages[0]", "unknown field 'bogus'"),
    ],
)
def test_what_cannot_be_honoured_is_named(
    server: Served, fields: dict[str, Any], param: str | None, message: str
) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, **fields}
    if fields.get("max_tokens") == 3:
        body["max_tokens"] = 3
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param


def test_unknown_fields_are_accepted_with_a_warning(server: Served) -> None:
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 1,
        "fancy_new": 1,
        "user": "u",
        "store": False,
    }
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 200
    assert response.headers["x-ernie45-ignored-fields"] == "fancy_new"


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(server: Served) -> None:
    response = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 3000}]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "2048" in error["message"]
    assert "is longer than the model's context length" in error["message"]  # by which litellm knows it
    near = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2048})
    assert near.json()["error"]["code"] == "context_length_exceeded"


def test_the_same_prompt_is_found_in_the_cache(server: Served) -> None:
    first = server.chat("cached " * 20, max_tokens=1)["usage"]
    second = server.chat("cached " * 20, max_tokens=1)["usage"]
    assert first["prompt_tokens"] == second["prompt_tokens"]
    assert second["prompt_tokens_details"]["cached_tokens"] >= second["prompt_tokens"] - 17
    other = server.chat("cached " * 20, max_tokens=1, cache_salt="other")["usage"]
    assert other["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_message_can_be_continued(plain_server: Served) -> None:
    turns = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "one, two"}]
    body: dict[str, Any] = {"messages": turns, "continue_final_message": True, "max_tokens": 3, "temperature": 0}
    rendered = plain_server.post("/v1/chat/completions/render", body).json()
    assert rendered["prompt"].endswith("one, two")
    answer = plain_server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    echoed = plain_server.post("/v1/chat/completions", {**body, "echo": True}).json()
    assert echoed["choices"][0]["message"]["content"] == "one, two" + answer


def test_tools_for_a_model_without_them_are_refused(plain_server: Served) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [TOOL]}
    response = plain_server.post("/v1/chat/completions", body)
    assert response.status_code == 400
    assert "has no tools" in response.json()["error"]["message"]


def test_all_prefixes_lead_to_the_same_routes(server: Served) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "temperature": 0}
    answers = [server.post(f"{prefix}/chat/completions", body).json() for prefix in ("/v1", "/v3/openai", "/openai/v1")]
    assert answers[0]["choices"] == answers[1]["choices"] == answers[2]["choices"]


def test_models_by_any_name(server: Served) -> None:
    listed = server.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["tiny", "baidu/ERNIE-4.5-Tiny"]
    assert listed[0]["capabilities"] == ["thinking", "tools"]
    assert server.get("/v1/models/baidu/ERNIE-4.5-Tiny").json()["max_model_len"] == 2048
    assert server.chat(model="BAIDU/ernie-4.5-tiny", max_tokens=1)["model"] == "tiny"
    missing = server.post("/v1/chat/completions", {"model": "tinny", "messages": [{"role": "user", "content": "x"}]})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert "'tiny'" in missing.json()["error"]["message"]


def test_a_refused_request_leaves_its_connection_open(server: Served) -> None:
    connected: list[str] = []

    def note(event: str, info: Any) -> None:
        if event == "connection.connect_tcp.complete":
            connected.append(event)

    before = len(server.log)
    with server.client() as client:
        for fields in ({}, {"max_tokens": 0}, {"logit_bias": {"999999": 1}}, {}):
            body = {"messages": [{"role": "user", "content": "x" * 4000}], "max_tokens": 1, **fields}
            refused = client.post("/v1/chat/completions", json=body, extensions={"trace": note})
            assert refused.status_code == 400
    assert len(connected) == 1
    assert not any("Traceback" in line for line in server.log[before:])


def test_a_conversation_may_hold_what_other_programs_put_into_it(server: Served) -> None:
    call = {
        "id": "c1",
        "index": 0,
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "x"}'},
    }
    text = {"type": "text", "text": "Weather?", "cache_control": {"type": "ephemeral"}}
    answer = {"role": "assistant", "content": None, "refusal": None, "annotations": [{"type": "url_citation"}]}
    turns = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [text]},
        {**answer, "parsed": {"x": 1}, "provider_specific_fields": {"refusal": None}, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "name": "get_weather", "content": [{"type": "text", "text": "sunny"}]},
    ]
    response = server.post("/v1/chat/completions", {"messages": turns, "tools": [TOOL], "max_tokens": 1})
    assert response.status_code == 200, response.text
