"""How often a model keeps to the form that it is asked for.

    python -m recipes.poems.compliance MODEL data/poems/prompts.heldout.jsonl

MODEL is anything that `ernie chat` takes. Before it was tuned, a model continues the request as it can: the figure is low for
that reason, too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ernie45
from recipes.poems.rules import FORMS, Parts, check, form_named

_MAX_TOKENS = 160
"""A poem of eight lines of seven characters has 76 characters with its marks, most of them a token or less."""


def main(argv: Sequence[str] | None = None) -> None:
    """Answer the requests, judge the answers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="name, folder or .gguf file")
    parser.add_argument("prompts", type=Path, metavar="FILE", help="requests that prompts.py wrote")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0 is greedy (default 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default 0)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="also write the answers, as .jsonl")
    options = parser.parse_args(argv)
    rows = [json.loads(line) for line in options.prompts.read_text(encoding="utf-8").splitlines()]
    params = [
        ernie45.SamplingParams(temperature=options.temperature, seed=options.seed + idx, max_tokens=_MAX_TOKENS)
        for idx in range(len(rows))
    ]
    answers = ernie45.LLM(options.model).chat([row["messages"] for row in rows], params)
    judged = [(row["form"], answer.text) for row, answer in zip(rows, answers, strict=True)]
    if options.output is not None:
        lines = [
            json.dumps({**row, "answer": text}, ensure_ascii=False) + "\n"
            for row, (_, text) in zip(rows, judged, strict=True)
        ]
        options.output.write_text("".join(lines), encoding="utf-8")
    print(table(measure(judged)))


def measure(answers: Iterable[tuple[str, str]]) -> Mapping[str, Mapping[str, float]]:
    """Means over (form, answer), by form and for all: `count`, `complies` and the parts of the reward."""
    by_form: dict[str, list[Parts]] = {}
    for form, text in answers:
        by_form.setdefault(form, []).append(check(text, form_named(form)))
    everything = [parts for found in by_form.values() for parts in found]
    named = {form: by_form[form] for form in FORMS if form in by_form} | {"all": everything}
    return {form: _means(found) for form, found in named.items() if found}


def table(figures: Mapping[str, Mapping[str, float]]) -> str:
    """The figures as Markdown."""
    rows = ["| form | poems | form kept | lines | characters | rhyme | reward |", "|---|---|---|---|---|---|---|"]
    for form, found in figures.items():
        parts = " | ".join(f"{found[name]:.3f}" for name in ("lines", "characters", "rhyme", "reward"))
        rows.append(f"| {form} | {found['count']:.0f} | {found['complies']:.1%} | {parts} |")
    return "\n".join(rows)


def _means(found: Sequence[Parts]) -> dict[str, Any]:
    names = ("complies", "lines", "characters", "rhyme", "reward")
    return {"count": len(found), **{name: sum(float(getattr(p, name)) for p in found) / len(found) for name in names}}


if __name__ == "__main__":
    main()
