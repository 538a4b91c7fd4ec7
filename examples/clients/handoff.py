"""Two agents of the OpenAI Agents SDK: triage hands over to billing, billing uses a tool and reports in a fixed form.

Run: OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=.. python examples/clients/handoff.py
"""

import asyncio
import os
from typing import Any, Literal

from agents import Agent, ModelSettings, Runner, function_tool, set_tracing_disabled
from agents.models.openai_chatcompletions import OpenAIChatCompletionsModel
from openai import AsyncOpenAI


@function_tool
def find_invoice(month: Literal["May", "June"]) -> str:
    """Look an invoice up by its month."""
    return f"The invoice of {month} is over 12 euros and unpaid."


def agents(client: AsyncOpenAI) -> Agent[Any]:
    """The agent that is asked first."""
    model = OpenAIChatCompletionsModel(os.environ.get("ERNIE_MODEL", "smollm2-135m"), client)
    billing = Agent(
        name="Billing",
        handoff_description="Answers questions about invoices.",
        instructions="Find the invoice.",
        model=model,
        tools=[find_invoice],
        # Small models want to be told: this turn is a call. What the tool returns is the answer.
        model_settings=ModelSettings(tool_choice="find_invoice", max_tokens=200),
        tool_use_behavior="stop_on_first_tool",
    )
    return Agent(
        name="Triage",
        instructions="Hand the customer over.",
        model=model,
        handoffs=[billing],
        model_settings=ModelSettings(tool_choice="required", parallel_tool_calls=False, max_tokens=200),
    )


def main() -> None:
    """Ask, and say who answered."""
    set_tracing_disabled(True)  # else the SDK sends traces to OpenAI
    result = asyncio.run(Runner.run(agents(AsyncOpenAI()), "Is my invoice of May paid?"))
    print(f"{result.last_agent.name}: {result.final_output}")


if __name__ == "__main__":
    main()
