"""Models side by side on held-out rows: the loss of the answers, how long their own are, and some of them.

    python -m recipes.smollm2_sft.compare data/smollm2_sft/heldout.jsonl smollm2-135m runs/smollm2-sft-model

MODEL is anything that `ernie chat` takes. Answers are greedy.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ernie45
from ernie45.config.run_file import read_run_file
from ernie45.errors import ConfigError
from ernie45.training.config import RunConfig
from ernie45.training.network import TrainingNetwork
from recipes.held_out import batches_of, mean_loss

RUN_FILE = Path(__file__).with_name("sft.yaml")
MAX_ANSWER_TOKENS = 64
"""Above most of the answers that are expected; those of a model that does not stop are cut here."""

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One model on the rows."""

    model: str
    loss: float
    """Nats per token of the expected answers, over all rows."""
    answers: Sequence[str]
    """To the first rows."""


def main(argv: Sequence[str] | None = None) -> None:
    """Judge, print a table and some answers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path, metavar="FILE", help="rows that fetch.py wrote")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="name, folder or .gguf file")
    parser.add_argument("--answers", type=int, default=50, metavar="N", help="rows that are answered (default 50)")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="answers that are printed (default 3)")
    options = parser.parse_args(argv)
    if not 0 <= options.show <= options.answers or options.answers < 1:
        parser.error(
            f"--answers {options.answers}, --show {options.show}: expected 1 or more, and no more to show than answers"
        )
    rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()][: options.answers]
    if not rows:
        raise ConfigError(f"{options.rows} has no rows: fetch them with recipes.smollm2_sft.fetch")
    judged = [judge(model, options.rows, rows) for model in options.models]
    print(table(rows, judged))
    print("\n".join(shown(row, at, judged) for at, row in enumerate(rows[: options.show])))


def judge(model: str, path: Path, rows: Sequence[Row]) -> Judged:
    """Measure a model: its loss on the file, its answers to some rows of it."""
    tokenizer = ernie45.load_tokenizer(model)
    data = read_run_file(RUN_FILE, RunConfig).data
    batches = batches_of("sft", data, str(path), tokenizer, rows_per_pass=1)
    loss = mean_loss(TrainingNetwork(ernie45.load_model(model)), batches)
    params = ernie45.SamplingParams(temperature=0, max_tokens=MAX_ANSWER_TOKENS)
    answers = ernie45.LLM(model).chat([row["messages"][:-1] for row in rows], params)
    return Judged(model=model, loss=loss, answers=[answer.text for answer in answers])


def table(rows: Sequence[Row], judged: Sequence[Judged]) -> str:
    """The figures as Markdown; the first row is that of the expected answers."""
    expected = [row["messages"][-1]["content"] for row in rows]
    lines = [f"| {each.model} | {each.loss:.3f} | {_words(each.answers):.1f} |" for each in judged]
    head = f"| model | held-out loss | words per answer, of {len(rows)} |"
    return "\n".join([head, "|---|---|---|", f"| (expected) | - | {_words(expected):.1f} |", *lines])


def shown(row: Row, at: int, judged: Sequence[Judged]) -> str:
    """A question, its expected answer, and those of the models."""
    question, answer = (row["messages"][idx]["content"] for idx in (0, -1))
    return "\n".join(
        ["", question, f"  expected: {answer!r}", *(f"  {each.model}: {each.answers[at]!r}" for each in judged)]
    )


def _words(texts: Sequence[str]) -> float:
    return statistics.fmean(len(text.split()) for text in texts)


if __name__ == "__main__":
    main()
