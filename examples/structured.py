"""Force answers into shape: one of several texts, a pattern, JSON of a schema. Run: python examples/structured.py [MODEL]"""

import json
import sys

import ernie45

REVIEW = "The screen is bright, but after two weeks the battery was dead."
SCHEMA = {
    "type": "object",
    "properties": {
        "product": {"type": "string", "pattern": "^[a-z ]{3,20}$"},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
    },
    "required": ["product", "stars"],
    "additionalProperties": False,
}


def main(model_name: str = "smollm2-135m") -> None:
    """Three questions about one review in one batch, each with its own constraint."""
    llm = ernie45.LLM(model_name, max_model_len=512)
    asked = {
        "Is this review positive, negative or mixed?": ernie45.Constraint.choice(["positive", "negative", "mixed"]),
        "How many days did the battery live?": ernie45.Constraint.regex("[1-9][0-9]? days"),
        "Summarise the review as JSON.": ernie45.Constraint.json_schema(SCHEMA),
    }
    conversations = [[{"role": "user", "content": f"{REVIEW}\n{question}"}] for question in asked]
    params = ernie45.SamplingParams(temperature=0.7, seed=1, max_tokens=96)
    answers = llm.chat(conversations, params, constraint=list(asked.values()))
    for question, answer in zip(asked, answers, strict=True):
        print(f"{question} {answer.text}")
    if answers[-1].choices[0].finish_reason == "stop":  # else the limit cut it
        print("stars:", json.loads(answers[-1].text)["stars"])


if __name__ == "__main__":
    main(*sys.argv[1:])
