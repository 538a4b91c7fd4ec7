"""Speed and memory of alignment, beside peers on the same weights, pairs and prompts in the same run.

    python benchmarks/align.py                     # all cases; nothing else may run meanwhile
    python benchmarks/align.py --only dpo --repeats 1
    python benchmarks/align.py --json FILE

README.md says what is measured, and how. Exit codes are those of `ernie`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, side_by_side
from benchmarks.side_by_side import OURS, contenders, runs_of
from ernie45.errors import NotFoundError

_WORKER = "benchmarks.align_worker"
_LOSS_LIMIT = 0.01
"""Losses of one step that are further apart than this come from two different trainings."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A piece of work that both packages do."""

    name: str
    work: str
    """`dpo` or `sampling`."""
    peer: str
    """The package beside ours."""
    units: str
    """What a step has several of."""
    goal: float
    """Our tokens per second over the peer's."""
    sizes: Mapping[str, Any]
    """Arguments of `align_worker.measure_WORK`; numbers of tokens in twos are fewest and most."""


def cases(*, tiny: bool) -> tuple[Case, ...]:
    """What is measured. Args: tiny: with sizes that test the program."""
    pairs: dict[str, Any] = {"num_pairs": 4, "prompt_tokens": [64, 384], "answer_tokens": [64, 192]}
    rollout = {"num_prompts": 8, "num_answers": 4, "prompt_tokens": 64, "new_tokens": 128}
    if tiny:
        pairs = {"num_pairs": 2, "prompt_tokens": [4, 8], "answer_tokens": [2, 6]}
        rollout = {"num_prompts": 2, "num_answers": 2, "prompt_tokens": 4, "new_tokens": 5}
    return (
        Case(name="dpo", work="dpo", peer="trl", units="pairs", goal=1.5, sizes=pairs),
        *(
            Case(
                name=f"sampling {weights}",
                work="sampling",
                peer="transformers",
                units="answers",
                goal=5.0,
                sizes={**rollout, "weights": weights},
            )
            for weights in ("float32", "wint8")
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; errors become one line on stderr."""
    about = (__doc__ or "").split("\n", 1)[0]
    parser = side_by_side.new_parser("align.py", about, steps="steps or rollouts")
    return side_by_side.run_program(parser, argv, run, to_markdown)


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure everything that was asked for."""
    chosen = _chosen(options)
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # torch reads it with its first tensor, in every process measured
    began = {"date": common.now(), "commit": common.commit()}  # before somebody edits or commits
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        fresh = common.run_fresh(f"{_WORKER}:prepare", threads=options.threads, folder=folder, tiny=options.quick)
        for case in chosen:
            function = f"{_WORKER}:measure_{case.work}"
            runs += side_by_side.in_turns(case.name, case.peer, options, function, folder=folder, **case.sizes)
    noises = [each["other_cores"] for each in runs]
    return {
        "benchmark": "align",
        **began,
        "command": command,
        "versions": common.software_versions(("torch", "transformers", "trl")),
        "native_extension": common.native_extension(),
        "machine": common.machine_facts(),
        "bandwidth": {"torch_cpu_capability": fresh.result["torch_cpu_capability"]},
        "settings": {name: getattr(options, name) for name in ("threads", "repeats", "steps", "quick")},
        "network": fresh.result,
        "cases": [{**vars(case), "losses": losses_of(case, runs)} for case in chosen],
        "other_cores_max": None if None in noises else max(noises),
        "runs": runs,
        "rows": [row for case in chosen for row in rows_of(case, runs)],
    }


def rows_of(case: Case, runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Both packages' lines of a case, the peer with its faster experts; a process counts as a whole: its steps differ in size."""
    rows: list[dict[str, Any]] = []
    for package, experts in contenders(case.peer):
        found = runs_of(runs, case.name, package, experts)
        spreads = {
            "units_per_s": common.spread([sum(r["units"]) / sum(r["seconds"]) for r in found]),
            "tokens_per_s": common.spread([sum(r["tokens"]) / sum(r["seconds"]) for r in found]),
            "peak_bytes": common.spread([float(r["peak_bytes"]) for r in found]),
        }
        rows.append({"case": case.name, "package": package, "experts": experts, **spreads})
    ours, *peers = rows
    peer = max(peers, key=lambda row: row["tokens_per_s"].median)
    ratio = ours["tokens_per_s"].median / peer["tokens_per_s"].median
    memory = side_by_side.times_the_peers(ours["peak_bytes"].median, peer["peak_bytes"].median)
    ours |= {"times_tokens_per_s": ratio, "times_memory": memory, "goal_met": ratio >= case.goal}
    return [
        {name: vars(value) if isinstance(value, common.Spread) else value for name, value in row.items()}
        for row in (ours, peer)
    ]


def losses_of(case: Case, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """First and last loss of both packages, and how far the losses of one step are apart at most; None where nothing is learnt."""
    found = [r for package, experts in contenders(case.peer) for r in runs_of(runs, case.name, package, experts)]
    ours, theirs = ([r["losses"] for r in found if (r["package"] == OURS) is own] for own in (True, False))
    if not ours[0]:
        return None
    differences = [abs(a - b) for losses in (*ours, *theirs) for a, b in zip(losses, ours[0], strict=True)]
    return {
        "steps": len(ours[0]),
        "ours": [ours[0][0], ours[0][-1]],
        "peer": [theirs[0][0], theirs[0][-1]],
        "largest_difference": max(differences),
    }


def to_markdown(report: Mapping[str, Any]) -> str:
    """The whole report as text."""
    header = [
        "case",
        "package",
        "pairs or answers/s",
        "tokens/s",
        "peak memory, MB",
        "times the peer's tokens/s",
        "goal",
        "times the peer's memory",
    ]
    goals = {case["name"]: case["goal"] for case in report["cases"]}
    lines = [_line(row, goals[row["case"]]) for row in report["rows"]]
    table = common.markdown_table(header, lines, num_words=2)
    return "\n".join(["## Alignment", "", table, "", *(f"- {line}" for line in _facts(report))])


def _line(row: Mapping[str, Any], goal: float) -> list[str]:
    units, tokens = (common.spread_text(common.spread(row[key]["values"])) for key in ("units_per_s", "tokens_per_s"))
    megabytes = common.spread_text(common.spread([value / 1e6 for value in row["peak_bytes"]["values"]]))
    package = row["package"] + (f" ({row['experts']} experts)" if row["experts"] else "")
    compared = [f"{1:.2f}", "", f"{1:.2f}"]
    if row["package"] == OURS:
        ratio = f"{row['times_tokens_per_s']:.2f}" + ("" if row["goal_met"] else ", missed")
        compared = [ratio, f"{goal:g}", f"{row['times_memory']:.2f}"]
    return [row["case"], package, units, tokens, megabytes, *compared]


def _chosen(options: argparse.Namespace) -> list[Case]:
    """Raises: UsageError if no case has the words in its name; NotFoundError if a peer is not installed."""
    chosen = side_by_side.cases_with(options.only, cases(tiny=options.quick))
    for case in chosen:
        if importlib.util.find_spec(case.peer) is None:
            raise NotFoundError(f"{case.peer}, the peer of {case.name}, is not installed: pip install 'ernie45[bench]'")
    return chosen


def _facts(report: Mapping[str, Any]) -> list[str]:
    settings, network = report["settings"], report["network"]
    facts = [
        f"network: {network['total'] / 1e6:.1f} M parameters, {network['active'] / 1e6:.1f} M active, random weights, routers"
        f" too; float32; {network['text']}",
        *(line for case in report["cases"] for line in _case_facts(case)),
        f"median (lowest-highest) of {settings['repeats']} fresh processes per package, in turns; in each {settings['steps']}"
        f" steps or rollouts together, after one that does not count; {settings['threads']} threads,"
        f" OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}",
        "peak memory: highest resident memory (VmHWM) above what the process held after imports and a tiny run; huge pages"
        " for all (THP_MEM_ALLOC_ENABLE)",
        *common.origin_lines(report),
        common.noise_line(report["other_cores_max"]),
    ]
    if settings["quick"]:
        facts.append("**not to be published**: --quick measures a tiny network, to test this program")
    return facts


def _case_facts(case: Mapping[str, Any]) -> list[str]:
    """What one case is, and whether both learnt the same."""
    sizes = case["sizes"]
    if case["work"] == "sampling":
        return [
            f"{case['name']}: a rollout of {sizes['num_prompts']} prompts of {sizes['prompt_tokens']} tokens,"
            f" {sizes['num_answers']} answers of {sizes['new_tokens']} tokens to each, at temperature 1, end tokens ignored;"
            " the weights' hand-over is part of it; new tokens are counted; ours samples from "
            + (
                "the network that learns"
                if sizes["weights"] == "float32"
                else "a copy in 8 bits, made in the hand-over"
            )
            + ", the peer from float32",
        ]
    prompts, answers = ("-".join(map(str, sizes[key])) for key in ("prompt_tokens", "answer_tokens"))
    losses = case["losses"]
    apart = losses["largest_difference"]
    verdict = (
        "" if apart <= _LOSS_LIMIT else f": **not to be published**, above {_LOSS_LIMIT} it is not the same training"
    )
    return [
        f"dpo: {sizes['num_pairs']} pairs in a step, prompts of {prompts} tokens, answers of {answers}; all weights learn,"
        " beside a frozen copy; AdamW (fused, torch), gradients clipped at norm 1; a pair's tokens are its prompt once and"
        " both answers, padding not counted",
        f"losses of dpo, first and last of {losses['steps']} steps: ernie45 {_two(losses['ours'])}, {case['peer']}"
        f" {_two(losses['peer'])}; largest difference in a step {apart:.1e}{verdict}",
    ]


def _two(values: Sequence[float]) -> str:
    return " and ".join(f"{value:.5f}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
