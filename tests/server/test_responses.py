"""`/responses` of a real server with a small random model, asked by OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pydantic
import pytest

from tests.server.served import Served

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: pip install ernie45[test]")
openai = pytest.importorskip("openai", reason="openai is not installed: pip install ernie45[test]")

TOOL: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CALL: dict[str, Any] = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c1"}
TEXT = {"type": "input_text", "text": "x"}
THOUGHT: dict[str, Any] = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "http://x/y.png"}]}
UNKNOWN = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "no"}]}
ARRAY = {**TOOL, "parameters": {"type": "array"}}
SHORT: dict[str, Any] = {"reasoning_max_tokens": 4, "seed": 3}
"""Fields beyond OpenAI's, which keep thoughts short and answers equal."""


class City(pydantic.BaseModel):
    name: pydantic.constr(max_length=5)  # type: ignore[valid-type]  # pydantic's short form
    large: bool


@pytest.fixture
def client(server: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as made:
        yield made


def post(server: Served, **fields: Any) -> dict[str, Any]:
    body = {"input": "Hi", "max_output_tokens": 12, **SHORT, **fields}
    response = server.post("/v1/responses", body, verify=False)  # no certificates to load
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def comparable(response: dict[str, Any]) -> dict[str, Any]:
    """A response without ids and times, which differ between equal ones; and without what the cache knew."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            drop = ("id", "call_id", "created_at", "completed_at", "input_tokens_details")
            return {key: plain(one) for key, one in value.items() if key not in drop}
        return [plain(one) for one in value] if isinstance(value, list) else value

    found: dict[str, Any] = plain(response)
    return found


def check_order(events: list[dict[str, Any]]) -> None:
    """Insist on the documented sequence: numbered; an item begins, its part grows, both end; then the next item."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    follows = {
        "response.in_progress": {"response.output_item.added", "END"},
        "response.output_item.added": {"PART.added", "TEXT.delta", "TEXT.done"},
        "PART.added": {"TEXT.delta", "TEXT.done"},
        "TEXT.delta": {"TEXT.delta", "TEXT.done"},
        "TEXT.done": {"PART.done", "response.output_item.done"},
        "PART.done": {"response.output_item.done"},
        "response.output_item.done": {"response.output_item.added", "END"},
    }

    def kind(event: dict[str, Any]) -> str:
        name: str = event["type"]
        for part in ("content_part", "reasoning_summary_part"):
            name = name.replace(f"response.{part}", "PART")
        for text in ("output_text", "reasoning_text", "reasoning_summary_text", "function_call_arguments"):
            name = name.replace(f"response.{text}", "TEXT")
        return "END" if name in ("response.completed", "response.incomplete") else name

    for before, after in pairwise(events[1:]):
        assert kind(after) in follows[kind(before)], (before["type"], after["type"])
    final = events[-1]["response"]["output"]
    texts: dict[int, str] = {}
    for event in events:
        if event["type"] == "response.output_item.added":
            assert event["output_index"] == len(texts)
            texts[event["output_index"]] = ""
        elif "item_id" in event:
            assert event["item_id"] == final[event["output_index"]]["id"]
        if event["type"].endswith(".delta"):
            texts[event["output_index"]] += event["delta"]
        if event["type"].endswith(("_text.done", "_arguments.done")):
            assert event.get("text", event.get("arguments")) == texts[event["output_index"]]
        if event["type"] == "response.output_item.done":
            assert event["item"] == final[event["output_index"]]


# Whole answers


def test_a_response_has_openais_form(client: Any) -> None:
    response = client.responses.create(
        model="tiny",
        input="Hello",
        instructions="Be brief.",
        max_output_tokens=20,
        temperature=0.5,
        top_p=0.9,
        metadata={"run": "7"},
        extra_body={**SHORT, "min_tokens": 20},
    )
    assert response.id.startswith("resp_")
    assert (response.object, response.model, response.status) == ("response", "tiny", "incomplete")
    assert response.incomplete_details.reason == "max_output_tokens"
    assert (response.temperature, response.top_p, response.max_output_tokens) == (0.5, 0.9, 20)
    assert (response.instructions, response.metadata) == ("Be brief.", {"run": "7"})
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].type == "reasoning_text"
    assert response.output[0].status == "completed"
    assert response.output[1].status == "incomplete"
    assert response.output_text == response.output[1].content[0].text != ""
    assert response.usage.output_tokens == 20
    assert response.usage.output_tokens_details.reasoning_tokens == 4
    assert response.usage.total_tokens == response.usage.input_tokens + 20


