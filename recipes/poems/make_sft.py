"""Rows to tune on: a request with form and topic, and a real poem as its answer.

python -m recipes.poems.make_sft data/poems/poems.train.jsonl -o data/poems/sft.train.jsonl --per-form 20000
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from recipes.poems.instructions import balanced, prompt_row, write_rows_of_poems
from recipes.poems.poem import Poem


def main(argv: Sequence[str] | None = None) -> None:
    """Read poems, write conversations."""
    write_rows_of_poems(argv, rows, about=(__doc__ or "").splitlines()[0], per_form=20000)


def rows(poems: Iterable[Poem], per_form: int, seed: int) -> list[Mapping[str, Any]]:
    """Conversations of a request and its poem."""
    out: list[Mapping[str, Any]] = []
    for poem in balanced(poems, per_form, seed):
        asked = prompt_row(poem, seed)
        answer = {"role": "assistant", "content": poem.body}
        out.append({**asked, "messages": [*asked["messages"], answer]})
    return out


if __name__ == "__main__":
    main()
