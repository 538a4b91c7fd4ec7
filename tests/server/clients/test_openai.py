"""The `openai` package for Python against a real server: every call, every error class, retries, raw headers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.server.served import Served

openai = pytest.importorskip("openai")

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
SHORT_THOUGHT = {"reasoning_max_tokens": 2}
"""The model is random: without a budget it might think until the context ends."""
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
WEATHER["function"]["parameters"]["properties"]["days"] |= {"minimum": 1, "maximum": 9}


class Ticket(BaseModel):
    """What the model is made to write."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["bill", "fault", "praise"]
    urgent: bool
    priority: int = Field(ge=1, le=5)


@pytest.fixture
def client(environment: Served) -> Any:
    """Made of the environment alone."""
    with openai.OpenAI(max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def narrow(start: Callable[..., Served]) -> Served:
    """A server that refuses early, and whose engine may be killed."""
    return start("ernie", "--max-model-len", "2048", "--max-body", "32KiB", "--concurrent-requests", "1")


def test_chat_whole_and_streamed_are_equal(client: Any) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 40, "seed": 7, "temperature": 0.9}
    fields["extra_body"] = {"min_tokens": 40, "reasoning_max_tokens": 8}
    whole = client.chat.completions.create(**fields)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.refusal is None
    assert whole.usage.completion_tokens == 40
    chunks = list(client.chat.completions.create(**fields, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage is None
    thoughts = "".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks)
    assert thoughts == whole.choices[0].message.reasoning_content != ""


def test_the_stream_helper_puts_the_answer_together(client: Any) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 90, "seed": 3, "logprobs": True}
    fields["extra_body"] = {"guided_choice": ["Yes, gladly.", "No."], **SHORT_THOUGHT}
    with client.chat.completions.stream(**fields, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "logprobs.content.delta"} <= kinds
    whole = client.chat.completions.create(**fields)
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.usage.total_tokens == whole.usage.total_tokens
    assert len(final.choices[0].logprobs.content) == whole.usage.completion_tokens


