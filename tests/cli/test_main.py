"""The frame of the command line: help, verbs, exit codes, errors of one line, what a process leaves behind."""

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ernie45
from ernie45.cli import main as cli
from ernie45.cli import models as models_verb
from ernie45.cli.arguments import VERBS
from ernie45.errors import CapacityError, CheckpointError, NotFoundError

Ernie = Callable[..., Any]
PROCESS = [sys.executable, "-m", "ernie45.cli.main"]


def test_bare_command_shows_every_verb(ernie: Ernie) -> None:
    result = ernie()
    assert result.code == 0
    assert result.err == ""
    for verb in VERBS:
        assert f"ernie {verb}" in result.out
    assert result.out == ernie("--help").out == ernie("help").out == ernie("-h").out


def test_version(ernie: Ernie) -> None:
    assert ernie("--version") == (0, f"ernie45 {ernie45.__version__}\n", "")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_explains_every_option_and_shows_examples_that_parse(ernie: Ernie, verb: str) -> None:
    result = ernie(verb, "--help")
    assert result.code == 0
    assert result.out.startswith(f"usage: ernie {verb} ")
    assert result.out == ernie("help", verb).out
    parser = cli.build_parser(verb)
    assert all(action.help for action in parser._actions)
    assert len(VERBS[verb].examples) >= 2
    for command, _ in VERBS[verb].examples:
        assert command in result.out
        arguments = shlex.split(command.split("ernie ", 1)[1])
        assert arguments[0] == verb
        parser.parse_intermixed_args(arguments[1:])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["chta"], r"'chta' is no verb of ernie: did you mean `ernie chat`\?"),
        (["shwo", "tiny"], r"did you mean `ernie show`\?"),
        (["xyzzy"], f"there are {', '.join(VERBS)}"),
        (["--json"], r"'--json' is no verb"),
        (["chat", "--max-tokns", "5"], r"'--max-tokns' is not understood: did you mean --max-tokens\?"),
        (["models", "tiny"], r"'tiny' is not understood \(`ernie models --help`"),
        (["show"], r"required: MODEL \(`ernie show --help` shows"),
        (["convert", "tiny", "out"], r"required: --to"),
        (["convert", "tiny", "out", "--to", "onnx"], r"'onnx'.*pt.*paddle.*gguf"),
        (["convert", "tiny", "out", "--to", "pt", "--max-shard-size", "big"], r"'big' is no size: expected .*GB"),
        (["chat", "tiny", "hi", "--seed", "x"], r"--seed: invalid int value: 'x'"),
        (["chat", "tiny", "hi", "--think", "--no-think"], r"--no-think: not allowed with argument --think"),
        (["chat", "tiny", "hi", "there"], r"'there' is not understood"),
    ],
)
def test_wrong_usage_is_one_line_with_a_remedy_and_code_2(ernie: Ernie, argv: list[str], expected: str) -> None:
    code, out, err = ernie(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(expected, err)


@pytest.mark.parametrize("argv", [("--debug", "show", "nothing-here"), ("show", "nothing-here", "--debug")])
def test_traceback_with_debug_only(ernie: Ernie, argv: tuple[str, ...]) -> None:
    plain = ernie(*(word for word in argv if word != "--debug"))
    assert (plain.code, plain.out) == (4, "")
    assert plain.err.count("\n") == 1
    debug = ernie(*argv)
    assert debug.code == 4
    assert debug.err.startswith("Traceback")
    assert debug.err.endswith(plain.err)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (NotFoundError("gone"), 4, "error: gone\n"),
        (CheckpointError("two\nlines"), 1, "error: two lines\n"),
        (CapacityError("full"), 1, "error: full\n"),
        (OSError(errno.EACCES, "Permission denied", "/x/y"), 1, "error: /x/y: Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device\n"),
        (MemoryError(), 1, "error: out of memory: use a smaller model or a narrower --dtype\n"),
        (ImportError("no torch"), 1, "error: no torch (`ernie doctor` tells what is missing)\n"),
        (RuntimeError("odd"), 1, "error: unforeseen RuntimeError: odd (--debug shows the traceback)\n"),
        (KeyboardInterrupt(), 130, "\n"),
        (SystemExit(3), 3, ""),
    ],
)  # fmt: skip
def test_exit_codes(
    ernie: Ernie, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(models_verb, "run", fail)
    assert ernie("models") == (code, "", message)


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"], ["chta"], *([verb, "--help"] for verb in VERBS)])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    heavy = ("torch", "numpy", "tokenizers", "sentencepiece", "jinja2", "huggingface_hub", "transformers")
    program = (
        f"import sys; from ernie45.cli.main import main; main({argv!r}); "
        f"found = [name for name in {heavy} if name in sys.modules]; sys.exit(f'imported {{found}}' if found else 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("verb", "stated", "expected"),
    [
        ("doctor", None, "passive"),
        ("doctor", "active", "active"),
        ("train", None, "unset"),
        ("train", "passive", "passive"),
    ],
)
def test_waiting_threads_are_told_to_sleep_unless_they_train_or_the_user_decided(
    verb: str, stated: str | None, expected: str
) -> None:
    program = (
        "import contextlib, os; from ernie45.cli.main import main\n"
        f"with contextlib.suppress(SystemExit): main([{verb!r}, '--help'])\n"
        "print(os.environ.get('OMP_WAIT_POLICY', 'unset'))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {} if stated is None else {"OMP_WAIT_POLICY": stated}
    output = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True).stdout
    assert output.decode().splitlines()[-1] == expected


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        result = subprocess.run([*PROCESS, "--help"], stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_an_error() -> None:
    with open("/dev/full", "wb") as full:
        result = subprocess.run([*PROCESS, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: No space left on device\n")


def test_a_terminal_without_unicode_gets_escapes() -> None:
    program = (
        "import sys; from ernie45.cli import main, models; models.run = lambda options: print('é') or 0; "
        "sys.exit(main.main(['models']))"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "\\xe9\n", "")
