"""The OpenAI Agents SDK: hand-offs, routing, tools, agents as tools, typed output; over chat completions and over responses.

The model is random and answers nonsense, so every outcome here is one that the grammar of a forced call or of a schema
leaves no choice about. Over responses that is a need: there the SDK takes an answer that was cut for a failure.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.server.served import Served

agents = pytest.importorskip("agents")
openai = pytest.importorskip("openai")

MODEL = "smollm2-135m"
FREE = agents.ModelSettings(max_tokens=300, temperature=1.0, extra_body={"seed": 5})


class Route(BaseModel):
    """Where a question goes."""

    model_config = ConfigDict(extra="forbid")

    team: Literal["billing", "support"]
    priority: int = Field(ge=1, le=3)


def forced(choice: str, max_tokens: int = 300) -> Any:
    return agents.ModelSettings(
        tool_choice=choice, parallel_tool_calls=False, max_tokens=max_tokens, temperature=1.0, extra_body={"seed": 5}
    )


@pytest.fixture(autouse=True)
def _untraced() -> None:
    agents.set_tracing_disabled(True)


@pytest.fixture(params=["chat", "responses"])
def make_model(request: pytest.FixtureRequest, default_environment: Served) -> Any:
    """Makes a model for one run: a client belongs to the event loop that it was first used in."""
    if request.param == "responses":
        return lambda: agents.OpenAIResponsesModel(MODEL, openai.AsyncOpenAI(max_retries=0))
    return lambda: agents.OpenAIChatCompletionsModel(MODEL, openai.AsyncOpenAI(max_retries=0))


def run(agent: Any, question: str = "Is my bill paid?", **settings: Any) -> Any:
    return asyncio.run(agents.Runner.run(agent, question, **settings))


def kinds(result: Any) -> list[str]:
    return [item.type for item in result.new_items if item.type != "reasoning_item"]


def test_triage_hands_over_to_the_named_agent(make_model: Any) -> None:
    model = make_model()
    settings: dict[str, Any] = {"instructions": "Answer.", "model": model, "output_type": Route, "model_settings": FREE}
    billing, support = (agents.Agent(name=name, **settings) for name in ("Billing", "Support"))
    triage = agents.Agent(
        name="Triage", model=model, handoffs=[support, billing], model_settings=forced("transfer_to_billing")
    )
    result = run(triage)
    assert result.last_agent is billing
    assert kinds(result)[:2] == ["handoff_call_item", "handoff_output_item"]
    assert json.loads(result.new_items[0].raw_item.arguments) == {}
    assert result.context_wrapper.usage.requests == 2
    assert result.context_wrapper.usage.output_tokens > 0


def test_a_handoff_with_input(make_model: Any) -> None:
    seen: list[Route] = []

    async def note(context: Any, route: Route) -> None:
        seen.append(route)

    model = make_model()
    desk = agents.Agent(name="Desk", model=model, output_type=Route, model_settings=FREE)
    handoff = agents.handoff(desk, on_handoff=note, input_type=Route)
    result = run(agents.Agent(name="Triage", model=model, handoffs=[handoff], model_settings=forced("required")))
    assert result.last_agent is desk
    assert isinstance(seen[0], Route)


def test_a_tool_is_used_and_the_model_asked_again(make_model: Any) -> None:
    calls: list[tuple[str, int]] = []

    @agents.function_tool
    def book(city: Literal["Paris", "Rome"], nights: Literal[1, 2, 3]) -> str:
        """Book a hotel."""
        calls.append((city, nights))
        return f"{nights} nights in {city} are booked"

    agent = agents.Agent(name="Clerk", model=make_model(), tools=[book], model_settings=forced("required", 200))
    result = run(agent, "Two nights in Rome")
    assert len(calls) >= 1
    assert kinds(result)[:2] == ["tool_call_item", "tool_call_output_item"]
    assert "are booked" in result.new_items[1].output
    # The SDK lets the model choose freely from the second turn on.
    assert result.context_wrapper.usage.requests >= 2


def test_agents_as_tools(make_model: Any) -> None:
    model = make_model()
    judge = agents.Agent(name="Judge", instructions="Judge.", model=model, output_type=Route, model_settings=FREE)
    tool = judge.as_tool(tool_name="judge", tool_description="Says where a text belongs.")
    boss = agents.Agent(
        name="Boss",
        model=model,
        tools=[tool],
        model_settings=forced("judge", 1500),
        tool_use_behavior="stop_on_first_tool",
    )
    result = run(boss, "My bill is wrong")
    assert kinds(result) == ["tool_call_item", "tool_call_output_item"]
    assert "input" in json.loads(result.new_items[0].raw_item.arguments)
    assert "priority" in str(result.final_output)  # the judge's words, no report of a failure


def test_typed_output_and_routing_by_it(make_model: Any) -> None:
    def agent(name: str) -> Any:
        return agents.Agent(name=name, model=make_model(), output_type=Route, model_settings=FREE)

    route = run(agent("Router")).final_output
    assert isinstance(route, Route)
    assert run(agent(route.team)).last_agent.name == route.team


def test_a_streamed_run_is_the_same(make_model: Any) -> None:
    def agent() -> Any:
        desk = agents.Agent(name="Desk", model=make_model(), output_type=Route, model_settings=FREE)
        return agents.Agent(name="Triage", model=make_model(), handoffs=[desk], model_settings=forced("required"))

    async def streamed() -> tuple[Any, str]:
        result = agents.Runner.run_streamed(agent(), "Is my bill paid?")
        text = ""
        async for event in result.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                text += event.data.delta
        return result.final_output, text

    output, text = asyncio.run(streamed())
    assert output == run(agent()).final_output == Route.model_validate_json(text)


def test_sessions_keep_the_conversation(make_model: Any) -> None:
    async def talk() -> list[int]:
        agent = agents.Agent(name="Clerk", model=make_model(), output_type=Route, model_settings=FREE)
        session = agents.SQLiteSession("one")
        runs = [await agents.Runner.run(agent, question, session=session) for question in ("Hello", "And?")]
        return [one.context_wrapper.usage.input_tokens for one in runs]

    first, second = asyncio.run(talk())
    assert second > first


@pytest.mark.parametrize(("opening", "calls"), [("<tool_call>", True), ("{", False)])
def test_tools_beside_an_output_type(default_environment: Served, opening: str, calls: bool) -> None:
    """`tools` and a json_schema together: the model may call, and what it says instead has the form.

    A bias decides in place of sense what the answer begins with.
    """
    vocabulary = default_environment.post("/v1/tokenize", {"prompt": "{"}).json()["tokens"] + list(range(32))
    texts = [default_environment.post("/v1/detokenize", {"tokens": [token]}).json()["prompt"] for token in vocabulary]
    begin = vocabulary[texts.index(opening)]
    asked: list[str] = []

    @agents.function_tool
    def ping(who: Literal["a", "b"]) -> str:
        """Answer pong."""
        asked.append(who)
        return "pong"

    agent = agents.Agent(
        name="Both",
        model=agents.OpenAIChatCompletionsModel(MODEL, openai.AsyncOpenAI(max_retries=0)),
        tools=[ping],
        output_type=Route,
        model_settings=agents.ModelSettings(
            max_tokens=300, parallel_tool_calls=False, extra_body={"seed": 5, "logit_bias": {begin: 100}}
        ),
        tool_use_behavior="stop_on_first_tool",
    )
    output = run(agent).final_output
    assert output == "pong" if calls else isinstance(output, Route)
    assert len(asked) == calls


def test_the_environment_is_enough(default_environment: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """No client and no model class: the SDK makes both, from a name and the two variables."""
    from agents.models import _openai_shared as shared

    monkeypatch.setattr(shared, "_use_responses_by_default", True)  # put back afterwards
    monkeypatch.setattr(shared, "_default_openai_client", None)
    agents.set_default_openai_api("chat_completions")
    agent = agents.Agent(name="Clerk", model=MODEL, output_type=Route, model_settings=FREE)
    assert isinstance(run(agent).final_output, Route)
