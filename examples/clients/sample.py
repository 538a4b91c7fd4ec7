"""One chat completion, whole or streamed, with every parameter that hosted ERNIE platforms show in their samples.

Run: OPENAI_BASE_URL=http://127.0.0.1:8000/v3/openai OPENAI_API_KEY=.. python examples/clients/sample.py [stream]
"""

import os
import sys

from openai import OpenAI

client = OpenAI(base_url=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"])


def main(stream: bool = False) -> None:
    """Ask once and print the answer."""
    response = client.chat.completions.create(
        model=os.environ.get("ERNIE_MODEL", "smollm2-135m"),
        messages=[
            {"role": "system", "content": "Be a helpful assistant"},
            {"role": "user", "content": "Hi there!"},
        ],
        stream=stream,
        max_tokens=int(os.environ.get("ERNIE_MAX_TOKENS", "256")),
        temperature=1,
        top_p=1,
        presence_penalty=0,
        frequency_penalty=0,
        response_format={"type": "text"},
        extra_body={"top_k": 50, "repetition_penalty": 1, "min_p": 0},
    )
    if stream:
        for chunk in response:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()
    else:
        print(response.choices[0].message.content)


if __name__ == "__main__":
    main("stream" in sys.argv[1:])
