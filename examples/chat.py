"""Stream an answer, and see how sure the model was. Run: python examples/chat.py [MODEL] [QUESTION]"""

import math
import sys

import ernie45


def main(model_name: str = "smollm2-135m", question: str = "What is the capital of France?") -> None:
    """Answer one question greedily and print the least certain token."""
    model = ernie45.load_model(model_name)
    tokenizer = ernie45.load_tokenizer(model_name)
    sampling = ernie45.SamplingParams(temperature=0, max_tokens=48, logprobs=3)
    messages = [{"role": "user", "content": question}]
    tokens = []
    for piece in ernie45.generate(model, tokenizer, messages, sampling):
        print(piece.text, end="", flush=True)
        tokens += piece.logprobs
    least = min(tokens, key=lambda token: token.logprob)
    rivals = ", ".join(f"{tokenizer.decode([i])!r} {math.exp(logprob):.0%}" for i, logprob in least.top)
    print(f"\n[{len(tokens)} tokens; least certain: {tokenizer.decode([least.id])!r} among {rivals}]")


if __name__ == "__main__":
    main(*sys.argv[1:])
