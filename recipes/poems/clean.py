"""From a record of the collection to a poem: notes and quotation marks go, what is damaged is left out with its reason.

The collection keeps Tang and Song poems in traditional characters, and so do we: a conversion would need a table of words, and
guess. Nothing is translated or corrected.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from recipes.poems.poem import Poem
from recipes.poems.rules import HAN, form_of

_NOTES = re.compile(r"（[^（）]*）|\([^()]*\)|〔[^〔〕]*〕|\[[^\[\]]*\]|【[^【】]*】|\{[^{}]*\}")
_LEFT_OUT = re.compile(r"[\s「」『』“”‘’\"'《》〈〉、·]")
_MARKS = str.maketrans({",": "，", ".": "。", "．": "。", "!": "！", "?": "？", ";": "；", ":": "："})
_LINE = re.compile(f"([{HAN}]+)([，。！？；：]?)[，。！？；：]*")
_TITLE_REST = re.compile(f"[^{HAN}0-9]+")
_UNTITLED = "無題"

MIN_LINES = 2


class UnusableError(Exception):
    """A record that is no poem to learn from; the text is the reason, one of a few."""


def clean(record: Mapping[str, Any], dynasty: str) -> Poem:
    """Read one record of the collection, `{"title", "author", "paragraphs"}`. Raises: UnusableError."""
    paragraphs = record.get("paragraphs")
    if not isinstance(paragraphs, list) or not all(isinstance(text, str) for text in paragraphs):
        raise UnusableError("no paragraphs")
    text = _LEFT_OUT.sub("", _without_notes("".join(paragraphs))).translate(_MARKS)
    if not text:
        raise UnusableError("empty")
    found = list(_LINE.finditer(text))
    if sum(len(match[0]) for match in found) != len(text):
        raise UnusableError("other signs, as for lost characters")
    if len(found) < MIN_LINES:
        raise UnusableError("a single line")
    verses = [match[1] for match in found]
    return Poem(
        title=_TITLE_REST.sub("", _without_notes(str(record.get("title") or ""))) or _UNTITLED,
        author=_TITLE_REST.sub("", str(record.get("author") or "")) or "佚名",
        dynasty=dynasty,
        form=form_of(verses),
        lines=tuple(f"{match[1]}{match[2] or '。'}" for match in found),
    )


def _without_notes(text: str) -> str:
    """Take out what stands in brackets, inner ones first."""
    shorter = _NOTES.sub("", text)
    return shorter if shorter == text else _without_notes(shorter)
