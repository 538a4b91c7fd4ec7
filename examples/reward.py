"""A reward of your own: answers are sampled, a function judges them, and what it likes becomes likelier.

Run: python examples/reward.py [MODEL] [FOLDER]
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ernie45.cli.main import main as command_line

PROMPTS = ("Name a colour.", "Name an animal.", "Name a city.", "Name a tree.")
# The section `rewards` of a run file: module:function, which must lie where Python finds it, and what the function is told.
REWARDS = [{"function": "reward:starts_early", "weight": 1.0, "options": {"letters": "abc"}}]


def starts_early(prompt: str, answer: str, row: Mapping[str, Any], *, letters: str) -> float:
    """Share of the answer's words that begin with one of the letters. `prompt` and `row` are there for rules that need them."""
    words = answer.lower().split()
    return sum(word[0] in letters for word in words) / max(1, len(words))


def main(model: str = "smollm2-135m", folder: str = "rewarded") -> None:
    """A few steps of UPO, and what the answers were worth in each."""
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    prompts, run_file, run = (home / name for name in ("prompts.jsonl", "run.yaml", "run"))
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    config = {  # JSON is YAML
        "method": "upo",
        "model": {"start": model},
        "lora": {"rank": 8},
        "data": {"train": [{"path": str(prompts)}], "max_seq_len": 512},
        "train": {"steps": 4, "rows_per_pass": 4},
        "upo": {"advantages": "group", "kl_weight": 0.02},
        "rollout": {"num_answers": 4, "max_tokens": 24},
        "rewards": REWARDS,
        "optimizer": {"lr": 1e-3},
    }
    run_file.write_text(json.dumps(config))
    if code := command_line(["train", str(run_file), "--run", str(run)]):
        sys.exit(code)
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        print(f"step {line['step']}: an answer was worth {line['rewards/score']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
