"""What `train.py` and `align.py` share: this package and a peer in turns, on the same networks, in fresh processes."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from benchmarks import common
from ernie45.errors import Ernie45Error, UsageError

OURS = "ernie45"
_PEER_EXPERTS = ("grouped_mm", "eager")
"""What transformers offers on a CPU; the faster counts."""

Report = dict[str, Any]


class _Named(Protocol):
    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=_Named)


def new_parser(program: str, about: str, *, steps: str) -> argparse.ArgumentParser:
    """The options that both have. Args: about: its help. steps: what is on the clock."""
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes per case and package (3)")
    parser.add_argument("--steps", type=int, default=5, help=f"{steps} on the clock in each (5)")
    parser.add_argument("--threads", type=int, default=common.usable_cores(), help="threads (all cores)")
    parser.add_argument("--only", action="append", default=[], metavar="WORD", help="cases with this in their name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single value here as well")
    parser.add_argument("--quick", action="store_true", help="a tiny network only: tests the program, measures nothing")
    return parser


def run_program(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    run: Callable[[argparse.Namespace, str], Report],
    to_markdown: Callable[[Report], str],
) -> int:
    """Run a benchmark and print its report; errors become one line on stderr. Args: run: of options and command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = parser.parse_args(arguments)
        report = run(options, shlex.join(["python", f"benchmarks/{parser.prog}", *arguments]))
    except Ernie45Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(to_markdown(report))
    if options.json is not None:
        common.write_json(options.json, report)
    return 0


def cases_with(words: Sequence[str], known: Sequence[C]) -> list[C]:
    """Those with all words in their names. Raises: UsageError if there are none."""
    cases = [case for case in known if all(word in case.name for word in words)]
    if not cases:
        names = ", ".join(case.name for case in known)
        raise UsageError(f"no case holds {', '.join(words)} in its name; they are {names}")
    return cases


def contenders(peer: str) -> list[tuple[str, str]]:
    """Packages with their experts."""
    return [(OURS, ""), *((peer, experts) for experts in _PEER_EXPERTS)]


def in_turns(
    case: str, peer: str, options: argparse.Namespace, function: str, **arguments: Any
) -> list[dict[str, Any]]:
    """All repeats of one case, the packages in turns; who begins changes, so that a drift of the machine hits all.

    Args: function: takes `package`, `experts`, `steps` and the arguments, in a fresh process.
    """
    runs = []
    for repeat in range(options.repeats):
        for package, experts in contenders(peer) if repeat % 2 == 0 else reversed(contenders(peer)):
            print(f"{case}: {package} {experts}, repeat {repeat + 1} of {options.repeats}", file=sys.stderr)
            given = {"package": package, "experts": experts, "steps": options.steps, **arguments}
            fresh = common.run_fresh(function, threads=options.threads, sleeps=False, **given)
            named = {"case": case, "package": package, "experts": experts, "repeat": repeat}
            runs.append({**named, "other_cores": fresh.other_cores, **fresh.result})
    return runs


def runs_of(runs: Sequence[Mapping[str, Any]], case: str, package: str, experts: str) -> list[Mapping[str, Any]]:
    """The repeats of one contender."""
    return [r for r in runs if (r["case"], r["package"], r["experts"]) == (case, package, experts)]


def times_the_peers(ours: float, peers: float) -> float:
    """Ratio of peaks of memory (bytes); the peer's is at least a byte: a tiny network may need no more than the imports did."""
    return ours / max(peers, 1.0)
