"""Read one tool call, `{"name": .., "arguments": {..}}`, while it is being written.

`JsonScanner` finds the end of one JSON value in text that arrives in pieces and refuses what is no JSON at the first
wrong character. `CallReader` puts it to work on a call and gives out name and arguments as soon as they are certain.
Outcomes depend on the text alone, never on how it was cut into pieces.
"""

import json
import re
from typing import Literal

from ernie45.processing.prompt import MAX_JSON_DEPTH

_SPACE = " \t\n\r"
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NUMBER_CHARS = re.compile(r"[-+.eE0-9]+")
_LETTERS = re.compile(r"[a-z]+")
_LITERALS = ("true", "false", "null")

Status = Literal["going", "done", "failed"]


class JsonScanner:
    """Scans one JSON value (RFC 8259). A number or a literal is done when something else follows it."""

    def __init__(self) -> None:
        self.status: Status = "going"
        self._closers: list[str] = []
        self._expects = "value"
        self._token = ""
        self._is_key = False

    def feed(self, text: str, start: int = 0) -> int:
        """Scan on from `start`; return the index behind the last character that belongs to the value."""
        pos = start
        while pos < len(text) and self.status == "going":
            pos = self._step(text, pos)
        return pos

    def _step(self, text: str, pos: int) -> int:  # noqa: PLR0911  # one return per kind of token
        match self._expects:
            case "string":
                return self._string(text, pos)
            case "escape":
                return self._escape(text[pos], pos)
            case "hex":
                return self._hex(text[pos], pos)
            case "number":
                return self._run(_NUMBER_CHARS, text, pos)
            case "literal":
                return self._run(_LETTERS, text, pos)
        char = text[pos]
        if char in _SPACE:
            return pos + 1
        if not self._structure(char):
            self.status = "failed"
            return pos
        return pos if self._expects in ("number", "literal") else pos + 1

    def _structure(self, char: str) -> bool:
        """Take a character between tokens; False if it must not stand there."""
        expects = self._expects
        if expects == "colon":
            self._expects = "value"
            return char == ":"
        if char == '"' and expects not in ("comma or end",):
            self._is_key = expects.startswith("key")
            self._expects = "string"
            return True
        if char in "]}" and expects.endswith("end"):
            return bool(self._closers) and self._close(char)
        if expects == "comma or end":
            self._expects = "key" if self._closers[-1] == "}" else "value"
            return char == ","
        return not expects.startswith("key") and self._value(char)

    def _value(self, char: str) -> bool:
        if char in "[{":
            self._closers.append("]" if char == "[" else "}")
            self._expects = "value or end" if char == "[" else "key or end"
            return len(self._closers) <= MAX_JSON_DEPTH
        self._expects = "number" if char in "-0123456789" else "literal"
        self._token = ""
        return char in "-0123456789tfn"

    def _close(self, char: str) -> bool:
        if char != self._closers.pop():
            return False
        self._value_done()
        return True

    def _value_done(self) -> None:
        self._expects = "comma or end"
        if not self._closers:
            self.status = "done"

    def _string(self, text: str, pos: int) -> int:
        plain = _PLAIN.match(text, pos)
        if plain:
            return plain.end()
        if text[pos] == "\\":
            self._expects = "escape"
        elif text[pos] == '"' and self._is_key:
            self._is_key, self._expects = False, "colon"
        elif text[pos] == '"':
            self._value_done()
        else:  # a control character
            self.status = "failed"
            return pos
        return pos + 1

    def _escape(self, char: str, pos: int) -> int:
        if char not in '"\\/bfnrtu':
            self.status = "failed"
            return pos
        self._expects, self._token = ("hex" if char == "u" else "string"), ""
        return pos + 1

    def _hex(self, char: str, pos: int) -> int:
        if char not in "0123456789abcdefABCDEF":
            self.status = "failed"
            return pos
        self._token += char
        if len(self._token) == 4:
            self._expects = "string"
        return pos + 1

    def _run(self, pattern: re.Pattern[str], text: str, pos: int) -> int:
        found = pattern.match(text, pos)
        if found:
            self._token += found.group()
            return found.end()
        self._end_token()
        return pos

    def _end_token(self) -> None:
        good = _NUMBER.fullmatch(self._token) if self._expects == "number" else self._token in _LITERALS
        if good:
            self._value_done()
        else:
            self.status = "failed"


