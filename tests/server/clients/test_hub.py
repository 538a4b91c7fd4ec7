"""huggingface_hub's InferenceClient: against the server's address, and as the client of a hosted platform."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.served import Served

hub = pytest.importorskip("huggingface_hub")

HELLO = [{"role": "user", "content": "Hello"}]
MODEL = "smollm2-135m"
"""Given with every call: with an address and no model the client sends the name `dummy`."""


@pytest.fixture
def client(default_server: Served) -> Any:
    return hub.InferenceClient(base_url=f"{default_server.url}/v1", api_key=default_server.key)


def test_chat_whole_and_streamed_are_equal(client: Any) -> None:
    fields: dict[str, Any] = {"max_tokens": 20, "seed": 4, "temperature": 0.9}
    whole = client.chat_completion(HELLO, model=MODEL, **fields)
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat_completion(HELLO, model=MODEL, stream=True, **fields))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


def test_openais_spelling_and_what_only_this_server_knows(client: Any) -> None:
    answer = client.chat.completions.create(
        messages=HELLO,
        model=MODEL,
        max_tokens=30,
        extra_body={"guided_choice": ["yes", "no"]},
        logprobs=True,
        top_logprobs=2,
    )
    assert answer.choices[0].message.content in ("yes", "no")
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2


def test_a_tool_is_called(client: Any) -> None:
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    tool = {"type": "function", "function": {"name": "lamp", "parameters": {**schema, "additionalProperties": False}}}
    answer = client.chat_completion(HELLO, model=MODEL, tools=[tool], tool_choice="required", max_tokens=300, seed=3)
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "lamp"
    assert set(json.loads(call.function.arguments)) == {"on"}
    turns = [*HELLO, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "on"}]
    assert client.chat_completion(turns, model=MODEL, tools=[tool], max_tokens=2).choices


def test_an_answer_keeps_to_a_schema(client: Any) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "count", "schema": schema, "strict": True}}
    answer = client.chat_completion(HELLO, model=MODEL, response_format=wanted, max_tokens=100)
    assert json.loads(answer.choices[0].message.content)["n"] in (1, 2)


def test_the_platforms_provider_class(default_server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """It posts to /v3/openai; only its address is changed, and the model's name need not be asked of the hub."""
    from huggingface_hub.hf_api import InferenceProviderMapping
    from huggingface_hub.inference import _providers as providers
    from huggingface_hub.inference._providers import _common as common

    named = InferenceProviderMapping(
        provider="novita",
        hf_model_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        providerId="smollm2-135m",
        status="live",
        task="conversational",
    )
    monkeypatch.setitem(common.HARDCODED_MODEL_INFERENCE_MAPPING, "novita", {named.hf_model_id: named})
    monkeypatch.setattr(providers.PROVIDERS["novita"]["conversational"], "base_url", default_server.url)
    client = hub.InferenceClient(provider="novita", api_key=default_server.key)
    answer = client.chat_completion(HELLO, model=named.hf_model_id, max_tokens=3)
    assert answer.model == "smollm2-135m"
    chunks = client.chat_completion(HELLO, model=named.hf_model_id, max_tokens=3, stream=True)
    assert all(chunk.choices for chunk in chunks)


def test_errors_show_the_servers_words(client: Any) -> None:
    with pytest.raises(hub.errors.HfHubHTTPError, match="temperature is -1"):
        client.chat_completion(HELLO, model=MODEL, temperature=-1)
