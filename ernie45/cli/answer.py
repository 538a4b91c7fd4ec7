"""An answer in a terminal: the text goes to stdout, the thought in front of it to stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ernie45.cli.output import shown
from ernie45.engine.pieces import Piece
from ernie45.engine.stops import StopChecker
from ernie45.processing.answer_format import PLAIN
from ernie45.processing.answer_parser import AnswerParser, ContentDelta, Event, ReasoningDelta
from ernie45.processing.detokenizer import Detokenizer
from ernie45.processing.tokenizer import Tokenizer

_DIM, _PLAIN_STYLE = "\x1b[2m", "\x1b[22m"


class Answer:
    """Takes the pieces of one answer apart and prints them, unless told not to.

    The tags around a thought are special tokens as a rule, which `Piece.text` leaves out. Where a format has tags, ids
    are decoded here once more, tags included, and cut at the stop string that ended the piece.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: tuple[str, ...],
        *,
        raw: bool = False,
        quiet: bool = False,
    ) -> None:
        """Begin an answer to `prompt`; `raw` takes nothing apart, `quiet` prints nothing."""
        self.reasoning = ""
        self.content = ""
        self._quiet = quiet
        self._thinking = False
        answer_format = PLAIN if raw else tokenizer.answer_format
        self._parser = AnswerParser(
            answer_format, start="answer" if answer_format is PLAIN else tokenizer.answer_start(prompt)
        )
        self._detokenizer = None
        if answer_format is not PLAIN:
            self._detokenizer = Detokenizer(tokenizer, keep=tokenizer.answer_tag_ids)
        self._stops = StopChecker(stop)

    def add(self, piece: Piece) -> None:
        """Take the next piece; the one with a finish reason ends the answer."""
        self._take(self._parser.push(self._text(piece)))
        if piece.finish_reason is not None:
            self.end()

    def end(self) -> None:
        """Show what was held back: the answer is over, or was interrupted."""
        self._take(self._parser.finish())
        if self._thinking:
            self._leave_thought()

    def _text(self, piece: Piece) -> str:
        if self._detokenizer is None:
            return piece.text
        ended = piece.finish_reason is not None
        text = "".join(self._detokenizer.push(i) for i in piece.ids if i != piece.stop_reason)
        text, met = self._stops.push(text + (self._detokenizer.finish() if ended else ""), armed=True)
        return text + (self._stops.finish() if ended and met is None else "")

    def _take(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, ReasoningDelta):
                self.reasoning += event.text
                self._think(event.text)
            elif isinstance(event, ContentDelta):
                if self._thinking:
                    self._leave_thought()
                self.content += event.text
                if not self._quiet:
                    print(shown(event.text), end="", flush=True)

    def _think(self, text: str) -> None:
        if self._quiet:
            return
        style = _DIM if not self._thinking and sys.stderr.isatty() else ""
        print(style + shown(text, sys.stderr), end="", file=sys.stderr, flush=True)
        self._thinking = True

    def _leave_thought(self) -> None:
        self._thinking = False
        print(_PLAIN_STYLE if sys.stderr.isatty() else "", end="\n\n", file=sys.stderr, flush=True)
