"""How a poem is asked for: a form, and a title or words that it shall hold."""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.poems.poem import Poem, draw_key, read_poems, sample, write_rows
from recipes.poems.rules import FORMS

WORDS = (
    *("明月", "春風", "秋風", "白雲", "青山", "流水", "落花", "梅花", "桃花", "楊柳", "芳草", "江南", "故人", "故鄉"),
    *("孤舟", "夕陽", "黃昏", "寒食", "重陽", "風雨", "煙雨", "霜", "雪", "雁", "竹", "松", "酒", "琴", "夢", "鶴"),
    *("山", "江", "花", "月", "秋", "春", "夜", "愁", "鐘", "僧"),
)
"""What poems are about; longer words first, so that they are found before what they hold."""

_MAX_TITLE_CHARS = 8
# Parts of a series ("詠史十首其二") and placeholders say nothing about what a poem is about.
_NO_TOPIC = re.compile(
    r"句|無題|失題|絕句|絶句|偶[成題作書]|雜詩|.*[其首][一二三四五六七八九十百]+|.*[一二三四五六七八九十百]+首.*"
)


def instruction(poem: Poem, seed: int) -> str | None:
    """A request that the poem answers, the same for the same seed; None where nothing fits: no form, no topic."""
    if poem.form not in FORMS:
        return None
    choices = _requests(poem)
    return random.Random(draw_key(poem, seed)).choice(choices) if choices else None


def balanced(poems: Iterable[Poem], per_form: int, seed: int) -> list[Poem]:
    """Poems that can be asked for, up to `per_form` of each form, mixed; which ones and their order by `seed` alone."""
    usable = [poem for poem in poems if instruction(poem, seed) is not None]
    chosen = [p for form in FORMS for p in sample((p for p in usable if p.form == form), per_form, seed)]
    return sorted(chosen, key=lambda poem: draw_key(poem, seed))


def prompt_row(poem: Poem, seed: int) -> Mapping[str, Any]:
    """The request alone, with the form that the reward checks."""
    return {"messages": [{"role": "user", "content": instruction(poem, seed)}], "form": poem.form}


def write_rows_of_poems(
    argv: Sequence[str] | None,
    rows: Callable[[Iterable[Poem], int, int], Sequence[Mapping[str, Any]]],
    *,
    about: str,
    per_form: int,
) -> None:
    """The command that turns a file of poems into one of rows.

    Args: rows: of poems, most of each form, and seed. about: its line of help. per_form: the default.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("poems", type=Path, help="a file that fetch.py wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=".jsonl to write")
    parser.add_argument(
        "--per-form", type=int, default=per_form, metavar="N", help=f"most rows per form (default {per_form})"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="which poems, and what is drawn for them (default 0)"
    )
    options = parser.parse_args(argv)
    count = write_rows(options.output, rows(read_poems(options.poems), options.per_form, options.seed))
    print(f"{count} rows: {options.output}")


def _requests(poem: Poem) -> list[str]:
    found = []
    if len(poem.title) <= _MAX_TITLE_CHARS and not _NO_TOPIC.fullmatch(poem.title):
        found += [f"寫一首{poem.form}，題為《{poem.title}》。", f"請以《{poem.title}》為題，作{poem.form}一首。"]
    body, words = "".join(poem.verses), []
    for word in WORDS:
        if word in body:
            words.append(word)
            body = body.replace(word, " ")
    if words:
        found.append(f"寫一首{poem.form}，詩中要有「{words[0]}」。")
    if len(words) > 1:
        found.append(f"作{poem.form}一首，寫到「{words[0]}」與「{words[1]}」。")
    return found
