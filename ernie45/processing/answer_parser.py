"""Take answers apart while they are written: thought, text for the user, tool calls.

    parser = AnswerParser(tokenizer.answer_format, start=tokenizer.answer_format.start(prompt), tools=True)
    for text in deltas:
        handle(parser.push(text))
    handle(parser.finish())

A whole answer is one `push`. Joined events (`joined`) depend on the text alone, never on how it was cut. Text that
might be the beginning of a tag waits until that is settled, so no event holds half of one. `docs/structured_output.md`
says what becomes of answers that do not keep to their format.
"""

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ernie45.processing.answer_format import AnswerFormat, Start
from ernie45.processing.call_reader import CallReader


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the thought."""

    text: str


@dataclass(frozen=True)
class ContentDelta:
    """More of the text for the user."""

    text: str


@dataclass(frozen=True)
class ToolCallBegun:
    """The model calls a tool."""

    index: int
    """Calls of an answer count from 0."""
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """More of a call's arguments, as the model wrote them."""

    index: int
    text: str


@dataclass(frozen=True)
class ToolCallEnded:
    """The call is over."""

    index: int
    error: str | None = None
    """Why the arguments are no JSON object, None if they are one."""


Event = ReasoningDelta | ContentDelta | ToolCallBegun | ArgumentsDelta | ToolCallEnded


def random_call_id() -> str:
    """An id for a tool call, in OpenAI's form."""
    return f"call_{secrets.token_hex(12)}"


