"""The interactive chat: commands, Ctrl-C, Ctrl-D, and once the real thing on a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import ernie45
from ernie45.cli import conversation
from ernie45.cli.conversation import Conversation
from ernie45.errors import RequestError
from ernie45.processing.answer_format import PLAIN

HELP = conversation._HELP
Talk = Callable[..., tuple[int, str, str]]


class Model:
    """Answers with the question in capitals, keeping the messages that it was given; acts up when asked to."""

    def __init__(self) -> None:
        self.asked: list[list[dict[str, str]]] = []

    def generate(self, _: object, __: object, messages: Any, *args: Any, **kwargs: Any) -> Iterator[ernie45.Piece]:
        self.asked.append(list(messages))
        question = messages[-1]["content"]
        if question == "too long":
            raise RequestError("prompt has 9 tokens, the model's context holds 8")
        if question != "silence":
            yield ernie45.Piece(text=question.upper(), ids=(1, 2))
        if question in ("interrupt", "silence"):
            raise KeyboardInterrupt
        yield ernie45.Piece(text="!", ids=(3,), finish_reason="length" if question == "long" else "stop")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    fake = Model()
    monkeypatch.setattr(ernie45, "generate", fake.generate, raising=False)
    monkeypatch.setattr(conversation, "prompt_ids", lambda tokenizer, messages, thinking: messages)
    return fake


@pytest.fixture
def talk(model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Types lines, an exception among them is raised instead; at the end Ctrl-D."""

    def run(*lines: str | type[BaseException], system: str | None = None) -> tuple[int, str, str]:
        typed = iter([*lines, EOFError])

        def read(prompt: str = "") -> str:
            line = next(typed)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        plain: Any = SimpleNamespace(answer_format=PLAIN)
        network: Any = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=256))
        code = Conversation(network, plain, ernie45.SamplingParams(), system, None).run()
        out, err = capsys.readouterr()
        assert err.startswith(HELP)
        return code, out, err.removeprefix(HELP + "\n").replace("> ", "")

    return run


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_turns_build_on_each_other_and_empty_lines_do_nothing(talk: Talk, model: Model) -> None:
    code, out, err = talk("one", "", "   ", " two ")
    assert (code, out) == (0, "ONE!\nTWO!\n")
    assert re.fullmatch(r"(\[3 tokens, [\d.]+ tokens/s\]\n){2}\n", err)
    assert model.asked == [[user("one")], [user("one"), assistant("ONE!"), user("two")]]


def test_clear_forgets_and_system_is_set_and_removed(talk: Talk, model: Model) -> None:
    talk("a", "/clear", "b", "/system  be kind ", "c", "/system", "d", system="start")
    system = {"role": "system"}
    assert model.asked == [
        [system | {"content": "start"}, user("a")],
        [system | {"content": "start"}, user("b")],
        [system | {"content": "be kind"}, user("b"), assistant("B!"), user("c")],
        [user("b"), assistant("B!"), user("c"), assistant("C!"), user("d")],
    ]


@pytest.mark.parametrize("command", ["/exit", "/quit", "/exit now"])
def test_exit_leaves_at_once(talk: Talk, model: Model, command: str) -> None:
    assert talk(command, "unheard")[0] == 0
    assert model.asked == []


def test_help_and_unknown_commands(talk: Talk, model: Model) -> None:
    assert talk("/help")[2] == f"{HELP}\n\n"
    assert talk("/systematic x")[2] == f"unknown command /systematic\n{HELP}\n\n"
    assert model.asked == []
    talk(" /etc is what?")
    assert model.asked == [[user("/etc is what?")]]


def test_control_c_stops_an_answer_and_keeps_what_was_said(talk: Talk, model: Model) -> None:
    code, out, err = talk("interrupt", "next")
    assert (code, out) == (0, "INTERRUPT\nNEXT!\n")
    assert "[2 tokens," in err
    assert "interrupted]" in err
    assert model.asked[1] == [user("interrupt"), assistant("INTERRUPT"), user("next")]


def test_an_answer_without_a_word_leaves_no_trace(talk: Talk, model: Model) -> None:
    talk("silence", "next")
    assert model.asked[1] == [user("next")]


def test_an_answer_that_was_cut_says_so(talk: Talk) -> None:
    assert "stopped at the limit]" in talk("long")[2]


def test_a_question_that_does_not_fit_is_taken_back(talk: Talk, model: Model) -> None:
    code, out, err = talk("one", "too long", "two")
    assert (code, out) == (0, "ONE!\nTWO!\n")
    assert "error: prompt has 9 tokens, the model's context holds 8; /clear forgets the conversation\n" in err
    assert model.asked[2] == [user("one"), assistant("ONE!"), user("two")]


def test_control_c_at_the_prompt_leaves_when_repeated(talk: Talk, model: Model) -> None:
    assert talk(KeyboardInterrupt, "one", KeyboardInterrupt, "two")[0] == 0
    assert len(model.asked) == 2
    with pytest.raises(KeyboardInterrupt):
        talk(KeyboardInterrupt, KeyboardInterrupt)


@pytest.mark.parametrize(
    ("asked", "prompt", "limit"),
    [(None, 100, 2048), (None, 3000, 1096), (None, 4096, None), (5, 10, 5), (9999, 10, 9999)],
)
def test_answers_have_a_limit_that_fits(asked: int | None, prompt: int, limit: int | None) -> None:
    network: Any = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=4096))
    params = ernie45.SamplingParams(max_tokens=asked, seed=3)
    assert conversation.limited(params, network, prompt) == ernie45.SamplingParams(max_tokens=limit, seed=3)


class Terminal:
    """A process on a pseudo-terminal, which is its controlling one: Ctrl-C is a signal."""

    def __init__(self, *argv: str) -> None:
        pid, self.master = pty.fork()
        if pid == 0:
            os.execv(sys.executable, [sys.executable, "-m", "ernie45.cli.main", *argv])
        self.pid = pid
        self.shown = b""

    def type(self, text: str) -> None:
        self.shown = b""
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern.encode(), self.shown):
            assert time.monotonic() < deadline, f"{pattern!r} did not appear in {self.shown!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.shown += os.read(self.master, 4096)

    def close(self, timeout_s: float = 60) -> int:
        """Wait for the end; returns the exit code."""
        deadline = time.monotonic() + timeout_s
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.master)
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.02)


def test_on_a_terminal(endless: str) -> None:
    terminal = Terminal("chat", endless, "--temperature", "0")
    terminal.wait_for(r"endless: loaded in [\d.]+ s as float32\r\n(.*\r\n)+> $")
    terminal.type("the quick\n")
    terminal.wait_for(r"the quick\r\n.")  # the echo, and a first piece of the answer
    terminal.type("\x03")
    terminal.wait_for(r"\[\d+ tokens, [\d.]+ tokens/s, interrupted\]\r\n(.*\r\n)*> $")
    terminal.type("/system x\n")
    terminal.wait_for(r"\[system message set\]\r\n(.*\r\n)*> $")  # earlier, line editing would not see the key
    terminal.type("\x04")
    assert terminal.close() == 0
