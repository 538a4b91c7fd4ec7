"""Anthropic's Messages with a server of this package: tokens counted, a stream, a tool.

Run: ernie serve MODEL --api-key SECRET, then
ANTHROPIC_BASE_URL=http://127.0.0.1:8000 ANTHROPIC_API_KEY=SECRET python examples/anthropic_messages.py [QUESTION]
"""

import sys

import anthropic

TOOL = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def main(question: str = "What is the weather in Hangzhou?") -> None:
    """Count a question's tokens, stream an answer, have a tool called and tell the model what it gave."""
    client = anthropic.Anthropic()
    model = client.models.list().data[0].id
    turns = [{"role": "user", "content": question}]
    counted = client.messages.count_tokens(model=model, messages=turns, tools=[TOOL])
    print(f"{counted.input_tokens} tokens with the tool")

    # A model that can think does so here, at low effort; for one that cannot, this asks for nothing.
    brief = {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}, "max_tokens": 1500}
    with client.messages.stream(model=model, messages=turns, system="Be brief.", **brief) as stream:
        for text in stream.text_stream:
            print(text, end="", flush=True)
        message = stream.get_final_message()
    print(f"\n[{message.usage.output_tokens} tokens, ended by {message.stop_reason}]")

    choice = {"type": "any", "disable_parallel_tool_use": True}
    message = client.messages.create(model=model, messages=turns, tools=[TOOL], tool_choice=choice, **brief)
    call = message.content[-1]
    print(f"{call.name}({call.input})")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny, 25 degrees"}
    turns += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    message = client.messages.create(model=model, messages=turns, tools=[TOOL], tool_choice={"type": "none"}, **brief)
    print("".join(block.text for block in message.content if block.type == "text"))


if __name__ == "__main__":
    main(*sys.argv[1:])
