"""`ernie chat`: one answer to a prompt, or a conversation in the terminal."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ernie45
from ernie45.cli.output import ProgressBar, note, print_json
from ernie45.engine.reference import Piece, Prompt, prompt_ids
from ernie45.errors import RequestError, UsageError
from ernie45.models.text import CausalLM
from ernie45.processing.tokenizer import Tokenizer
from ernie45.store.location import resolve

_HELP = """\
/help       this
/clear      forget the conversation
/system X   set the system message
/exit       leave (or Ctrl-D); Ctrl-C stops an answer"""
# What generation_config.json may preset, by our names.
_PRESETS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def run(options: argparse.Namespace) -> int:
    """Load the model, then answer once or converse."""
    model_arg, prompt = _model_and_prompt(options)
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
        if not prompt.strip():
            raise UsageError("the prompt is empty: give it as an argument or through a pipe")
    path = resolve(model_arg)
    chat = _load(path, options)
    if prompt is not None:
        return chat.once(prompt, as_json=options.json)
    if options.raw or options.json:
        raise UsageError("--raw and --json need a prompt")
    return chat.converse()


def _model_and_prompt(options: argparse.Namespace) -> tuple[str | None, str | None]:
    """`ernie chat "a question"` asks the default model: one argument that is no model is the prompt."""
    lone = options.model if options.prompt is None else None
    if lone is not None and any(c.isspace() for c in lone) and not Path(lone).exists():
        return None, lone
    return options.model, options.prompt


def _load(path: Path, options: argparse.Namespace) -> _Chat:
    tokenizer = ernie45.load_tokenizer(path)
    start = time.monotonic()
    model = ernie45.load_model(path, options.dtype, options.device, progress=ProgressBar("loading"))
    if sys.stderr.isatty():
        note(f"{path.name}: loaded in {time.monotonic() - start:.1f} s as {str(model.dtype).removeprefix('torch.')}")
    return _Chat(model, tokenizer, _sampling(path, options), options.system, options.thinking, options.raw)


def _sampling(path: Path, options: argparse.Namespace) -> ernie45.SamplingParams:
    """The model's own defaults, overridden by what was asked for."""
    chosen: dict[str, Any] = {}
    file = path / "generation_config.json"
    if file.is_file():
        stated = json.loads(file.read_text(encoding="utf-8"))
        chosen = {name: stated[name] for name in _PRESETS if stated.get(name) is not None}
        if stated.get("do_sample") is False:
            chosen["temperature"] = 0.0
    asked = {name: getattr(options, name) for name in (*_PRESETS, "max_tokens", "seed")}
    chosen |= {name: value for name, value in asked.items() if value is not None}
    return ernie45.SamplingParams(**chosen, stop=tuple(options.stop))


@dataclass
class _Chat:
    """A conversation with one model."""

    model: CausalLM
    tokenizer: Tokenizer
    sampling: ernie45.SamplingParams
    system: str | None
    thinking: bool | None
    raw: bool
    messages: list[dict[str, str]] = field(default_factory=list)

    def once(self, prompt: str, *, as_json: bool) -> int:
        """Answer one prompt and leave."""
        if as_json:
            pieces = list(self._pieces(self._prompt(prompt)))
            print_json(self._summary(prompt, pieces))
            return 0
        for piece in self._pieces(self._prompt(prompt)):
            print(piece.text, end="", flush=True)
        print()
        return 0

    def converse(self) -> int:
        """Read questions until the end of input."""
        import readline  # noqa: F401  # line editing and history for input()

        note(_HELP)
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return 0
            if line in ("/exit", "/quit"):
                return 0
            if line == "/clear":
                self.messages.clear()
            elif line.startswith("/system"):
                self.system = line.removeprefix("/system").strip() or None
            elif line.startswith("/"):
                note(_HELP)
            elif line:
                self._turn(line)

    def _turn(self, question: str) -> None:
        self.messages.append({"role": "user", "content": question})
        answer, count, start = "", 0, time.monotonic()
        try:
            for piece in self._pieces(self._with_system(self.messages)):
                print(piece.text, end="", flush=True)
                answer += piece.text
                count += len(piece.ids)
        except KeyboardInterrupt:
            pass
        except RequestError as error:
            self.messages.pop()
            note(f"error: {error}; /clear forgets the conversation")
            return
        print()
        note(f"[{count} tokens, {count / (time.monotonic() - start):.1f} tokens/s]")
        self.messages.append({"role": "assistant", "content": answer})

    def _prompt(self, prompt: str) -> Prompt:
        return prompt if self.raw else self._with_system([{"role": "user", "content": prompt}])

    def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}, *messages] if self.system else messages

    def _pieces(self, prompt: Prompt) -> Any:
        return ernie45.generate(self.model, self.tokenizer, prompt, self.sampling, thinking=self.thinking)

    def _summary(self, prompt: str, pieces: list[Piece]) -> dict[str, Any]:
        ids = [i for piece in pieces for i in piece.ids]
        num_prompt = len(prompt_ids(self.tokenizer, self._prompt(prompt), thinking=self.thinking))
        return {
            "text": "".join(piece.text for piece in pieces),
            "ids": ids,
            "finish_reason": pieces[-1].finish_reason,
            "usage": {
                "prompt_tokens": num_prompt,
                "completion_tokens": len(ids),
                "total_tokens": num_prompt + len(ids),
            },
        }
