"""The published chat formats of ERNIE 4.5, written out: the reference for rendering where a checkpoint brings no
template.

Source: reference architecture 5.2 to 5.5 and 3.10, training 3.2. A format gets checked messages whose strings are
already protected, so all it does is put texts together. What a format has no words for is a RequestError that names it.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ernie45.errors import RequestError
from ernie45.processing.messages import Message, Part
from ernie45.processing.prompt import IMAGE_MARKER, VIDEO_MARKER
from ernie45.processing.tool_text import call_json

BEGIN = "<|begin_of_sentence|>"
END_OF_SENTENCE = "<|end_of_sentence|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

Thinking = Literal["never", "optional", "always"]
"""Whether a model thinks before it answers; "optional" means that the request decides."""

# 5.5; used when the conversation brings no system text.
VL_THINKING_SYSTEM = (
    "You are a multimodal AI assistant called ERNIE developed by Baidu based on the PaddlePaddle framework."
)


class ChatFormat(Protocol):
    """A way to write a conversation down."""

    @property
    def name(self) -> str:
        """What the format is called."""
        ...

    @property
    def stop(self) -> str:
        """The marker that ends an assistant turn."""
        ...

    @property
    def thinking(self) -> Thinking:
        """Whether assistant turns hold a thought."""
        ...

    @property
    def has_tools(self) -> bool:
        """Whether tools, calls and results can be written."""
        ...

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        thinking: bool | None,
        add_generation_prompt: bool,
    ) -> str:
        """Write the conversation; RequestError for what the format cannot express."""
        ...


@dataclass(frozen=True, kw_only=True)
class SpeakerFormat:
    """`User: ..` and `Assistant: ..` after a begin token: the text, the vision and the vision-thinking models."""

    name: str
    stop: str = END_OF_SENTENCE
    user_end: str
    """Follows a user's text."""
    assistant: str
    """Opens an assistant turn."""
    thought: tuple[str, str] | None = None
    """What stands before and after a thought; None where the format has no thinking."""
    prompt_thinking: str = ""
    """Generation prompt after `assistant`, the model thinks."""
    prompt_answering: str = ""
    """Generation prompt after `assistant`, the model answers at once."""
    thinks_by_default: bool = False
    default_system: str | None = None
    has_tools: bool = False
    has_media: bool = False

    @property
    def thinking(self) -> Thinking:
        """See `ChatFormat`."""
        return "never" if self.thought is None else "optional"

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        thinking: bool | None,
        add_generation_prompt: bool,
    ) -> str:
        """See `ChatFormat`."""
        if thinking and self.thought is None:
            raise RequestError(f"the chat format {self.name} has no thinking: leave thinking out")
        if tools and not self.has_tools:
            raise RequestError(f"the chat format {self.name} has no tools: leave tools out")
        leading = _num_leading_system(messages)
        out = [BEGIN]
        if leading == 0 and self.default_system is not None:
            out.append(self.default_system + "\n")
        out += [message.text + "\n" for message in _without_media(messages[:leading], self.name)]
        if tools:
            # Training 3.2: the list follows the system text's own newline with another one.
            out.append(f"\n<tool_list>\n{_tool_list(tools)}\n</tool_list>\n")
        counts: Counter[str] = Counter()
        out += [self._turn(message, counts) for message in messages[leading:]]
        if add_generation_prompt:
            thinks = self.thinks_by_default if thinking is None else thinking
            out.append(self.assistant + (self.prompt_thinking if thinks else self.prompt_answering))
        return "".join(out)

    def _turn(self, message: Message, counts: Counter[str]) -> str:
        _refuse_name(message, self.name)
        if message.role == "user":
            return "User: " + self._content(message, counts) + self.user_end
        if message.role == "tool":
            if not self.has_tools:
                raise RequestError(f"messages[{message.idx}]: the chat format {self.name} has no tool results")
            # 5.5 closes with a blank line and "Assistant: "; the second newline is the one that `assistant` opens with.
            return f"User: <tool_output>\n{self._content(message, counts)}\n</tool_output>\n"
        _without_media([message], self.name)
        return message.text + "\n" if message.role == "system" else self._assistant_turn(message)

    def _assistant_turn(self, message: Message) -> str:
        out = [self.assistant]
        if message.reasoning is not None:
            if self.thought is None:
                raise RequestError(
                    f"messages[{message.idx}]: the chat format {self.name} has no thinking: leave reasoning_content out"
                )
            out += [self.thought[0], message.reasoning.strip("\n"), self.thought[1]]
        out.append(message.text)
        if message.tool_calls:
            if not self.has_tools:
                raise RequestError(f"messages[{message.idx}]: the chat format {self.name} has no tool calls")
            calls = (f"<tool_call>\n{call_json(call)}\n</tool_call>" for call in message.tool_calls)
            out.append("\n".join(calls) + "\n")
        return "".join([*out, self.stop])

    def _content(self, message: Message, counts: Counter[str]) -> str:
        if not self.has_media:
            _without_media([message], self.name)
        return "".join(part.text if part.kind == "text" else _media_text(part, counts) for part in message.parts)


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """Blocks between `<|im_start|>` and `<|im_end|>`: the 21B thinking model (5.4)."""

    name: str
    stop: str = IM_END
    # Unconfirmed in the published sources, hence fields: what follows a thought (one or two newlines are seen), and
    # whether a tool result is a user block (PaddleFormers) or a block of its own role (LLaMA-Factory: "tool").
    after_thought: str = "\n</think>\n\n"
    tool_result_role: str = "user"
    thinking: Thinking = "always"
    has_tools: bool = True

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        thinking: bool | None,
        add_generation_prompt: bool,
    ) -> str:
        """See `ChatFormat`. The published template writes its generation prompt always, this one only when asked to."""
        if thinking is False:
            raise RequestError(f"the chat format {self.name} always thinks: thinking cannot be switched off")
        leading = _num_leading_system(messages)
        system = "\n".join(message.text for message in _without_media(messages[:leading], self.name))
        out = [f"{IM_START}system\n"]
        if leading:
            out.append(f"<system_setting>\n{system}\n</system_setting>\n\n")
        out.append("<global_setting>\nthink_mode=True\n</global_setting>")
        if tools:
            out.append(f"\n\n<tool_list>\n{_tool_list(tools)}\n</tool_list>")
        out.append(f"{IM_END}\n\n")
        out += [self._turn(message) for message in _without_media(messages[leading:], self.name)]
        if add_generation_prompt:
            out.append(f"{IM_START}assistant\n<think>\n")
        return "".join(out)

    def _turn(self, message: Message) -> str:
        _refuse_name(message, self.name)
        match message.role:
            case "user":
                return f"{IM_START}user\n{message.text}{IM_END}\n\n"
            case "tool":
                wrapped = f"<tool_response>\n{message.text}\n</tool_response>"
                return f"{IM_START}{self.tool_result_role}\n{wrapped}{IM_END}\n\n"
            case "assistant":
                return f"{IM_START}assistant\n{self._answer(message)}{IM_END}\n\n"
        raise RequestError(
            f"messages[{message.idx}]: the chat format {self.name} takes system text at the start only: move it there"
        )

    def _answer(self, message: Message) -> str:
        out = []
        if message.reasoning is not None:
            out += ["<think>\n", message.reasoning.strip("\n"), self.after_thought]
        if message.text:
            out.append(f"<response>\n{message.text}\n</response>\n")
        out += [f"\n<tool_call>\n{call_json(call)}\n</tool_call>\n" for call in message.tool_calls]
        return "".join(out)