def test_a_tool_is_called_and_its_result_taken(client: Any) -> None:
    asked: list[Any] = [{"role": "system", "content": "Help."}, {"role": "user", "content": "Weather in Rome?"}]
    fields: dict[str, Any] = {"model": "tiny", "tools": [WEATHER], "seed": 5, "extra_body": SHORT_THOUGHT}
    answer = client.chat.completions.create(
        **fields, messages=asked, tool_choice="required", parallel_tool_calls=False, max_tokens=300
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    turns = [*asked, choice.message, {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 21}'}]
    again = client.chat.completions.create(**fields, messages=turns, tool_choice="none", max_tokens=20)
    assert not again.choices[0].message.tool_calls
    assert again.choices[0].finish_reason in ("stop", "length")


def test_the_stream_helper_parses_a_call(client: Any) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    with client.chat.completions.stream(
        model="tiny",
        messages=HELLO,
        tools=[WEATHER],
        tool_choice=named,
        max_tokens=300,
        seed=11,
        extra_body=SHORT_THOUGHT,
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion()
    (event,) = done
    (call,) = final.choices[0].message.tool_calls
    assert event.name == call.function.name == "get_weather"
    assert event.parsed_arguments == call.function.parsed_arguments == json.loads(call.function.arguments)
    assert final.choices[0].finish_reason == "tool_calls"


def test_parse_gives_an_object(client: Any) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": HELLO, "response_format": Ticket, "max_tokens": 300}
    answer = client.chat.completions.parse(**fields, seed=1, extra_body=SHORT_THOUGHT)
    ticket = answer.choices[0].message.parsed
    assert isinstance(ticket, Ticket)
    assert ticket == Ticket.model_validate_json(answer.choices[0].message.content)
    with client.chat.completions.stream(**fields, seed=1, extra_body=SHORT_THOUGHT) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == ticket


def test_parse_says_that_an_answer_was_cut(client: Any) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model="tiny", messages=HELLO, response_format=Ticket, max_tokens=5, extra_body=SHORT_THOUGHT
        )


def test_pydantic_tools_come_back_parsed(client: Any) -> None:
    answer = client.chat.completions.parse(
        model="tiny",
        messages=HELLO,
        tools=[openai.pydantic_function_tool(Ticket, name="open_ticket")],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=300,
        extra_body=SHORT_THOUGHT,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Ticket)
    # The package's own fields, `parsed` and `parsed_arguments`, come back with the message.
    turns = [*HELLO, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "opened"}]
    assert client.chat.completions.create(model="tiny", messages=turns, max_tokens=2).choices


def test_json_objects(client: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        response_format={"type": "json_object"},
        max_tokens=200,
        logit_bias={},
        extra_body=SHORT_THOUGHT,
    )
    (choice,) = answer.choices
    assert choice.message.content.startswith("{")
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def test_several_choices_and_their_log_probabilities(client: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, n=3, max_tokens=6, seed=2, temperature=1.5, logprobs=True, top_logprobs=4
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        for entry in choice.logprobs.content:
            assert len(entry.top_logprobs) == 4
            assert entry.logprob <= entry.top_logprobs[0].logprob <= 0
            assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token
    assert len({tuple(entry.token for entry in choice.logprobs.content) for choice in answer.choices}) == 3


def test_sampling_beyond_openais_goes_through_extra_body(client: Any) -> None:
    def text(**extra: Any) -> str:
        fields: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 24, "seed": 4, "temperature": 1.5}
        whole = client.completions.create(**fields, extra_body={"ignore_eos": True, **extra})
        return str(whole.choices[0].text)

    assert text(top_k=1) == text(min_p=1.0) == text(temperature=0) != text()
    assert text(top_k=-1, min_p=0, repetition_penalty=1) == text()
    assert text(repetition_penalty=1.8) != text()
    with pytest.raises(openai.BadRequestError) as raised:
        text(min_p=2)
    assert raised.value.param == "min_p"


def test_completions(client: Any) -> None:
    fields: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    answer = client.completions.create(**fields, prompt=["One", "Two"], n=2, echo=True, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in answer.choices] == ["One", "One", "Two", "Two"]
    logprobs = answer.choices[2].logprobs
    assert logprobs.token_logprobs[0] is None
    assert "".join(logprobs.tokens) == answer.choices[2].text
    assert logprobs.text_offset[:3] == [0, 1, 2]
    streamed = client.completions.create(**fields, prompt="One", stream=True)
    assert "One" + "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text
    assert client.completions.create(**fields, prompt=[[20, 21], [22]]).usage.prompt_tokens == 3


def test_models(client: Any) -> None:
    listed = client.models.list()
    assert [model.id for model in listed] == ["tiny", "baidu/ERNIE-4.5-Tiny"]
    assert client.models.retrieve("baidu/ERNIE-4.5-Tiny").object == "model"
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("gpt-4o")
    assert raised.value.code == "model_not_found"


def test_raw_answers_have_the_requests_id(client: Any) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 2}
    raw = client.chat.completions.with_raw_response.create(**fields, extra_body={"frobnicate": 1})
    assert raw.headers["x-request-id"] == raw.parse()._request_id == raw.request_id
    assert raw.headers["x-ernie45-ignored-fields"] == "frobnicate"
    own = client.chat.completions.with_raw_response.create(**fields, extra_headers={"x-request-id": "mine-1"})
    assert own.headers["x-request-id"] == "mine-1"
    with client.chat.completions.with_streaming_response.create(**fields, stream=True) as streamed:
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert list(streamed.iter_lines())[-2:] == ["data: [DONE]", ""]


@pytest.mark.parametrize(
    ("fields", "kind", "code", "param"),
    [
        ({"temperature": -1}, "BadRequestError", "invalid_value", "temperature"),
        (
            {"messages": [{"role": "user", "content": "x" * 4000}]},
            "BadRequestError",
            "context_length_exceeded",
            "messages",
        ),
        ({"store": True}, "BadRequestError", "unsupported_parameter", "store"),
        ({"model": "tinny"}, "NotFoundError", "model_not_found", "model"),
        ({"extra_body": {"messages": None}}, "BadRequestError", "invalid_value", "messages"),
    ],
)
def test_errors_have_their_classes(client: Any, fields: dict[str, Any], kind: str, code: str, param: str) -> None:
    for stream in (False, True):
        with pytest.raises(getattr(openai, kind)) as raised:
            client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "stream": stream} | fields)
        error = raised.value
        assert (error.code, error.param) == (code, param)
        assert error.request_id.startswith("req_")
        assert error.body["message"] in str(error)


