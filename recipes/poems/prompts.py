"""Requests without answers, with the form that the reward checks: for UPO, and to measure how often forms are kept.

python -m recipes.poems.prompts data/poems/poems.train.jsonl -o data/poems/prompts.train.jsonl --per-form 2000 --seed 2
python -m recipes.poems.prompts data/poems/poems.heldout.jsonl -o data/poems/prompts.heldout.jsonl --per-form 50
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.poems.instructions import balanced, prompt_row
from recipes.poems.poem import Poem, read_poems, write_rows


def main(argv: Sequence[str] | None = None) -> None:
    """Read poems, write requests."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("poems", type=Path, help="a file that fetch.py wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=".jsonl to write")
    parser.add_argument("--per-form", type=int, default=2000, metavar="N", help="most rows per form (default 2000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which poems and requests (default 0)")
    options = parser.parse_args(argv)
    count = write_rows(options.output, rows(read_poems(options.poems), options.per_form, options.seed))
    print(f"{count} rows: {options.output}")


def rows(poems: Iterable[Poem], per_form: int, seed: int) -> list[Mapping[str, Any]]:
    """Requests alone."""
    return [prompt_row(poem, seed) for poem in balanced(poems, per_form, seed)]


if __name__ == "__main__":
    main()
