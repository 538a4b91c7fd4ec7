"""litellm as the client: completion, stream, tools, structured answers, its classes of errors."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.server.served import Served

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network for prices on import
litellm = pytest.importorskip("litellm")

HELLO = [{"role": "user", "content": "Hello"}]


def ask(served: Served, **fields: Any) -> Any:
    settings = {"api_base": f"{served.url}/v1", "api_key": served.key, "max_retries": 0}
    return litellm.completion(**{"model": "openai/smollm2-135m", "messages": HELLO, **settings, **fields})


def test_whole_and_streamed_are_equal(default_server: Served) -> None:
    fields: dict[str, Any] = {"max_tokens": 20, "seed": 8, "temperature": 0.7, "top_k": 20}
    whole = ask(default_server, **fields)
    chunks = list(ask(default_server, **fields, stream=True, stream_options={"include_usage": True}))
    rebuilt = litellm.stream_chunk_builder(chunks, messages=HELLO)
    assert rebuilt.choices[0].message.content == (whole.choices[0].message.content or None)
    assert rebuilt.usage.total_tokens == whole.usage.total_tokens
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason]
    assert reasons == [
        whole.choices[0].finish_reason
    ]  # `rebuilt` has lost it: litellm looks at its last chunk, the usage


def test_thoughts_are_apart(server: Served) -> None:
    fields: dict[str, Any] = {"model": "openai/tiny", "max_tokens": 20, "extra_body": {"reasoning_max_tokens": 6}}
    message = ask(server, **fields, temperature=0).choices[0].message
    assert message.reasoning_content
    streamed = ask(server, **fields, temperature=0, stream=True)
    thought = "".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in streamed)
    assert thought == message.reasoning_content


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called(default_server: Served, stream: bool) -> None:
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    tool = {"type": "function", "function": {"name": "lamp", "parameters": {**schema, "additionalProperties": False}}}
    fields: dict[str, Any] = {"tools": [tool], "tool_choice": "required", "max_tokens": 300, "seed": 3}
    answer = ask(default_server, **fields, parallel_tool_calls=False, stream=stream)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer))
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert (call.function.name, set(json.loads(call.function.arguments))) == ("lamp", {"on"})
    result = {"role": "tool", "tool_call_id": call.id, "name": "lamp", "content": "on"}
    assert ask(default_server, messages=[*HELLO, choice.message, result], tools=[tool], max_tokens=2).choices


def test_errors_have_litellms_classes(default_server: Served) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        ask(default_server, messages=[{"role": "user", "content": "x" * 5000}])
    with pytest.raises(litellm.AuthenticationError):
        ask(default_server, api_key="sk-wrong")
    with pytest.raises(litellm.NotFoundError):
        ask(default_server, model="openai/gpt-4o")
    with pytest.raises(litellm.BadRequestError, match="temperature is -1"):
        ask(default_server, temperature=-1)
