"""`ernie`: one verb per job. Parsing imports nothing heavy, so that help appears at once; a verb's module is loaded
when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from ernie45 import __version__
from ernie45.cli import arguments
from ernie45.errors import Ernie45Error, UsageError

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

_OVERVIEW = """\
usage: ernie VERB [...]

Run ERNIE 4.5 models on this machine.

  ernie chat                       talk to the default model
  ernie chat MODEL "a question"    one answer, then exit
  ernie pull NAME|HUB-ID|PATH      bring a model here
  ernie models                     what is here (--all: every published model)
  ernie show MODEL                 parameters, context, size, memory needed
  ernie convert SRC DST --to pt|paddle|gguf
  ernie verify MODEL               check every tensor
  ernie doctor                     versions, CPU, memory, what to fix

`ernie VERB --help` explains a verb. Exit codes: 0 ok, 1 failure, 2 usage, 4 not found, 130 interrupted.
"""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, as every other error."""

    def error(self, message: str) -> None:  # type: ignore[override]  # argparse: NoReturn, and this does raise
        raise UsageError(f"{message} (`{self.prog} --help` shows what there is)")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; every verb stores the module that runs it."""
    parser = _Parser(prog="ernie", usage="ernie VERB [...]", add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="version", version=f"ernie45 {__version__}")
    verbs = parser.add_subparsers(dest="verb", parser_class=_Parser)
    for name, (summary, add_arguments) in arguments.VERBS.items():
        verb = verbs.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
        add_arguments(verb)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors become one line on stderr."""
    # Spinning OpenMP threads starve everything else on a small machine. Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        options = build_parser().parse_args(argv)
        if options.verb is None:
            print(_OVERVIEW, end="")
            return 0
        run: Callable[[argparse.Namespace], int] = importlib.import_module(f"ernie45.cli.{options.verb}").run
        return run(options)
    except Ernie45Error as error:
        return _report(str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`ernie models | head`). Nothing can be written any more, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (OSError, MemoryError) as error:
        return _report(f"{type(error).__name__}: {error}", EXIT_FAILURE, debug)


def _report(message: str, exit_code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
