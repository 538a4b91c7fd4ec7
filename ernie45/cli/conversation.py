"""The interactive part of `ernie chat`: questions and answers in a terminal."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace

import ernie45
from ernie45.cli.answer import Answer
from ernie45.cli.output import note
from ernie45.engine.prompts import prompt_ids
from ernie45.errors import RequestError
from ernie45.models.text import CausalLM
from ernie45.processing.tokenizer import Tokenizer

_HELP = """\
/help       this
/clear      forget the conversation
/system X   set the system message; without X, remove it
/exit       leave (or Ctrl-D); Ctrl-C stops an answer
Anything else is a question; a space in front of / makes it one, too."""
USUAL_LIMIT = 2048
"""Most tokens of an answer unless `--max-tokens` says otherwise: a model that repeats itself would fill its context."""


@dataclass
class Conversation:
    """A conversation with one model."""

    model: CausalLM
    tokenizer: Tokenizer
    sampling: ernie45.SamplingParams
    system: str | None
    thinking: bool | None
    messages: list[dict[str, str]] = field(default_factory=list)

    def run(self) -> int:
        """Read questions until the end of input. Raises: KeyboardInterrupt at the second Ctrl-C in a row."""
        import readline  # noqa: F401  # line editing and history for input()

        note(_HELP)
        interrupted = False
        while True:
            try:
                line = _read_line()
            except EOFError:
                note("")
                return 0
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                note("\n(Ctrl-D or /exit leaves, and so does Ctrl-C once more)")
                continue
            interrupted = False
            if line.startswith("/"):
                if not self._command(*line.strip().partition(" ")[::2]):
                    return 0
            elif line.strip():
                self._turn(line.strip())

    def _command(self, name: str, argument: str) -> bool:
        """Carry out a command; False ends the conversation."""
        if name in ("/exit", "/quit"):
            return False
        if name == "/clear":
            self.messages.clear()
            note("[forgotten]")
        elif name == "/system":
            self.system = argument.strip() or None
            note("[system message set]" if self.system else "[no system message]")
        elif name == "/help":
            note(_HELP)
        else:
            note(f"unknown command {name}\n{_HELP}")
        return True

    def _turn(self, question: str) -> None:
        """Ask and print; what was said of an interrupted answer stays in the conversation, an empty answer does not.

        Thoughts are shown and then forgotten, as the models are trained.
        """
        self.messages.append({"role": "user", "content": question})
        count, start = 0, time.monotonic()
        ending = ""
        answer: Answer | None = None
        try:
            ids = self._prompt_ids()
            answer = Answer(self.tokenizer, ids, self.sampling.stop)
            sampling = limited(self.sampling, self.model, len(ids))
            for piece in ernie45.generate(self.model, self.tokenizer, ids, sampling):
                answer.add(piece)
                count += len(piece.ids)
                ending = ", stopped at the limit" if piece.finish_reason == "length" else ""
        except KeyboardInterrupt:
            ending = ", interrupted"
            if answer is not None:
                answer.end()
        except RequestError as error:
            self.messages.pop()
            note(f"error: {error}; /clear forgets the conversation")
            return
        print()
        note(f"[{count} tokens, {count / (time.monotonic() - start):.1f} tokens/s{ending}]")
        if answer is not None and answer.content:
            self.messages.append({"role": "assistant", "content": answer.content})
        else:
            self.messages.pop()

    def _prompt_ids(self) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return prompt_ids(self.tokenizer, [*system, *self.messages], thinking=self.thinking)


def limited(sampling: ernie45.SamplingParams, model: CausalLM, num_prompt: int) -> ernie45.SamplingParams:
    """The parameters with a limit of tokens, the usual one where none was asked for and the context has that room."""
    room = model.config.max_position_embeddings - num_prompt
    if sampling.max_tokens is not None or room < 1:
        return sampling
    return replace(sampling, max_tokens=min(USUAL_LIMIT, room))


def _read_line() -> str:
    if sys.stdout.isatty():
        return input("> ")
    # Answers go to a file: the prompt must not.
    print("> ", end="", file=sys.stderr, flush=True)
    return input()
