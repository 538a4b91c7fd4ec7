"""`ernie`: one verb per job. Parsing imports nothing heavy, so that help appears at once; a verb's module is loaded
when it runs.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from ernie45 import __version__
from ernie45.cli.arguments import VERBS, Verb
from ernie45.errors import Ernie45Error, UsageError

EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 130, 128 + signal.SIGPIPE

_OVERVIEW = """\
usage: ernie VERB [...]

Run, serve and train ERNIE 4.5 models on this machine.

  ernie chat                       talk to the default model
  ernie chat MODEL "a question"    one answer, then exit
  ernie up                         the default model with a chat page in the browser
  ernie serve MODEL                a server as OpenAI's, for programs
  ernie pull NAME|HUB-ID|PATH      bring a model here
  ernie models                     what is here (--all: every published model)
  ernie show MODEL                 parameters, context, size, memory needed
  ernie convert SRC DST --to pt|paddle|gguf
  ernie quantize MODEL --scheme wint8|wint4|wint4-all
  ernie tokenizer train FILE       a vocabulary of your own
  ernie data check FILE            rows to train on: count, preview, pack, tokenize
  ernie train RUN.yaml             pre-train, tune or align a model
  ernie plot RUN                   its curves, and a report
  ernie eval MODEL --ppl FILE      perplexity of a text, or a task's accuracy
  ernie export RUN DST --to pt|paddle|gguf
  ernie bench MODEL                tokens per second, against the machine's bound
  ernie verify MODEL               check every tensor
  ernie doctor                     versions, CPU, memory, what to fix
  ernie --version

`ernie VERB --help` explains a verb and shows examples. Models lie in ERNIE45_HOME (default ~/.cache/ernie45).
Exit codes: 0 ok, 1 failure, 2 usage, 4 not found, 130 interrupted. --debug shows the traceback of an error.
"""
# Bugs of ours and failures inside libraries, which nobody can act on: reported in one line like everything else.
_UNFORESEEN = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, as every other error."""

    def error(self, message: str) -> None:  # type: ignore[override]  # argparse: NoReturn, and this does raise
        raise UsageError(f"{message} (`{self.prog} --help` shows what there is)")


def build_parser(name: str) -> argparse.ArgumentParser:
    """The command line of one verb. Help is all that it needs `ernie45.cli.arguments` for, hence nothing heavy."""
    verb: Verb = VERBS[name]
    examples = "\n".join(f"  {command.ljust(50)}  {what}" for command, what in verb.examples)
    parser = _Parser(
        prog=f"ernie {name}",
        description=verb.summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors become one line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] != ["train"]:
        # Spinning OpenMP threads starve everything else on a small machine; training is nothing but their work, and a fifth slower
        # where each product has to wake them. Must be set before torch is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    debug = "--debug" in (argv[: argv.index("--")] if "--" in argv else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character of an answer gets its escape, not a crash.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _dispatch(argv)
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk or a reader that left shows here, not at exit
        return code
    except SystemExit as done:  # argparse, after printing help
        return int(done.code or 0)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`ernie models | head`). Nothing can be written any more, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (Ernie45Error, OSError, MemoryError, ImportError, *_UNFORESEEN) as error:
        return _report(error, debug)


def _dispatch(argv: list[str]) -> int:
    if argv[:1] == ["--debug"]:
        argv = [*argv[1:2], "--debug", *argv[2:]]
    if argv and argv[0] in ("help", "-h", "--help"):
        argv = [argv[1], "--help"] if len(argv) > 1 else []
    if not argv or argv == ["--debug"]:
        print(_OVERVIEW, end="")
        return 0
    name, *rest = argv
    if name in ("-V", "--version"):
        print(f"ernie45 {__version__}")
        return 0
    if name not in VERBS:
        close = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.5)
        known = f"did you mean `ernie {close[0]}`?" if close else f"there are {', '.join(VERBS)}"
        raise UsageError(f"{name!r} is no verb of ernie: {known} (`ernie --help` explains them)")
    options = _parse(name, rest)
    run: Callable[[argparse.Namespace], int] = importlib.import_module(f"ernie45.cli.{name}").run
    return run(options)


def _parse(name: str, arguments: list[str]) -> argparse.Namespace:
    parser = build_parser(name)
    # Intermixed: `ernie chat MODEL --seed 3 PROMPT` is natural, and plain parsing takes all positionals at once.
    options, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        parser.error(f"{unknown[0]!r} is not understood{f': did you mean {close[0]}?' if close else ''}")
    return options


def _report(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {' '.join(_message(error).splitlines())}", file=sys.stderr)
    return error.exit_code if isinstance(error, Ernie45Error) else EXIT_FAILURE


def _message(error: Exception) -> str:
    if isinstance(error, Ernie45Error):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    if isinstance(error, MemoryError):
        return "out of memory: use a smaller model or a narrower --dtype"
    if isinstance(error, ImportError):
        return f"{error} (`ernie doctor` tells what is missing)"
    return f"unforeseen {type(error).__name__}: {error} (--debug shows the traceback)"


if __name__ == "__main__":
    sys.exit(main())