_EMPTY_THOUGHT = "<think>\n\n</think>\n\n"

FORMATS: dict[str, ChatFormat] = {
    "ernie": SpeakerFormat(name="ernie", user_end="\n", assistant="Assistant: "),
    "ernie_vl": SpeakerFormat(
        name="ernie_vl",
        user_end="",
        assistant="\nAssistant: ",
        thought=("<think>\n", "\n</think>\n"),
        prompt_thinking="<think>",
        prompt_answering=_EMPTY_THOUGHT,
        has_media=True,
    ),
    "ernie_thinking": BlockFormat(name="ernie_thinking"),
    "ernie_vl_thinking": SpeakerFormat(
        name="ernie_vl_thinking",
        user_end="",
        assistant="\nAssistant: ",
        thought=("\n<think>\n", "\n</think>\n\n"),
        prompt_thinking="\n<think>\n",
        prompt_answering="\n" + _EMPTY_THOUGHT,
        # The serving switch `thinking_mode` has no published default; the model is made for thinking.
        thinks_by_default=True,
        default_system=VL_THINKING_SYSTEM,
        has_tools=True,
        has_media=True,
    ),
}


def _num_leading_system(messages: Sequence[Message]) -> int:
    return next((idx for idx, message in enumerate(messages) if message.role != "system"), len(messages))


def _without_media(messages: Iterable[Message], format_name: str) -> list[Message]:
    checked = list(messages)
    for message in checked:
        if message.role == "system":
            _refuse_name(message, format_name)
        if message.media:
            kind = message.media[0].kind
            raise RequestError(
                f"messages[{message.idx}]: the chat format {format_name} takes no {kind}_url part in the role"
                f" {message.role}: send text"
            )
    return checked


def _refuse_name(message: Message, format_name: str) -> None:
    # On tool results a name repeats which call is answered, and the order says that already.
    if message.name is not None and message.role != "tool":
        raise RequestError(f"messages[{message.idx}]: the chat format {format_name} has no names: leave name out")


def _media_text(part: Part, counts: Counter[str]) -> str:
    counts[part.kind] += 1
    if part.kind == "image":
        return f"Picture {counts['image']}:<|IMAGE_START|>{IMAGE_MARKER}<|IMAGE_END|>"
    return f"Video {counts['video']}:<|VIDEO_START|>{VIDEO_MARKER}<|VIDEO_END|>"


def _tool_list(tools: Iterable[dict[str, Any]]) -> str:
    return f"[{', '.join(json.dumps(tool, ensure_ascii=False) for tool in tools)}]"
