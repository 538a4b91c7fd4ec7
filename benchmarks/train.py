"""Speed and memory of training, beside transformers on the same weights, tokens and optimizer in the same run.

    python benchmarks/train.py                          # all cases; nothing else may run meanwhile
    python benchmarks/train.py --only 512 --repeats 1 --recompute norm
    python benchmarks/train.py --json FILE

README.md says what is measured, and how. Exit codes are those of `ernie`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, side_by_side, train_own
from benchmarks.side_by_side import OURS, contenders, runs_of

PEER = "transformers"
_WORKER = "benchmarks.train_worker"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch of packed documents of one length."""

    seq_len: int
    num_rows: int

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"{self.num_rows} x {self.seq_len}"

    @property
    def num_tokens(self) -> int:
        """Of a step."""
        return self.seq_len * self.num_rows


CASES = (Case(seq_len=512, num_rows=4), Case(seq_len=2048, num_rows=1))
_TINY = (Case(seq_len=16, num_rows=2),)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; errors become one line on stderr."""
    return side_by_side.run_program(_parser(), argv, run, to_markdown)


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure everything that was asked for."""
    cases = side_by_side.cases_with(options.only, _TINY if options.quick else CASES)
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # torch reads it with its first tensor, in every process measured
    began = {"date": common.now(), "commit": common.commit()}  # before somebody edits or commits
    peak_size = {"size": 64 if options.quick else 2048}
    peaks = [common.run_fresh(f"{_WORKER}:measure_peak", threads=options.threads, sleeps=False, **peak_size)]
    runs: list[dict[str, Any]] = []
    own: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        fresh = common.run_fresh(f"{_WORKER}:prepare", threads=options.threads, folder=folder, tiny=options.quick)
        for case in cases:
            runs += side_by_side.in_turns(
                case.name,
                PEER,
                options,
                f"{_WORKER}:measure",
                folder=folder,
                seq_len=case.seq_len,
                num_rows=case.num_rows,
                recompute=options.recompute,
                returns_memory=options.returns_memory,
            )
            with tempfile.TemporaryDirectory() as scratch:
                Path(scratch, "model").symlink_to(Path(folder, "model"))
                shape = {"seq_len": case.seq_len, "num_rows": case.num_rows}
                own.append(train_own.measure(options, case=case.name, **shape, folder=scratch))
    peaks.append(common.run_fresh(f"{_WORKER}:measure_peak", threads=options.threads, sleeps=False, **peak_size))
    noises = [each["other_cores"] for each in runs] + [each.other_cores for each in peaks]
    noises += [noise for each in own for noise in each["other_cores"]]
    return {
        "benchmark": "train",
        **began,
        "command": command,
        "versions": common.software_versions(("torch", PEER)),
        "native_extension": common.native_extension(),
        "machine": common.machine_facts(),
        "bandwidth": {"torch_cpu_capability": peaks[0].result["torch_cpu_capability"]},
        "settings": {
            name: getattr(options, name)
            for name in ("threads", "repeats", "steps", "recompute", "returns_memory", "quick")
        },
        "network": fresh.result,
        "peak_flops": max(each.result["flops"] for each in peaks),
        "peak_flops_before_and_after": [each.result["flops"] for each in peaks],
        "other_cores_max": None if None in noises else max(noises),
        "runs": runs,
        "rows": [row for case in cases for row in rows_of(case, runs)],
        "own": own,
    }


