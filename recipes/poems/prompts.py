"""Requests without answers, with the form that the reward checks: for UPO, and to measure how often forms are kept.

python -m recipes.poems.prompts data/poems/poems.train.jsonl -o data/poems/prompts.train.jsonl --per-form 2000 --seed 2
python -m recipes.poems.prompts data/poems/poems.heldout.jsonl -o data/poems/prompts.heldout.jsonl --per-form 50
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from recipes.poems.instructions import balanced, prompt_row, write_rows_of_poems
from recipes.poems.poem import Poem


def main(argv: Sequence[str] | None = None) -> None:
    """Read poems, write requests."""
    write_rows_of_poems(argv, rows, about=(__doc__ or "").splitlines()[0], per_form=2000)


def rows(poems: Iterable[Poem], per_form: int, seed: int) -> list[Mapping[str, Any]]:
    """Requests alone."""
    return [prompt_row(poem, seed) for poem in balanced(poems, per_form, seed)]


if __name__ == "__main__":
    main()