class AnswerParser:
    """Parses one answer."""

    def __init__(
        self,
        answer_format: AnswerFormat,
        *,
        start: Start = "open",
        tools: bool = False,
        new_id: Callable[[], str] = random_call_id,
    ) -> None:
        """Begin an answer.

        Args: start: where the prompt leaves the model (`AnswerFormat.start`), "text" behind a text that the caller
            began. Of a turn that began in another way, what stands there is pushed first, its events thrown away.
            tools: whether calls are looked for; without, their tags are text. new_id: makes the ids of calls, in order.
        """
        self._format = answer_format
        self._call_tags = answer_format.tool_call if tools else None
        self._new_id = new_id
        self._events: list[Event] = []
        self._buffer = ""
        """Text that is not settled yet."""
        self._final = False
        self._gap = ""
        """Newlines in front of a call: dropped if it is one, content if not."""
        self._raw = ""
        """What a call consists of until it is certain that it is one."""
        self._reader = CallReader()
        self._num_calls = 0
        self._in_response = False
        self._has_content = False
        self._has_reasoning = False
        self._step = self._first_step(start)

    @property
    def in_thought(self) -> bool:
        """Whether the text so far ends inside the thought: its tokens count as reasoning."""
        return self._step == self._thought

    def push(self, text: str) -> list[Event]:
        """Add text; return what is certain now."""
        self._buffer += text
        return self._run()

    def finish(self) -> list[Event]:
        """The answer is over: return what was held back."""
        self._final = True
        return self._run()

    def _first_step(self, start: Start) -> Callable[[], bool]:
        if start == "text":
            self._in_response, self._has_content = self._format.response is not None, True
            return self._content
        if self._format.thought is None and self._format.response is None:
            return self._content
        if self._format.thought is None or start == "answer":
            return self._lead
        return self._thought if start == "thought" else self._open

    def _run(self) -> list[Event]:
        while self._step():
            pass
        events, self._events = self._events, []
        return joined(events)

    # Each state takes what is certain from the buffer. True means that there is more to do: another state, more text.

    def _open(self) -> bool:
        """Nothing yet: a thought, or the answer."""
        assert self._format.thought is not None, "formats without thoughts start elsewhere"
        found = self._ahead(self._format.thought[0])
        if found is None:
            return False
        self._step = self._thought if found else self._lead
        return True

    def _thought(self) -> bool:
        assert self._format.thought is not None, "only formats with thoughts get here"
        text, closing = self._buffer, self._format.thought[1]
        if not self._has_reasoning:
            text = text.lstrip("\n")
        end = text.find(closing)
        if end >= 0:
            self._reasoning(text[:end].rstrip("\n"))
            self._buffer = text[end + len(closing) :]
            self._step = self._lead
            return True
        settled = text if self._final else text[: len(text) - _overlap(text, closing)]
        settled = settled.rstrip("\n")  # newlines in front of the tag belong to it
        self._reasoning(settled)
        self._buffer = "" if self._final else text[len(settled) :]
        return False

    def _lead(self) -> bool:
        """Between the thought and the text: newlines, and the tag that opens the text."""
        if self._format.response is not None and not self._in_response:
            found = self._ahead(self._format.response[0])
            if found is None:
                return False
            if found:
                self._in_response = True
        self._buffer = self._buffer.lstrip("\n")
        if self._buffer:
            self._step = self._content
        return bool(self._buffer)

    def _content(self) -> bool:
        """Text for the user, up to the end of the response or to a call."""
        tags = self._awaited_tags()
        at, tag = min(((self._buffer.find(tag), tag) for tag in tags if tag in self._buffer), default=(-1, ""))
        if at >= 0:
            is_call = self._call_tags is not None and tag == self._call_tags[0]
            return self._call_start(at, tag) if is_call else self._response_end(at, tag)
        text, self._buffer = self._buffer, ""
        if tags and not self._final:
            kept = text[: len(text) - max(_overlap(text, tag) for tag in tags)].rstrip("\n")
            text, self._buffer = kept, text[len(kept) :]
        self._add_content(text)
        return False

    def _awaited_tags(self) -> list[str]:
        """The tags that mean something inside the text."""
        tags = [self._call_tags[0]] if self._call_tags else []
        return [*tags, self._format.response[1]] if self._format.response and self._in_response else tags

    def _response_end(self, at: int, tag: str) -> bool:
        """A closing tag ends the response if nothing but a call follows; otherwise the text talks about the tag."""
        rest = self._buffer[at + len(tag) :].lstrip()
        call = self._call_tags[0] if self._call_tags else None
        if not self._final and (not rest or (call and call.startswith(rest) and rest != call)):
            self._settle(at)
            return False
        if rest and not (call and rest.startswith(call)):
            return self._tag_is_text(at, tag)
        self._add_content(self._buffer[:at].removesuffix("\n"))
        self._in_response = False
        self._buffer, self._step = rest, self._content
        return bool(rest)

    def _call_start(self, at: int, tag: str) -> bool:
        """A tag opens a call if an object follows."""
        rest = self._buffer[at + len(tag) :]
        body = rest.lstrip()
        if not body and not self._final:
            self._settle(at)
            return False
        if not body.startswith("{"):
            return self._tag_is_text(at, tag)
        text = self._buffer[:at]
        kept = text.rstrip("\n")
        self._add_content(kept)
        self._gap = text[len(kept) :]
        self._raw = tag
        self._reader = CallReader()
        self._buffer, self._step = rest, self._call
        return True

    def _settle(self, at: int) -> None:
        """Give out the text in front of a tag that cannot be judged yet, but for newlines."""
        kept = self._buffer[:at].rstrip("\n")
        self._add_content(kept)
        self._buffer = self._buffer[len(kept) :]

    def _tag_is_text(self, at: int, tag: str) -> bool:
        end = at + len(tag)
        self._add_content(self._buffer[:end])
        self._buffer = self._buffer[end:]
        return True

    def _call(self) -> bool:
        reader, begun = self._reader, self._reader.begun
        read = reader.feed(self._buffer)
        if not begun:
            self._raw += self._buffer[:read]
        self._buffer = self._buffer[read:]
        if not begun and reader.begun:
            self._events.append(ToolCallBegun(self._num_calls, self._new_id(), reader.name or ""))
            begun = True
        if begun:
            self._arguments(reader.take())
        if reader.status == "done" or (self._final and reader.complete):
            return self._end_call(None)
        if reader.status == "failed":
            if begun:
                self._step = self._broken
                return True
            return self._call_is_text()
        if self._final:
            return self._end_call("the answer ends inside the arguments") if begun else self._call_is_text()
        return False

    def _call_is_text(self) -> bool:
        self._add_content(self._gap + self._raw)
        self._step = self._content
        return bool(self._buffer)

    def _end_call(self, error: str | None) -> bool:
        self._events.append(ToolCallEnded(self._num_calls, error))
        self._num_calls += 1
        self._step = self._call_end
        return bool(self._buffer)

    def _broken(self) -> bool:
        """Arguments that turned out to be no JSON: passed on as they stand, up to the closing tag."""
        assert self._call_tags is not None, "calls are looked for"
        closing, error = self._call_tags[1], "the arguments are no JSON object"
        end = self._buffer.find(closing)
        if end >= 0:
            self._arguments(self._buffer[:end].rstrip("\n"))
            self._buffer = self._buffer[end:]
            return self._end_call(error)
        if self._final:
            self._arguments(self._buffer.rstrip("\n"))
            self._buffer = ""
            return self._end_call(error)
        kept = self._buffer[: len(self._buffer) - _overlap(self._buffer, closing)].rstrip("\n")
        self._arguments(kept)
        self._buffer = self._buffer[len(kept) :]
        return False

    def _call_end(self) -> bool:
        """The closing tag; a call without one is complete all the same."""
        assert self._call_tags is not None, "calls are looked for"
        closing = self._call_tags[1]
        if self._final and closing.startswith(self._buffer.lstrip()):
            self._buffer = ""  # the answer was cut inside the tag
            return False
        if self._ahead(closing) is None:
            return False
        self._step = self._between
        return True

    def _between(self) -> bool:
        """After a call: another one, or text."""
        rest = self._buffer.lstrip()
        tags = self._awaited_tags()
        if self._final and not rest:
            self._buffer = ""
            return False
        if not self._final and any(tag.startswith(rest) and tag != rest for tag in tags):
            return False
        if any(rest.startswith(tag) for tag in tags) or not self._has_content:
            self._buffer = rest
        self._step = self._content
        return True

    def _ahead(self, tag: str) -> bool | None:
        """Whether `tag` comes next, after white space, and take it; None if that cannot be told yet."""
        rest = self._buffer.lstrip()
        if rest.startswith(tag):
            self._buffer = rest[len(tag) :]
            return True
        return None if not self._final and tag.startswith(rest) else False

    def _reasoning(self, text: str) -> None:
        if text:
            self._has_reasoning = True
            self._events.append(ReasoningDelta(text))

    def _add_content(self, text: str) -> None:
        if text:
            self._has_content = True
            self._events.append(ContentDelta(text))

    def _arguments(self, text: str) -> None:
        if text:
            self._events.append(ArgumentsDelta(self._num_calls, text))