def test_the_input_tokens_that_were_cached_are_told(server: Served) -> None:
    first = post(server, input="cached again " * 12, max_output_tokens=1)["usage"]
    second = post(server, input="cached again " * 12, max_output_tokens=1)["usage"]
    assert second["input_tokens"] == first["input_tokens"]
    assert second["input_tokens_details"]["cached_tokens"] >= second["input_tokens"] - 17


@pytest.mark.parametrize("fields", [{}, {"instructions": "Be kind.", "tools": [TOOL]}])
def test_tokens_of_an_input_are_counted(client: Any, fields: dict[str, Any]) -> None:
    counted = client.responses.input_tokens.count(model="tiny", input="Hello there", **fields)
    used = client.responses.create(model="tiny", input="Hello there", max_output_tokens=1, **fields).usage
    assert counted.input_tokens == used.input_tokens


def test_parsed_text_is_an_object_of_the_class(client: Any) -> None:
    response = client.responses.parse(
        model="tiny", input="A city?", text_format=City, max_output_tokens=200, extra_body=SHORT
    )
    assert response.status == "completed"
    assert isinstance(response.output_parsed, City)
    assert response.text.format.name == "City"


def test_json_object_gives_an_object(server: Served) -> None:
    # Random weights hardly ever close one in time: that the text begins as one must do.
    response = post(server, text={"format": {"type": "json_object"}}, max_output_tokens=40)
    text = response["output"][-1]["content"][0]["text"]
    assert text.lstrip().startswith("{")
    assert response["text"] == {"format": {"type": "json_object"}}


# Streams


@pytest.mark.parametrize(
    "fields",
    [
        {"max_output_tokens": 40},
        {"max_output_tokens": 2},
        {"reasoning": {"summary": "auto"}, "max_output_tokens": 30},
        {"include": ["reasoning.encrypted_content"]},
        {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 400},
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "get_weather"}, "max_output_tokens": 24},
        {
            "text": {"format": {"type": "json_schema", "name": "c", "schema": City.model_json_schema()}},
            "max_output_tokens": 200,
        },
    ],
    ids=["text", "cut-thought", "summary", "opaque", "call", "cut-call", "schema"],
)
def test_a_stream_keeps_the_order_and_adds_up_to_the_whole(server: Served, fields: dict[str, Any]) -> None:
    body = {"input": "Hi", "max_output_tokens": 12, **SHORT, **fields}
    events = server.events("/v1/responses", body)
    check_order(events)
    streamed, whole = comparable(events[-1]["response"]), comparable(post(server, **body))
    if whole["parallel_tool_calls"] is False:  # the engine is a token or two ahead when the one call ends the answer
        del streamed["usage"], whole["usage"]
    assert streamed == whole