class CallReader:
    """Reads the object of one call.

    The call begins when its name is known and its arguments have begun. Arguments are passed on as they are written;
    missing ones and `null` count as `{}`, and a string that holds an object (a habit of some models) as that object.
    Other keys are skipped.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.status: Status = "going"
        self._arguments: str | None = None
        """What is known of the arguments and was not yet taken."""
        self._has_arguments = False
        self._expects = "object"
        self._key = ""
        self._text = ""
        self._scanner = JsonScanner()

    @property
    def begun(self) -> bool:
        """Whether it is certain that this is a call."""
        return self.name is not None and self._has_arguments

    @property
    def complete(self) -> bool:
        """Whether name and arguments are there in full, be the object closed or not."""
        return self.status == "done" or (self.begun and self._expects in ("comma or end", "key"))

    def feed(self, text: str) -> int:
        """Read on; return how many characters belong to the call. What follows is left to the caller."""
        pos = 0
        while pos < len(text) and self.status == "going":
            pos = self._step(text, pos)
        return pos

    def take(self) -> str:
        """Return the arguments that came in since the last time; only for a call that has begun."""
        taken, self._arguments = self._arguments or "", ""
        return taken

    def _step(self, text: str, pos: int) -> int:
        if self._expects in ("in key", "in value"):
            return self._scan(text, pos)
        if text[pos] in _SPACE:
            return pos + 1
        # The scanner takes keys and values from their first character on.
        begins_token = self._expects == "value" or (self._expects.startswith("key") and text[pos] == '"')
        self._structure(text[pos])
        return pos if begins_token or self.status == "failed" else pos + 1

    def _structure(self, char: str) -> None:
        match self._expects, char:
            case "object", "{":
                self._expects = "key or end"
            case (("key or end" | "key"), '"'):
                self._begin("in key")
            case "colon", ":":
                self._expects = "value"
            case "value", _:
                self._begin("in value")
            case "comma or end", ",":
                self._expects = "key"
            case (("key or end" | "comma or end"), "}"):
                self._end()
            case _:
                self.status = "failed"

    def _begin(self, expects: str) -> None:
        self._expects, self._text, self._scanner = expects, "", JsonScanner()

    def _scan(self, text: str, pos: int) -> int:
        end = self._scanner.feed(text, pos)
        streams = self._expects == "in value" and self._key == "arguments" and (self._text or text[pos]).startswith("{")
        if streams:  # an object goes out as it comes in
            self._add_arguments(text[pos:end])
        if self._scanner.status == "failed":
            self.status = "failed"
        self._text = "{" if streams else self._text + text[pos:end]
        if self._scanner.status == "done":
            self._token_done()
        return end

    def _token_done(self) -> None:
        if self._expects == "in key":
            self._key, self._expects = json.loads(self._text), "colon"
            if (self._key == "name" and self.name is not None) or (self._key == "arguments" and self._has_arguments):
                self.status = "failed"
            return
        self._expects = "comma or end"
        if self._key == "name":
            name = json.loads(self._text) if self._text.startswith('"') else ""
            if not name or _has_surrogates(name):
                self.status = "failed"
            else:
                self.name = name
        elif self._key == "arguments" and not self._text.startswith("{"):
            self._foreign_arguments()

    def _foreign_arguments(self) -> None:
        """Arguments that are no object: null, or an object written as a string."""
        inner = json.loads(self._text) if self._text.startswith('"') else "{}" if self._text == "null" else ""
        scanner = JsonScanner()
        end = scanner.feed(inner)
        is_object = inner.lstrip(_SPACE).startswith("{") and scanner.status == "done" and not inner[end:].strip(_SPACE)
        if is_object and not _has_surrogates(inner):
            self._add_arguments(inner.strip(_SPACE))
        else:
            self.status = "failed"

    def _add_arguments(self, text: str) -> None:
        self._has_arguments = True
        self._arguments = (self._arguments or "") + text

    def _end(self) -> None:
        if self.name is None:
            self.status = "failed"
            return
        if not self._has_arguments:
            self._add_arguments("{}")
        self.status = "done"


def _has_surrogates(text: str) -> bool:
    """Whether text holds half of a surrogate pair (a lone `\\ud800` in JSON): it could not be sent as UTF-8."""
    return any("\ud800" <= char <= "\udfff" for char in text)