def test_a_wrong_key_is_an_authentication_error(environment: Served) -> None:
    with pytest.raises(openai.AuthenticationError) as raised:
        openai.OpenAI(api_key="sk-wrong", max_retries=0).models.list()
    assert raised.value.code == "invalid_api_key"


def test_what_is_not_there_is_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.images.generate(prompt="A cat")
    assert raised.value.code == "unknown_url"


def test_the_callers_timeout_ends_the_request(client: Any, environment: Served) -> None:
    impatient = client.with_options(timeout=0.15)
    with pytest.raises(openai.APITimeoutError):
        impatient.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=1800, extra_body={"ignore_eos": True}
        )
    assert client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1).choices


def test_many_at_a_time_with_the_async_client(environment: Served) -> None:
    async def run() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(max_retries=0) as client:

            async def ask(seed: int, stream: bool) -> str:
                answer = await client.completions.create(
                    model="tiny", prompt="Go", max_tokens=20, seed=seed, stream=stream, temperature=1
                )
                if not stream:
                    return str(answer.choices[0].text)
                return "".join([chunk.choices[0].text async for chunk in answer])

            asked = [ask(seed, stream) for stream in (False, True) for seed in range(6)]
            answers = await asyncio.gather(*asked)
            return answers[:6], answers[6:]

    whole, streamed = asyncio.run(run())
    assert whole == streamed
    assert len(set(whole)) == 6


def test_a_stream_can_be_left(client: Any) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": HELLO, "extra_body": {"ignore_eos": True}}
    with client.chat.completions.create(**fields, stream=True) as stream:
        next(iter(stream))
    assert client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1).choices


def _narrow_client(narrow: Served, max_retries: int) -> Any:
    return openai.OpenAI(base_url=f"{narrow.url}/v1", api_key=narrow.key, max_retries=max_retries)


def test_too_large_a_body(narrow: Served) -> None:
    with _narrow_client(narrow, 0) as client, pytest.raises(openai.APIStatusError) as raised:
        client.completions.create(model="ernie", prompt="x" * 40000)
    assert (raised.value.status_code, raised.value.code) == (413, "request_too_large")


def test_too_many_requests_are_tried_again_when_the_server_says(narrow: Served) -> None:
    with _narrow_client(narrow, 0) as client, _narrow_client(narrow, 3) as patient:
        held = client.completions.create(model="ernie", prompt="Go", stream=True, extra_body={"ignore_eos": True})
        next(iter(held))
        with pytest.raises(openai.RateLimitError) as raised:
            client.completions.create(model="ernie", prompt="Go", max_tokens=1)
        assert raised.value.code == "rate_limit_exceeded"
        assert raised.value.response.headers["retry-after"] == "1"
        held.close()
        assert patient.completions.create(model="ernie", prompt="Go", max_tokens=1).choices


def test_a_dead_engine_is_an_error_and_then_waited_for(narrow: Served) -> None:
    with _narrow_client(narrow, 0) as client, _narrow_client(narrow, 6) as patient:
        stream = client.completions.create(model="ernie", prompt="Go", stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        os.kill(narrow.engine_pid(), signal.SIGKILL)
        with pytest.raises(openai.APIError) as broken:
            list(stream)
        assert broken.value.code == "engine_unavailable"
        while narrow.get("/ready").status_code == 200:  # until the server has noticed
            pass
        with pytest.raises(openai.InternalServerError) as raised:
            client.completions.create(model="ernie", prompt="Go", max_tokens=1)
        assert (raised.value.status_code, raised.value.code) == (503, "engine_unavailable")
        assert raised.value.response.headers["retry-after"] == "2"
        assert patient.completions.create(model="ernie", prompt="Go", max_tokens=1).choices
