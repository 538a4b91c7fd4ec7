"""langchain-openai's ChatOpenAI: invoke, stream, batch, tools, structured answers, usage."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.server.served import Served

langchain_openai = pytest.importorskip("langchain_openai")


class Review(BaseModel):
    """What the model thinks of a product."""

    model_config = ConfigDict(extra="forbid")

    verdict: Literal["good", "bad"]
    stars: int = Field(ge=1, le=5)


@pytest.fixture
def chat(default_environment: Served) -> Any:
    """Address and key are the environment's."""
    return langchain_openai.ChatOpenAI(model="smollm2-135m", max_tokens=300, temperature=0.8, seed=6, stream_usage=True)


def test_invoke_and_stream_are_equal(chat: Any) -> None:
    short = chat.bind(max_tokens=24)
    whole = short.invoke([("system", "Be brief."), ("human", "Hello")])
    assert whole.response_metadata["model_name"] == "smollm2-135m"
    assert whole.response_metadata["finish_reason"] in ("stop", "length")
    usage = whole.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    chunks = list(short.stream([("system", "Be brief."), ("human", "Hello")]))
    added = chunks[0]
    for chunk in chunks[1:]:
        added += chunk
    assert added.content == whole.content
    assert added.usage_metadata["output_tokens"] == usage["output_tokens"]
    assert added.usage_metadata["input_token_details"]["cache_read"] > 0


def test_batch_answers_in_order(chat: Any) -> None:
    questions = ["One?", "Two, if you please?", "And what, then, would a third one be?"]
    together = [answer.usage_metadata["input_tokens"] for answer in chat.bind(max_tokens=4).batch(questions)]
    assert together == sorted(together)
    assert len(set(together)) == 3


def test_a_bound_tool_is_called_and_its_result_taken(chat: Any) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    @tool
    def switch(room: Literal["kitchen", "hall"], on: bool) -> str:
        """Switch the light of a room."""
        return f"{room} is {'lit' if on else 'dark'}"

    bound = chat.bind_tools([switch], tool_choice="any", parallel_tool_calls=False)
    asked = HumanMessage("Light in the hall")
    answer = bound.invoke([asked])
    (call,) = answer.tool_calls
    assert call["name"] == "switch"
    assert not answer.invalid_tool_calls
    result = switch.invoke(call)
    assert isinstance(result, ToolMessage)
    again = chat.bind_tools([switch]).bind(max_tokens=8).invoke([asked, answer, result])
    assert again.usage_metadata["input_tokens"] > answer.usage_metadata["input_tokens"]
    streamed = None
    for chunk in bound.stream([asked]):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert [(one["name"], one["args"]) for one in streamed.tool_calls] == [("switch", call["args"])]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_answers(chat: Any, method: str) -> None:
    answer = chat.with_structured_output(Review, method=method, include_raw=True).invoke("How is it?")
    assert answer["parsing_error"] is None
    assert isinstance(answer["parsed"], Review)
    by_schema = chat.with_structured_output(Review.model_json_schema(), method=method, strict=True).invoke("Well?")
    Review.model_validate(by_schema)


def test_the_context_error_is_langchains_own(chat: Any) -> None:
    from langchain_core.exceptions import ContextOverflowError

    with pytest.raises(ContextOverflowError):
        chat.invoke("x" * 5000)
