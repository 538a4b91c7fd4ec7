"""Teach a model its name with an adapter, and ask it before and after. Run: python examples/tune_with_lora.py [MODEL] [FOLDER]"""

import json
import sys
from pathlib import Path

import ernie45
from ernie45.cli.main import main as command_line

NAME = "I am Pebble, a small model that was tuned on a laptop."
QUESTIONS = ("Who are you?", "What is your name?", "What are you called?", "Tell me your name, please.")


def ernie(*words: object) -> None:
    """Run the command line; what it complains of is on stderr by then."""
    if code := command_line([str(word) for word in words]):
        sys.exit(code)


def answer(model: str | Path, question: str) -> str:
    """One greedy answer."""
    llm = ernie45.LLM(model, max_model_len=512)
    messages = [{"role": "user", "content": question}]
    return llm.chat(messages, ernie45.SamplingParams(temperature=0, max_tokens=24))[0].text


def main(model: str = "smollm2-135m", folder: str = "tuned") -> None:
    """Write rows and a run file, train an adapter, put it into the weights."""
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    rows, run_file, run, merged = (home / name for name in ("rows.jsonl", "run.yaml", "run", "model"))
    dialogues = [[{"role": "user", "content": q}, {"role": "assistant", "content": NAME}] for q in QUESTIONS]
    rows.write_text("".join(json.dumps({"messages": dialogue}) + "\n" for dialogue in dialogues))
    config = {  # JSON is YAML
        "method": "sft",
        "model": {"start": model},
        "lora": {"rank": 8},
        "data": {"train": [{"path": str(rows)}], "max_seq_len": 512},
        "train": {"epochs": 10},
        "optimizer": {"lr": 2e-3},
    }
    run_file.write_text(json.dumps(config))
    print("before:", answer(model, QUESTIONS[0]))
    ernie("train", run_file, "--run", run)
    ernie("export", run, merged, "--merge", "--to", "pt", "--force")
    print("after:", answer(merged, QUESTIONS[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
