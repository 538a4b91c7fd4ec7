"""What can be checked in a poem: number of lines, characters per line, rhyme. The reward of the last training stage.

reward("床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。", "五言絕句")    # 1.0
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ernie45.errors import ConfigError
from recipes.poems.rhyme import rhyme_together

OTHER = "其他"
"""Form of every poem that is none of `FORMS`."""

HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
"""Chinese characters, for the inside of a character class."""

_BREAK = re.compile(r"[，。！？；：,.!?;:\s]+")
_QUOTES = re.compile(r"[「」『』“”‘’\"']")
_HAN_LINE = re.compile(f"[{HAN}]+")


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a poem is laid out. Even lines rhyme."""

    num_lines: int
    line_chars: int


FORMS: Mapping[str, Form] = {
    "五言絕句": Form(num_lines=4, line_chars=5),
    "七言絕句": Form(num_lines=4, line_chars=7),
    "五言律詩": Form(num_lines=8, line_chars=5),
    "七言律詩": Form(num_lines=8, line_chars=7),
}
"""By name, in the script of the corpus."""

_SIMPLIFIED = {"五言绝句": "五言絕句", "七言绝句": "七言絕句", "五言律诗": "五言律詩", "七言律诗": "七言律詩"}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """How far a poem keeps to its form; every part is 0 to 1, and 1 only if nothing is wrong."""

    lines: float
    """Falls with every line that is missing or too many."""
    characters: float
    """Share of the lines that have the right number of characters, nothing else, and are not a line said before."""
    rhyme: float
    """Even lines that rhyme with each other, on different characters, above the first."""

    @property
    def reward(self) -> float:
        """Their mean."""
        return (self.lines + self.characters + self.rhyme) / 3

    @property
    def complies(self) -> bool:
        """Whether everything is right."""
        return self.lines == self.characters == self.rhyme == 1


def form_named(name: str) -> Form:
    """A form by its name, in traditional or simplified script. Raises: ConfigError for any other name."""
    found = FORMS.get(_SIMPLIFIED.get(name, name))
    if found is None:
        raise ConfigError(f"there is no form {name!r}: known are {', '.join(FORMS)}")
    return found


def split_lines(text: str) -> list[str]:
    """The lines of a poem, without punctuation: they end at marks and at line feeds."""
    return [line for line in _BREAK.split(_QUOTES.sub("", text)) if line]


def form_of(lines: Sequence[str]) -> str:
    """The name of the form that lines without punctuation have; `OTHER` if none."""
    sizes = {len(line) for line in lines}
    named = (name for name, form in FORMS.items() if len(lines) == form.num_lines and sizes == {form.line_chars})
    return next(named, OTHER)


def check(text: str, form: Form) -> Parts:
    """Compare a poem with the form that was asked for."""
    lines = split_lines(text)
    wanted = form.num_lines
    right = {line for line in lines if len(line) == form.line_chars and _HAN_LINE.fullmatch(line)}
    ends = [line[-1] for line in lines[1:wanted:2]]
    rhyming = max(0, rhyme_together(ends) - 1)
    return Parts(
        lines=max(0.0, 1 - abs(len(lines) - wanted) / wanted),
        characters=len(right) / max(wanted, len(lines)),
        rhyme=rhyming / (wanted // 2 - 1),
    )


def reward(text: str, form: str) -> float:
    """What a poem is worth, 0 to 1; 1 exactly if it keeps to its form in everything. Raises: ConfigError."""
    return check(text, form_named(form)).reward


def answer_reward(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
    """`reward` as training calls it: the form stands in the row that the prompt came from."""
    del prompt
    return reward(answer, row["form"])