def test_the_clients_accumulator_takes_streams(client: Any) -> None:
    with client.responses.stream(
        model="tiny", input="A city?", text_format=City, max_output_tokens=200, extra_body=SHORT
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == final.output_text
    assert isinstance(final.output_parsed, City)
    assert final.output_parsed == City.model_validate_json(deltas)


# Tools


def test_a_call_goes_round(client: Any) -> None:
    turns: list[Any] = [{"role": "user", "content": "Weather?"}]
    fields: dict[str, Any] = {"model": "tiny", "tools": [TOOL], "extra_body": SHORT}
    first = client.responses.create(
        input=turns, tool_choice="required", parallel_tool_calls=False, max_output_tokens=400, **fields
    )
    assert first.status == "completed"
    assert [item.type for item in first.output] == ["reasoning", "function_call"]
    call = first.output[-1]
    assert call.name == "get_weather"
    jsonschema.validate(json.loads(call.arguments), TOOL["parameters"])
    assert first.tools[0].name == "get_weather"
    turns += first.output
    turns.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    second = client.responses.create(input=turns, max_output_tokens=8, **fields)
    assert second.usage.input_tokens > first.usage.input_tokens


def test_only_allowed_tools_are_called(server: Served) -> None:
    other = {**TOOL, "name": "get_time"}
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_time"}]}
    response = post(server, tools=[TOOL, other], tool_choice=choice, parallel_tool_calls=False, max_output_tokens=400)
    (call,) = [item for item in response["output"] if item["type"] == "function_call"]
    assert call["name"] == "get_time"
    assert [tool["name"] for tool in response["tools"]] == ["get_weather", "get_time"]


def test_no_tools_are_told_where_none_may_be_called(server: Served) -> None:
    assert (
        post(server, tools=[TOOL], tool_choice="none")["usage"]["input_tokens"] == post(server)["usage"]["input_tokens"]
    )


# Input


def test_items_become_the_turns_of_a_chat(server: Served) -> None:
    items: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be kind."},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "Hel"}, {"type": "input_text", "text": "lo"}],
        },
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "a greeting"}],
        },
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hey", "annotations": []}, {"type": "refusal", "refusal": "!"}],
        },
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "c1",
            "name": "f",
            "arguments": '{"x": 1}',
            "status": "completed",
        },
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "More"},
    ]
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    messages = [
        {"role": "system", "content": "Always."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "reasoning_content": "a greeting", "content": "Hey!", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "More"},
    ]
    body = {"input": items, "instructions": "Always.", "max_output_tokens": 16, "temperature": 0, **SHORT}
    answer = server.post("/v1/responses", body)
    assert answer.status_code == 200, answer.text
    chat = server.post(
        "/v1/chat/completions", {"messages": messages, "max_tokens": 16, "temperature": 0, **SHORT}
    ).json()
    found = {item["type"]: item["content"][0]["text"] for item in answer.json()["output"]}
    assert answer.json()["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert found["reasoning"] == chat["choices"][0]["message"]["reasoning_content"]
    assert found.get("message", "") == chat["choices"][0]["message"]["content"]


@pytest.mark.parametrize("form", ["content", "summary", "encrypted_content"])
def test_thoughts_come_back_in_any_form(server: Served, form: str) -> None:
    forms: dict[str, dict[str, Any]] = {
        "content": {},
        "summary": {"reasoning": {"summary": "detailed"}},
        "encrypted_content": {"include": ["reasoning.encrypted_content"]},
    }
    given = post(server, **forms[form])["output"][0]
    assert given["type"] == "reasoning"
    if form == "encrypted_content":
        given = {"type": "reasoning", "id": given["id"], "summary": [], "encrypted_content": given["encrypted_content"]}
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c1", "output": "1"}
    user = {"role": "user", "content": "Hi"}
    with_it = post(server, input=[user, given, call, output], max_output_tokens=1)["usage"]["input_tokens"]
    without = post(server, input=[user, call, output], max_output_tokens=1)["usage"]["input_tokens"]
    assert with_it > without


# Fields


def texts(response: dict[str, Any]) -> list[str]:
    return [item.get("arguments") or item["content"][0]["text"] for item in response["output"]]


def test_seed_temperature_top_p_and_stop_have_an_effect(server: Served) -> None:
    base: dict[str, Any] = {"temperature": 1.5, "max_output_tokens": 40}
    answer = texts(post(server, **base))
    assert answer == texts(post(server, **base))
    assert answer != texts(post(server, **base, **{"seed": 9}))
    assert texts(post(server, temperature=0, seed=1)) == texts(post(server, temperature=0, seed=2))
    assert texts(post(server, **base, top_p=0.001, seed=1)) == texts(post(server, **base, top_p=0.001, seed=2))
    thought, text = answer
    stop = next(char for char in text[1:] if char not in thought + "</think>\n<response>" + text[0])
    stopped = post(server, **base, stop=[stop, "never met"])
    assert stopped["status"] == "completed"
    assert texts(stopped)[-1] == text.split(stop)[0]
    assert texts(post(server, **base, seed=-1)) != texts(post(server, **base, seed=-1))


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"min_p": 1.0}])
def test_fields_of_chat_that_narrow_the_choice(server: Served, fields: dict[str, Any]) -> None:
    base = {"temperature": 1.5, "max_output_tokens": 30, **fields}
    assert texts(post(server, **base, **{"seed": 1})) == texts(post(server, **base, **{"seed": 2}))


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_fields_of_chat_that_penalize(server: Served, name: str) -> None:
    base = {"temperature": 0, "max_output_tokens": 60, "min_tokens": 60}
    assert texts(post(server, **base, **{name: 2})) != texts(post(server, **base))


