"""Rows to tune on: a request with form and topic, and a real poem as its answer.

python -m recipes.poems.make_sft data/poems/poems.train.jsonl -o data/poems/sft.train.jsonl --per-form 20000
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.poems.instructions import balanced, prompt_row
from recipes.poems.poem import Poem, read_poems, write_rows


def main(argv: Sequence[str] | None = None) -> None:
    """Read poems, write conversations."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("poems", type=Path, help="a file that fetch.py wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=".jsonl to write")
    parser.add_argument("--per-form", type=int, default=20000, metavar="N", help="most rows per form (default 20000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which poems and requests (default 0)")
    options = parser.parse_args(argv)
    count = write_rows(options.output, rows(read_poems(options.poems), options.per_form, options.seed))
    print(f"{count} rows: {options.output}")


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
