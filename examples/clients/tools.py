"""A tool loop by hand: the model calls, the program runs, the model reads the result.

Run: OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=.. python examples/clients/tools.py
"""

import json
import os
from typing import Any

from openai import OpenAI

MODEL = os.environ.get("ERNIE_MODEL", "smollm2-135m")
STOCK = {"apples": 12, "pears": 0}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "count",
        "description": "How many of a fruit there are in stock.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"fruit": {"type": "string", "enum": sorted(STOCK)}},
            "required": ["fruit"],
            "additionalProperties": False,
        },
    },
}


def main() -> None:
    """Force one call, run it, hand over what it returns."""
    client = OpenAI()
    messages: list[Any] = [{"role": "user", "content": "Are there any apples left?"}]
    asked: dict[str, Any] = {"model": MODEL, "tools": [TOOL], "temperature": 0}
    answer = client.chat.completions.create(
        **asked, messages=messages, tool_choice="required", parallel_tool_calls=False
    )
    (call,) = answer.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)  # keeps to the schema: the call was forced
    result = STOCK[arguments["fruit"]]
    print(f"{call.function.name}({arguments['fruit']}) = {result}")
    messages += [answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": str(result)}]
    final = client.chat.completions.create(**asked, messages=messages, tool_choice="none", max_tokens=64)
    print(final.choices[0].message.content)


if __name__ == "__main__":
    main()
