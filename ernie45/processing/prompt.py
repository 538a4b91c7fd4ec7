"""The rendered prompt, and the shield that keeps caller text from turning into special tokens.

A chat template mixes two kinds of text: markers that the template writes (`<|im_start|>`) and strings that the caller
supplies. Only the first may become special tokens. Before rendering, every character in a caller string that could open
or close a special token is swapped for a stand-in, a character that occurs nowhere in the request. After rendering the
text is cut at the special tokens that are still spelled out, which only the template can have written, and the
stand-ins are swapped back. Swapping single characters, not whole markers, also covers markers that would only form when
two caller strings meet.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from ernie45.errors import RequestError

IMAGE_MARKER = "<|image@placeholder|>"
VIDEO_MARKER = "<|video@placeholder|>"
# Written by the vision templates and replaced by placeholder tokens later (reference, architecture 3.10). They are no
# vocabulary items, but a caller must not be able to forge them either.
MEDIA_MARKERS = (IMAGE_MARKER, VIDEO_MARKER)

MAX_JSON_DEPTH = 64  # nesting of tool definitions and arguments; published tools use about 10

# Egyptian and Anatolian hieroglyphs, then rare Chinese characters in case a text holds all of those: without letter
# case, not escaped by `repr`, which a template uses when it prints a list. JSON output leaves them readable for the
# same reason.
STAND_INS = ((0x13000, 0x1342E), (0x14400, 0x14646), (0x20000, 0x2A6D6))


class Segment(NamedTuple):
    """A stretch of a rendered prompt: one special token (or media marker), or plain text."""

    text: str
    special: bool


class RenderedPrompt(str):
    """Rendered text together with its cut into special tokens and plain text; string operations return plain `str`."""

    __slots__ = ("segments",)

    segments: tuple[Segment, ...]

    def __new__(cls, segments: Iterable[Segment]) -> "RenderedPrompt":
        """Join `segments`; the text of the prompt is their concatenation."""
        parts = tuple(segments)
        prompt = super().__new__(cls, "".join(part.text for part in parts))
        prompt.segments = parts
        return prompt

    def __getnewargs__(self) -> tuple[tuple[Segment, ...]]:  # type: ignore[override]  # str's own returns (str,)
        """Rebuild from the segments when copied or pickled."""
        return (self.segments,)


class SpecialStrings:
    """The texts that become special tokens, prepared for searching."""

    def __init__(self, texts: Collection[str]) -> None:
        """Compile `texts`."""
        self.pattern = special_pattern(texts)
        self.edges = frozenset(text[0] for text in texts) | frozenset(text[-1] for text in texts)


class Shield:
    """Stand-ins for one request. Build it from every string that takes part, then protect, render and `reveal`."""

    def __init__(self, special: SpecialStrings, request: object, template_text: str = "") -> None:
        """Choose stand-ins.

        Args: special: what to protect against. request: every caller-supplied value, nested lists and dictionaries of
            JSON values. template_text: whatever the template can write.
        Raises: RequestError if `request` holds something other than JSON values, or is nested too deeply.
        """
        self._pattern = special.pattern
        edges = sorted(special.edges)
        used = set(template_text).union(*strings_in(request), edges)
        free = (chr(code) for code in chain(*(range(*ends) for ends in STAND_INS)) if chr(code) not in used)
        self._stand_in = {ord(edge): next(free) for edge in edges}
        self._original = {ord(stand_in): chr(edge) for edge, stand_in in self._stand_in.items()}
        self.mark = next(free)
        """One more such character: put into a text, it is found again behind rendering."""

    def text(self, text: str) -> str:
        """Protect one string."""
        return text.translate(self._stand_in)

    def value(self, value: Any) -> Any:
        """Protect every string of a JSON value, keys included."""
        return map_strings(value, self.text)

    def restore(self, text: str) -> str:
        """Swap the stand-ins of `text` back."""
        return text.translate(self._original)

    def reveal(self, rendered: str) -> RenderedPrompt:
        """Cut rendered text at the special tokens that the template wrote, and swap the stand-ins back."""
        return RenderedPrompt(
            Segment(self.restore(segment.text), segment.special) for segment in split(rendered, self._pattern)
        )


def special_pattern(special_strings: Collection[str]) -> re.Pattern[str] | None:
    """One expression that finds any of `special_strings`, the longest first; None when there are none."""
    if not special_strings:
        return None
    return re.compile("|".join(re.escape(text) for text in sorted(special_strings, key=len, reverse=True)))


def split(text: str, pattern: re.Pattern[str] | None) -> Iterator[Segment]:
    """Cut `text` at the matches of `pattern`."""
    start = 0
    for match in pattern.finditer(text) if pattern else ():
        if match.start() > start:
            yield Segment(text[start : match.start()], False)
        yield Segment(match.group(), True)
        start = match.end()
    if start < len(text):
        yield Segment(text[start:], False)


def strings_in(value: object, depth: int = 0) -> Iterator[str]:
    """Yield every string of a JSON value, keys included; RequestError for anything that is no JSON value."""
    if depth > MAX_JSON_DEPTH:
        raise RequestError(f"messages or tools are nested more than {MAX_JSON_DEPTH} levels deep: flatten them")
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise RequestError(f"messages and tools hold JSON values, and a JSON key is a string, not {key!r}")
            yield key
            yield from strings_in(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item, depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise RequestError(f"messages and tools hold JSON values, and JSON has no {value!r}")
    elif value is not None and not isinstance(value, int):
        raise RequestError(f"messages and tools hold JSON values, not {type(value).__name__}")


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of a JSON value (checked by `strings_in` before) with `change` applied to every string."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, change) for item in value]
    return value
