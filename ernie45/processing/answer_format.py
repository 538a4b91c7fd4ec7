"""The markup of answers: which tags a model puts around thoughts, responses and tool calls, and where an answer starts.

One table serves the parser of answers (`answer_parser.py`) and the grammars that force them (`grammar.py`). Sources:
reference architecture 5.2 to 5.6, inference 5.2; the Hermes tags are those of Qwen's and NousResearch's templates.
"""

from dataclasses import dataclass
from typing import Literal

Start = Literal["open", "thought", "answer", "text"]
"""What the prompt leaves to the model: it may open a thought, is inside one, has to answer, or goes on with a text that the
caller began (`continue_final_message`)."""
Tags = tuple[str, str]

_THINK: Tags = ("<think>", "</think>")
_RESPONSE: Tags = ("<response>", "</response>")
_TOOL_CALL: Tags = ("<tool_call>", "</tool_call>")


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """The tags of one kind of answer; None for what it does not have."""

    name: str
    thought: Tags | None = None
    """Around the thought, which is the first thing in an answer."""
    response: Tags | None = None
    """Around the text for the user; models leave them out at times."""
    tool_call: Tags | None = None
    """Around one call, `{"name": .., "arguments": {..}}`."""

    @property
    def tags(self) -> tuple[str, ...]:
        """All of them: the special tokens that text for the parser has to keep."""
        return tuple(tag for pair in (self.thought, self.response, self.tool_call) if pair for tag in pair)

    def start(self, prompt: str) -> Start:
        """Tell from the end of a rendered prompt where the answer starts; who had a text continued knows that it is "text"."""
        if self.thought is None:
            return "answer"
        opening, closing = self.thought
        end = prompt.rstrip()
        return "thought" if end.endswith(opening) else "answer" if end.endswith(closing) else "open"


PLAIN = AnswerFormat(name="plain")
ANSWER_FORMATS: dict[str, AnswerFormat] = {
    "ernie": PLAIN,
    "ernie_vl": AnswerFormat(name="ernie_vl", thought=_THINK),
    "ernie_thinking": AnswerFormat(name="ernie_thinking", thought=_THINK, response=_RESPONSE, tool_call=_TOOL_CALL),
    "ernie_vl_thinking": AnswerFormat(name="ernie_vl_thinking", thought=_THINK, tool_call=_TOOL_CALL),
}
"""Answers by chat format."""


def told_answer_format(chat_format: str, template: str, *, lends_tools: bool = False) -> AnswerFormat:
    """Return the answer format of a chat format; for one that is not ERNIE's, what its template writes decides.

    Args: lends_tools: tools are expressed in the texts of messages (`tool_text.py`), which say how to call.
    """
    if chat_format in ANSWER_FORMATS:
        return ANSWER_FORMATS[chat_format]
    thought = _THINK if _THINK[1] in template else None
    tool_call = _TOOL_CALL if lends_tools or _TOOL_CALL[0] in template else None
    return AnswerFormat(name="hermes", thought=thought, tool_call=tool_call) if thought or tool_call else PLAIN
