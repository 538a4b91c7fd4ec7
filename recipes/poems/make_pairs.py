"""Pairs for DPO: a real poem against the same poem damaged in one place.

python -m recipes.poems.make_pairs data/poems/poems.train.jsonl -o data/poems/pairs.jsonl --per-form 5000 --seed 1
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from recipes.poems.instructions import balanced, prompt_row, write_rows_of_poems
from recipes.poems.poem import Poem, draw_key
from recipes.poems.rhyme import tracks_of

Damage = Callable[[list[str], random.Random], list[str] | None]
"""From lines without marks to damaged ones, or None where that damage cannot be done."""


def main(argv: Sequence[str] | None = None) -> None:
    """Read poems, write pairs."""
    write_rows_of_poems(argv, rows, about=(__doc__ or "").splitlines()[0], per_form=5000)


def rows(poems: Iterable[Poem], per_form: int, seed: int) -> list[Mapping[str, Any]]:
    """A request, the real poem, the damaged one, and what was done to it."""
    out: list[Mapping[str, Any]] = []
    for poem in balanced(poems, per_form, seed):
        kind, damaged = damage(poem, seed)
        request = prompt_row(poem, seed)["messages"][0]["content"]
        out.append(
            {"prompt": request, "chosen": poem.body, "rejected": damaged.body, "damage": kind, "form": poem.form}
        )
    return out


def damage(poem: Poem, seed: int) -> tuple[str, Poem]:
    """Damage a poem in one of three ways, always the same one for the same seed; punctuation stays where it is.

    Returns: the kind of damage and the damaged poem, never equal to the real one.
    """
    draw = random.Random(draw_key(poem, seed))
    for kind in draw.sample(sorted(DAMAGES), len(DAMAGES)):
        verses = DAMAGES[kind](poem.verses, draw)
        if verses is not None and verses != poem.verses:
            lines = tuple(f"{verse}{line[-1]}" for verse, line in zip(verses, poem.lines, strict=True))
            return kind, replace(poem, lines=lines)
    raise AssertionError("a character can be dropped from every line of more than one")


def swap_lines(verses: list[str], draw: random.Random) -> list[str]:
    """Change the two lines of a couplet: the rhyme comes too early."""
    at = 2 * draw.randrange(len(verses) // 2)
    return [*verses[:at], verses[at + 1], verses[at], *verses[at + 2 :]]


def break_rhyme(verses: list[str], draw: random.Random) -> list[str] | None:
    """End one even line with a character of the same poem that rhymes with none of the other even lines."""
    ends = [verse[-1] for verse in verses[1::2]]
    at = draw.randrange(len(ends))
    others = {track for idx, end in enumerate(ends) if idx != at for track in tracks_of(end)}
    strangers = sorted({char for char in "".join(verses) if tracks_of(char) and not tracks_of(char) & others})
    if not strangers:
        return None
    line = 2 * at + 1
    return [*verses[:line], verses[line][:-1] + draw.choice(strangers), *verses[line + 1 :]]


def drop_character(verses: list[str], draw: random.Random) -> list[str]:
    """Leave one character of one line out."""
    line = draw.randrange(len(verses))
    at = draw.randrange(len(verses[line]))
    return [*verses[:line], verses[line][:at] + verses[line][at + 1 :], *verses[line + 1 :]]


DAMAGES: Mapping[str, Damage] = {
    "swapped lines": swap_lines,
    "broken rhyme": break_rhyme,
    "dropped character": drop_character,
}


if __name__ == "__main__":
    main()
