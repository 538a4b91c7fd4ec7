"""Train a small random mixture of experts until it knows four answers, then ask it. Run: python examples/train_tiny.py [FOLDER]

What is run is `ernie tokenizer train`, `ernie train` and `ernie export`. Started again, the run is found finished.
"""

import json
import sys
from pathlib import Path

import ernie45
from ernie45.cli.main import main as command_line

ANSWERS = {
    "What is the capital of France?": "Paris.",
    "Who wrote Hamlet?": "William Shakespeare.",
    "When does water boil?": "At one hundred degrees.",
    "Which planet is red?": "Mars.",
}
MOE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_layer_start_index": 1}
NETWORK = {"vocab_size": 340, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "moe": MOE}
NETWORK |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def ernie(*words: object) -> None:
    """Run the command line; what it complains of is on stderr by then."""
    if code := command_line([str(word) for word in words]):
        sys.exit(code)


def main(folder: str = "tiny") -> None:
    """Rows, a vocabulary, a run file, the run, and a model that answers."""
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    rows, texts, run_file, run = (home / name for name in ("rows.jsonl", "texts.txt", "run.yaml", "run"))
    rows.write_text("".join(json.dumps({"src": [asked], "tgt": [said]}) + "\n" for asked, said in ANSWERS.items()))
    texts.write_text("\n".join(f"User: {asked}\nAssistant: {said}" for asked, said in ANSWERS.items()))
    ernie("tokenizer", "train", texts, "--vocab-size", NETWORK["vocab_size"], "-o", home / "tokenizer", "--force")

    config = {  # JSON is YAML
        "method": "sft",
        "model": {"tokenizer": str(home / "tokenizer"), "network": NETWORK},
        "data": {"train": [{"path": str(rows)}], "max_seq_len": 256},
        "train": {"epochs": 60},
        "optimizer": {"lr": 1e-2},
    }
    run_file.write_text(json.dumps(config))
    ernie("train", run_file, "--run", run)
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    print(f"loss {losses[0]:.2f} at first, {losses[-1]:.4f} at last")

    ernie("export", run, home / "model", "--to", "pt", "--force")
    llm = ernie45.LLM(home / "model")
    for question in ANSWERS:
        messages = [{"role": "user", "content": question}]
        print(question, llm.chat(messages, ernie45.SamplingParams(temperature=0, max_tokens=40))[0].text)


if __name__ == "__main__":
    main(*sys.argv[1:])