def rows_of(case: Case, runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Both packages' lines of a case: medians over all steps of all repeats, the peer with its faster experts."""
    speeds = {}
    for package, experts in contenders(PEER):
        found = runs_of(runs, case.name, package, experts)
        speeds[package, experts] = {
            "case": case.name,
            "package": package,
            "experts": experts,
            "tokens_per_s": common.spread([case.num_tokens / s for r in found for s in r["seconds"]]),
            "peak_bytes": common.spread([float(r["peak_bytes"]) for r in found]),
            "first_loss": found[0]["losses"][0],
            "flops_per_token": found[0]["flops_per_token"],
        }
    peer = max((row for (package, _), row in speeds.items() if package == PEER), key=lambda r: r["tokens_per_s"].median)
    rows = [speeds[OURS, ""], peer]
    return [{**row, **{key: vars(row[key]) for key in ("tokens_per_s", "peak_bytes")}} for row in rows]


def to_markdown(report: Mapping[str, Any]) -> str:
    """The whole report as text."""
    header = [
        "case",
        "package",
        "tokens/s",
        "MFU",
        "peak memory, MB",
        "times the peer's tokens/s",
        "times the peer's memory",
    ]
    rows = report["rows"]
    lines = []
    for row in rows:
        peer = next(other for other in rows if other["case"] == row["case"] and other["package"] == PEER)
        speed, memory = (common.spread(row[key]["values"]) for key in ("tokens_per_s", "peak_bytes"))
        megabytes = common.spread([value / 1e6 for value in memory.values])
        lines.append(
            [
                row["case"],
                row["package"] + (f" ({row['experts']} experts)" if row["experts"] else ""),
                common.spread_text(speed),
                f"{speed.median * row['flops_per_token'] / report['peak_flops']:.1%}",
                common.spread_text(megabytes),
                f"{speed.median / peer['tokens_per_s']['median']:.2f}",
                f"{side_by_side.times_the_peers(memory.median, peer['peak_bytes']['median']):.2f}",
            ]
        )
    table = common.markdown_table(header, lines, num_words=2)
    alone = common.markdown_table(
        ["case", "ours alone", "measured", "in time", "goal"],
        [row for found in report["own"] for row in train_own.to_markdown(found)],
        num_words=5,
    )
    return "\n".join(["## Training", "", table, "", alone, "", *(f"- {line}" for line in _facts(report))])


def _facts(report: Mapping[str, Any]) -> list[str]:
    settings, network = report["settings"], report["network"]
    losses = {
        case: [row["first_loss"] for row in report["rows"] if row["case"] == case]
        for case in dict.fromkeys(row["case"] for row in report["rows"])
    }
    facts = [
        f"network: {network['total'] / 1e6:.1f} M parameters, {network['active'] / 1e6:.1f} M active (head included, embedding"
        f" table not), random weights, routers too; float32; {network['text']}",
        "a step: forward, backward, AdamW (fused, torch) over rows of full length; median (lowest-highest) of"
        f" {settings['steps']} steps in each of {settings['repeats']} fresh processes per package, in turns, after one that"
        f" does not count; {settings['threads']} threads, OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}",
        "MFU: tokens/s x FLOPs per token / peak; FLOPs per token = 6 x active parameters + 6 x layers x heads x head size x"
        " (length + 1), what is computed again not counted; peak:"
        f" {report['peak_flops'] / 1e9:.1f} GFLOP/s, the fastest torch.matmul (float32) before"
        f" ({report['peak_flops_before_and_after'][0] / 1e9:.1f}) and after ({report['peak_flops_before_and_after'][1] / 1e9:.1f})",
        "peak memory: highest resident memory (VmHWM) above what the process held after imports and a tiny step; huge pages"
        " for both (THP_MEM_ALLOC_ENABLE); ernie45 "
        + (
            "gives freed memory back at once"
            if settings["returns_memory"]
            else "keeps what it has freed, as `ernie train` does"
        ),
        "computed again by ernie45: " + (settings["recompute"] or "nothing but activations of SwiGLU"),
        "first loss, ernie45 and peer: "
        + ", ".join(f"{case}: {ours:.5f} and {theirs:.5f}" for case, (ours, theirs) in losses.items()),
        *train_own.facts(),
        *common.origin_lines(report),
        common.noise_line(report["other_cores_max"]),
    ]
    if settings["quick"]:
        facts.append("**not to be published**: --quick measures a tiny network, to test this program")
    return facts


def _parser() -> argparse.ArgumentParser:
    parser = side_by_side.new_parser("train.py", (__doc__ or "").split("\n", 1)[0], steps="steps")
    parser.add_argument("--recompute", default="", metavar="A,B", help="operations that ernie45 computes again (none)")
    parser.add_argument(
        "--returns-memory",
        action="store_true",
        help="ernie45 gives freed memory back at once: less memory, more page faults",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