def joined(events: Iterable[Event]) -> list[Event]:
    """Join deltas that follow each other and belong together."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        match last, event:
            case ((ReasoningDelta() | ContentDelta()), (ReasoningDelta() | ContentDelta())) if type(last) is type(
                event
            ):
                out[-1] = replace(last, text=last.text + event.text)
            case ArgumentsDelta(), ArgumentsDelta() if last.index == event.index:
                out[-1] = replace(last, text=last.text + event.text)
            case _:
                out.append(event)
    return out


@dataclass(frozen=True, kw_only=True)
class ParsedCall:
    """A whole tool call."""

    id: str
    name: str
    arguments: str
    """JSON text of an object, unless `error` says otherwise."""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class ParsedAnswer:
    """A whole answer; empty strings for what it does not have."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ParsedCall, ...] = ()


def collected(events: Iterable[Event]) -> ParsedAnswer:
    """Put the events of a whole answer together."""
    reasoning: list[str] = []
    content: list[str] = []
    calls: list[ParsedCall] = []
    for event in joined(events):
        match event:
            case ReasoningDelta():
                reasoning.append(event.text)
            case ContentDelta():
                content.append(event.text)
            case ToolCallBegun():
                calls.append(ParsedCall(id=event.id, name=event.name, arguments=""))
            case ArgumentsDelta():
                calls[event.index] = replace(calls[event.index], arguments=calls[event.index].arguments + event.text)
            case ToolCallEnded():
                calls[event.index] = replace(calls[event.index], error=event.error)
    return ParsedAnswer(reasoning="".join(reasoning), content="".join(content), tool_calls=tuple(calls))


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `tag`."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)
