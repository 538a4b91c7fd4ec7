"""A checkpoint's own chat template: compiled once, rendered in the sandbox, its failures turned into clear errors."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import meta

from ernie45.errors import CheckpointError, RequestError
from ernie45.processing.formats import BEGIN, END_OF_SENTENCE, FORMATS, IM_END, IM_START, Thinking
from ernie45.processing.messages import Message, Part
from ernie45.processing.sandbox import (
    MAX_SOURCE_CHARS,
    Guard,
    GuardedEnvironment,
    TemplateLimitError,
    TemplateRefusedError,
    render_guarded,
)
from ernie45.processing.tool_text import instructions, mentions_tools, without_tools

# What a template that is broken or asks for the impossible can raise, apart from Jinja's own errors.
_FAILURES = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)

# The format that a template follows, told from what it writes; the first line whose texts all occur decides. It settles
# which marker ends an answer and which parser reads it.
_SIGNS = (
    ("ernie_thinking", ("think_mode=",)),
    ("ernie_vl_thinking", (BEGIN, "<tool_output>")),
    ("ernie_vl_thinking", (BEGIN, "<tool_list>")),
    ("ernie_vl", (BEGIN, "<think>")),
    ("ernie_vl", (BEGIN, "<|IMAGE_START|>")),
    ("ernie", (BEGIN,)),
    ("ernie", ("User: ", "Assistant: ", END_OF_SENTENCE)),
    ("chatml", (IM_START,)),
)
CHATML = "chatml"
CUSTOM = "custom"


@dataclass(frozen=True)
class _Compiled:
    template: jinja2.Template
    source: str
    names: frozenset[str]
    """Variables that the template reads from outside."""


class ChatTemplate:
    """The chat template (or templates, by name) of a checkpoint."""

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, str], origin: str) -> None:
        """Compile.

        Args: sources: template text by name; "default" is used, and "tool_use" where there are tools. variables: what
            the templates may read besides the conversation, such as `bos_token`. origin: where they come from, for
            errors.
        Raises: CheckpointError if one is too long, no valid Jinja, or uses what the sandbox does not offer.
        """
        if not sources.keys() & {"default", "tool_use"}:
            raise CheckpointError(f"{origin} has chat templates {sorted(sources)}, expected one named 'default'")
        self.sources = dict(sources)
        self._variables = dict(variables)
        self._origin = origin
        environment = GuardedEnvironment()
        self._compiled = {
            name: _compile(environment, text, f"{origin} (template {name!r})") for name, text in sources.items()
        }
        whole = " ".join(sources.values())
        self.format_name = _told_format(whole)
        self.lends_tools = self.format_name == CHATML and "tool" not in whole
        """Whether tools go into the texts of messages (`tool_text.py`), since the template knows nothing of them."""

    @property
    def stop(self) -> str | None:
        """The marker that ends an assistant turn, None if it cannot be told."""
        return (
            IM_END
            if self.format_name == CHATML
            else FORMATS[self.format_name].stop
            if self.format_name in FORMATS
            else None
        )

    @property
    def written_text(self) -> str:
        """Everything that the templates can write on their own."""
        return "".join([*self.sources.values(), *self._variables.values()])

    @property
    def takes_thoughts_apart(self) -> bool:
        """Whether the template handles the thoughts of earlier turns."""
        return "reasoning_content" in self.written_text or "</think>" in self.written_text

    @property
    def thinking(self) -> Thinking:
        """Whether the model thinks; what writes the end of thoughts and has no switch is for models that always do."""
        return self._thinking(self._choose(False))

    @property
    def has_tools(self) -> bool:
        """Whether tools can be expressed, by the template itself or in the texts of messages."""
        return self.lends_tools or "tools" in self._choose(True).names

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        thinking: bool | None,
        add_generation_prompt: bool,
    ) -> str:
        """Render shielded messages and tools.

        Raises: RequestError if the template refuses or cannot express the conversation, or exceeds a limit.
        """
        if self.lends_tools and mentions_tools(messages, tools):
            told = without_tools(messages, tools, self._default_system() if tools else "")
            text = self._write(told, (), thinking, add_generation_prompt)
            if tools and instructions(tools) not in text:
                raise RequestError(
                    f"the chat template in {self._origin} leaves system text out, where tools would stand: leave tools out"
                )
        else:
            text = self._write(messages, tools, thinking, add_generation_prompt)
        _check_system_kept(messages, text)
        return text

    def _write(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        thinking: bool | None,
        add_generation_prompt: bool,
    ) -> str:
        chosen = self._choose(bool(tools))
        self._check_expressible(chosen, messages, tools, thinking)
        variables: dict[str, Any] = {
            **self._variables,
            "messages": [_as_dict(message, chosen.source) for message in messages],
            "tools": list(tools) or None,
            "add_generation_prompt": add_generation_prompt,
        }
        if thinking is not None:
            variables["enable_thinking"] = thinking
        try:
            return render_guarded(chosen.template, variables, Guard())
        except TemplateRefusedError as error:
            raise RequestError(f"the checkpoint's chat template refuses this conversation: {error}") from error
        except TemplateLimitError as error:
            raise RequestError(
                f"the chat template in {self._origin} was stopped: {error}; shorten the messages, or choose a built-in"
                f" chat_format ({', '.join(FORMATS)})"
            ) from error
        except (jinja2.TemplateError, *_FAILURES) as error:
            raise RequestError(
                f"the chat template in {self._origin} cannot render this conversation:"
                f" {type(error).__name__}: {error}; a built-in chat_format ({', '.join(FORMATS)}) may do"
            ) from error

    def _default_system(self) -> str:
        """What the template says where a conversation has no system text; empty if nothing, or if that cannot be told.

        Asked anew each time: some templates write the date.
        """
        system, user = (
            Message(idx=idx, role=role, parts=(Part(kind="text", text=f"the text of {role}"),))
            for idx, role in enumerate(("system", "user"))
        )
        try:
            given, missing = (self._write(asked, (), None, False) for asked in ((system, user), (user,)))
        except RequestError:
            return ""
        before, found, behind = given.partition(system.text)
        if not found or not (missing.startswith(before) and missing.endswith(behind)):
            return ""
        default = missing[len(before) : len(missing) - len(behind)]
        return "" if IM_START in default else default

    def _thinking(self, chosen: _Compiled) -> Thinking:
        if "enable_thinking" in chosen.names:
            return "optional"
        return "always" if self.format_name == "ernie_thinking" or "</think>" in chosen.source else "never"

    def _choose(self, has_tools: bool) -> _Compiled:
        order = ("tool_use", "default") if has_tools else ("default", "tool_use")
        return next(self._compiled[name] for name in order if name in self._compiled)

    def _check_expressible(
        self, chosen: _Compiled, messages: Sequence[Message], tools: Sequence[object], thinking: bool | None
    ) -> None:
        what = f"the chat template in {self._origin}"
        if tools and "tools" not in chosen.names:
            raise RequestError(f"{what} has no tools: leave tools out")
        if (thinking, self._thinking(chosen)) in ((True, "never"), (False, "always")):
            raise RequestError(f"{what} {'has no thinking' if thinking else 'always thinks'}: leave thinking out")
        for message in messages:
            where = f"messages[{message.idx}]"
            if message.tool_calls and "tool_calls" not in chosen.source:
                raise RequestError(f"{where}: {what} has no tool calls")
            if message.role == "tool" and "tool" not in chosen.source:
                raise RequestError(f"{where}: {what} has no tool results")
            if message.reasoning is not None and not self.takes_thoughts_apart:
                raise RequestError(f"{where}: {what} has no thinking: leave reasoning_content out")
            for part in message.media:
                if part.kind not in chosen.source:
                    raise RequestError(f"{where}: {what} takes no {part.kind}_url part: send text")


def _compile(environment: GuardedEnvironment, source: str, where: str) -> _Compiled:
    if len(source) > MAX_SOURCE_CHARS:
        raise CheckpointError(f"{where} has {len(source)} characters, the limit is {MAX_SOURCE_CHARS}")
    try:
        template, tree = environment.build(source)
        names = frozenset(meta.find_undeclared_variables(tree))
    except (jinja2.TemplateError, TemplateLimitError, SyntaxError, *_FAILURES) as error:
        raise CheckpointError(
            f"{where} is no usable chat template: {type(error).__name__}: {error}; choose a built-in chat_format"
            f" ({', '.join(FORMATS)}) to do without it"
        ) from error
    return _Compiled(template, source, names)


def _told_format(text: str) -> str:
    return next((name for name, signs in _SIGNS if all(sign in text for sign in signs)), CUSTOM)


def _as_dict(message: Message, source: str) -> dict[str, Any]:
    """The form in which templates read a message. Content is text wherever it can be: not all templates take parts."""
    out: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.media:
        out["content"] = [part.source or {"type": "text", "text": part.text} for part in message.parts]
    if message.reasoning is not None:
        if "reasoning_content" in source:
            out["reasoning_content"] = message.reasoning
        else:
            # The template looks for thoughts in the content. These markers are ours, so they are not shielded.
            out["content"] = f"<think>\n{message.reasoning}\n</think>\n\n{message.text}"
    if message.tool_calls:
        out["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    optional = {"tool_call_id": message.tool_call_id, "name": message.name}
    return out | {key: value for key, value in optional.items() if value is not None}


def _check_system_kept(messages: Sequence[Message], rendered: str) -> None:
    for message in messages:
        text = message.text.strip()
        if (
            message.role == "system"
            and text not in rendered
            and json.dumps(text, ensure_ascii=False)[1:-1] not in rendered
        ):
            raise RequestError(
                f"messages[{message.idx}]: the checkpoint's chat template leaves system text out: move it into the"
                " first user message"
            )
