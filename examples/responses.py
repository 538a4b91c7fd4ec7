"""OpenAI's Responses with a server of this package: a stream, an object, a tool.

Run: ernie serve MODEL --api-key SECRET, then
OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=SECRET python examples/responses.py [QUESTION]
"""

import json
import sys

import openai
import pydantic


class Trip(pydantic.BaseModel):
    """What the second answer is."""

    city: str = pydantic.Field(max_length=20)
    days: int = pydantic.Field(ge=1, le=14)


TOOL = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": Trip.model_json_schema(),
}


def main(question: str = "Where in China is it warm in January?") -> None:
    """Ask three times: for text, for an object of a class, for a call, whose result goes back."""
    client = openai.OpenAI()
    model = client.models.list().data[0].id
    brief = {"model": model, "reasoning": {"effort": "low"}, "max_output_tokens": 1500}
    with client.responses.stream(input=question, instructions="Answer in one sentence.", **brief) as stream:
        for event in stream:
            if event.type in ("response.reasoning_text.delta", "response.output_text.delta"):
                print(event.delta, end="", flush=True)
        usage = event.response.usage  # the last event has the whole response
    print(f"\n[{usage.output_tokens} tokens, {usage.output_tokens_details.reasoning_tokens} of them thought]")

    trip = client.responses.parse(input="Plan a trip.", text_format=Trip, **brief).output_parsed
    print(f"{trip.city}: {trip.days} days")

    turns = [{"role": "user", "content": "What is the weather there?"}]
    asked = client.responses.create(
        input=turns, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, **brief
    )
    call = asked.output[-1]
    print(f"{call.name}({json.loads(call.arguments)})")
    turns += [*asked.output, {"type": "function_call_output", "call_id": call.call_id, "output": "sunny, 25 degrees"}]
    print(client.responses.create(input=turns, tools=[TOOL], tool_choice="none", **brief).output_text)


if __name__ == "__main__":
    main(*sys.argv[1:])
