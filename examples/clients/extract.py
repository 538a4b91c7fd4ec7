"""Facts out of a text, through LangChain: the answer is an object, because the server lets nothing else through.

Run: OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=.. python examples/clients/extract.py [TEXT]
"""

import os
import sys
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict, Field

TEXT = "The kettle was here in two days. It leaks, and I want my money back!"


class Complaint(BaseModel):
    """What a customer wants."""

    model_config = ConfigDict(extra="forbid")

    product: str = Field(pattern="^[a-z ]{2,20}$")
    wish: Literal["refund", "repair", "replacement", "none"]
    anger: int = Field(ge=0, le=10)


def main(text: str = TEXT) -> None:
    """Read one text."""
    model = ChatOpenAI(model=os.environ.get("ERNIE_MODEL", "smollm2-135m"), temperature=0, max_tokens=200)
    reader = model.with_structured_output(Complaint, method="json_schema")
    complaint = reader.invoke([("system", "Fill in the form for this customer's text."), ("human", text)])
    assert isinstance(complaint, Complaint), "asked for as that"
    print(f"{complaint.product}: {complaint.wish}, anger {complaint.anger} of 10")


if __name__ == "__main__":
    main(*sys.argv[1:])
