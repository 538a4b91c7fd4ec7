"""Answer many questions at once, with a shared prefix and a shared system prompt. Run: python examples/batch.py [MODEL]"""

import sys

import ernie45

SYSTEM = "You are a helpful assistant who answers in one short sentence."
QUESTIONS = ("What is the capital of France?", "Who wrote Hamlet?", "What is the boiling point of water?")


def main(model_name: str = "smollm2-135m") -> None:
    """Three conversations in one batch, two choices each; then one more turn, which finds its beginning computed."""
    llm = ernie45.LLM(model_name, max_model_len=512, speculation=ernie45.NgramSpeculation())
    params = ernie45.SamplingParams(temperature=0.7, top_p=0.9, seed=1, n=2, max_tokens=32)
    conversations = [
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}] for question in QUESTIONS
    ]
    answers = llm.chat(conversations, params)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        for choice in answer.choices:
            print(f"{question} {choice.text!r} ({choice.finish_reason})")
    said = {"role": "assistant", "content": answers[0].text}
    (again,) = llm.chat([*conversations[0], said, {"role": "user", "content": "Why?"}], params)
    print(f"second turn: {again.usage.cached_tokens} of {again.usage.prompt_tokens} prompt tokens were known")
    stats = llm.stats()
    print(f"{stats.generated_tokens} tokens in {stats.steps} steps; {stats.accepted_tokens} guesses were right")


if __name__ == "__main__":
    main(*sys.argv[1:])