def test_another_cache_salt_finds_nothing_cached(server: Served) -> None:
    def cached(**fields: Any) -> int:
        usage = post(server, input="salted again " * 12, max_output_tokens=1, **fields)["usage"]
        return int(usage["input_tokens_details"]["cached_tokens"])

    cached()
    assert cached() > 0 == cached(cache_salt="of this test alone")


def test_thoughts_can_be_summaries(server: Served) -> None:
    plain, summed = post(server), post(server, reasoning={"summary": "auto", "effort": "low"})
    assert summed["output"][0]["summary"][0]["text"] == plain["output"][0]["content"][0]["text"]
    assert "content" not in summed["output"][0]
    assert summed["reasoning"] == {"effort": "low", "summary": "auto"}
    older = post(server, reasoning={"generate_summary": "detailed", "context": "auto", "mode": "standard"})
    assert older["output"][0]["summary"] == summed["output"][0]["summary"]


def test_a_limit_on_thoughts_ends_them(server: Served) -> None:
    usage = post(server, reasoning_max_tokens=7, max_output_tokens=20, min_tokens=20)["usage"]
    assert usage["output_tokens_details"]["reasoning_tokens"] == 7


def test_harmless_fields_are_taken_and_unknown_ones_named(server: Served) -> None:
    fields = {
        "store": True,
        "background": False,
        "truncation": "disabled",
        "previous_response_id": None,
        "service_tier": "auto",
        "user": "u",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "stream_options": {"include_obfuscation": False},
        "include": ["file_search_call.results"],
        "text": {"verbosity": "medium"},
        "fancy_new": 1,
    }
    response = server.post("/v1/responses", {"input": "Hi", "max_output_tokens": 1, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["x-ernie45-ignored-fields"] == "fancy_new"
    assert response.json()["store"] is False


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": None}, "input", "input is None"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0]", "function_call_output or reasoning"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "expected an item of type message"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input[0].content[0]", "a part of type"),
        ({"input": [IMAGE]}, None, "input[0]: the chat format ernie_thinking takes no image"),
        ({"input": [THOUGHT, CALL, {**CALL, "arguments": "{"}]}, None, "input[2].arguments is no JSON"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments", "input[0].arguments is missing"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "input is []"),
        ({"input": [{**CALL, "name": ""}]}, None, "input[0] needs a name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "tools[0].type is 'web_search'"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading", "defer_loading is True"),
        ({"tools": [ARRAY], "tool_choice": "required"}, None, "tools[0].parameters.type is 'array'"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "no"}}, "tool_choice", "'no'"),
        ({"tools": [TOOL], "tool_choice": UNKNOWN}, "tool_choice.tools", "'no'"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice", "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "text.format.type is 'xml'"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format", "text.format needs a schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nope"}}}}, None, "text.format.schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "verbosity is 'low'"),
        ({"reasoning": {"effort": "none"}}, None, "always thinks"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "'huge'"),
        ({"reasoning": {"summary": "concise"}}, "reasoning.summary", "'concise'"),
        ({"reasoning": {"context": "all_turns"}}, "reasoning.context", "'all_turns'"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode", "'pro'"),
        ({"reasoning": {"max_tokens": 5}}, "reasoning.max_tokens", "not permitted"),
        ({"metadata": {"enable_thinking": "false"}}, None, "always thinks"),
        ({"reasoning_max_tokens": -1}, "reasoning_max_tokens", "is -1"),
        ({"stop": [""]}, "stop[0]", "stop[0] is ''"),
        ({"stop": ["x" * 1025]}, "stop[0]", "at most 1024 characters"),
        ({"stop": "x" * 1025}, "stop", "at most 1024 characters"),
        ({"stop": ["x"] * 65}, "stop", "at most 64 items"),
        ({"input": [{"role": "user", "content": [TEXT] * 1025}]}, "input[0].content", "at most 1024 items"),
        ({"input": [CALL, {**RESULT, "output": [TEXT] * 1025}]}, "input[1].output", "at most 1024 items"),
        ({"input": [{**THOUGHT, "summary": [THOUGHT["summary"][0]] * 1025}]}, "input[0].summary", "at most 1024 items"),
        ({"input": [{**THOUGHT, "content": [THOUGHT["summary"][0]] * 1025}]}, "input[0].content", "at most 1024 items"),
        ({"top_k": -2}, "top_k", "top_k is -2"),
        ({"min_p": 2}, "min_p", "min_p is 2"),
        ({"min_tokens": -1}, "min_tokens", "min_tokens is -1"),
        ({"presence_penalty": 3}, "presence_penalty", "is 3"),
        ({"frequency_penalty": 3}, "frequency_penalty", "is 3"),
        ({"repetition_penalty": 0}, "repetition_penalty", "is 0"),
        ({"cache_salt": ""}, "cache_salt", "cache_salt is ''"),
        ({"image": {"context_compression": "auto"}}, "image", "not supported"),
        ({"access_programs": {"cyber": "standard"}}, "access_programs", "not supported"),
        ({"background_options": {}}, "background_options", "not supported"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens is 0"),
        ({"max_output_tokens": 5000}, None, "max_output_tokens is 5000"),
        ({"temperature": 3}, "temperature", "temperature is 3"),
        ({"top_p": 0}, "top_p", "top_p is 0"),
        ({"include": ["message.output_text.logprobs"]}, "include[0]", "include[0] is 'message.output_text.logprobs'"),
        ({"metadata": {"x": 1}}, "metadata.x", "metadata.x is 1"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls", "'yes'"),
        ({"instructions": 5}, "instructions", "instructions is 5"),
        ({"stream": "yes"}, "stream", "'yes'"),
        ({"seed": -2}, "seed", "seed is -2"),
        ({"priority": 5000}, "priority", "priority is 5000"),
        ({"top_logprobs": 3}, "top_logprobs", "/chat/completions has"),
        ({"truncation": "auto"}, "truncation", "shorten the input"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored here"),
        ({"conversation": "conv_1"}, "conversation", "nothing is stored here"),
        ({"background": True}, "background", "use stream"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "instructions"),
        ({"context_management": [{"type": "compaction"}]}, "context_management", "shorten the input"),
        ({"service_tier": "priority"}, "service_tier", "not supported"),
        ({"moderation": {"model": "m"}}, "moderation", "not supported"),
        ({"n": 2}, "n", "a field of /chat/completions"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_named(
    server: Served, fields: dict[str, Any], param: str | None, message: str
) -> None:
    response = server.post("/v1/responses", {"input": "Hi", "max_output_tokens": 2, **fields}, verify=False)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param


def test_nothing_is_stored(client: Any) -> None:
    kept = client.responses.create(model="tiny", input="Hi", max_output_tokens=1, store=True)
    for ask in (
        client.responses.retrieve,
        client.responses.delete,
        client.responses.cancel,
        client.responses.input_items.list,
    ):
        with pytest.raises(openai.NotFoundError, match="this server stores none"):
            ask(kept.id)


def test_the_clients_errors_have_their_classes(server: Served, client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(model="tiny", input="Hi", previous_response_id="resp_1")
    assert (bad.value.param, bad.value.code) == ("previous_response_id", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError, match="'tiny'"):
        client.responses.create(model="tinny", input="Hi")
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong-key", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.responses.create(model="tiny", input="Hi")


def test_models_without_tools_and_thinking(plain_server: Served) -> None:
    body = {"input": "Hi", "max_output_tokens": 4, "min_tokens": 4, "reasoning": {"effort": "low", "summary": "auto"}}
    answer = plain_server.post("/v1/responses", body).json()
    assert [item["type"] for item in answer["output"]] == ["message"]
    refused = plain_server.post("/v1/responses", {"input": "Hi", "tools": [TOOL]})
    assert (refused.status_code, "has no tools" in refused.text) == (400, True)


def test_all_prefixes_lead_here(server: Served) -> None:
    for prefix in ("/v3/openai", "/openai/v1"):
        assert server.post(f"{prefix}/responses", {"input": "Hi", "max_output_tokens": 1}).status_code == 200
