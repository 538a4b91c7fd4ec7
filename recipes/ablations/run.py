"""Run every arm for every seed, measure, print tables, draw curves. What is there already is not run again.

    python -m recipes.ablations.run --seeds 3
    python -m recipes.ablations.run --seeds 1 train.steps=20       # what follows is set for every arm

Writes into runs/ablations: a run file and a run per arm and seed, tables.md, and a report of the curves per group.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ernie45.checkpoint.atomic import atomic_write_text
from ernie45.cli.main import main as ernie
from ernie45.config.run_file import dump_run
from ernie45.training.run_log import read_run
from recipes.ablations.arms import GROUPS, Arm, config_of, run_folder
from recipes.ablations.measure import Figures, measure
from recipes.ablations.table import table


def main(argv: Sequence[str] | None = None) -> int:
    """Run, measure, print; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="SECTION.KEY=VALUE", help="set for every arm")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("runs/ablations"), metavar="DIR", help="folder of the runs"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each arm (default 3)")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"--seeds is {options.seeds}: expected 1 or more")
    found: dict[str, list[Figures]] = {arm.name: [] for arms in GROUPS.values() for arm in arms}
    for seed in range(options.seeds):
        for arm in (arm for arms in GROUPS.values() for arm in arms):
            code = train(arm, seed, options.output, options.settings)
            if code:
                return code
            config = config_of(arm, seed, options.output, options.settings)
            found[arm.name].append(measure(run_folder(options.output, arm.name, seed), config))
    tables = [f"{name}:\n\n{table({arm.name: found[arm.name] for arm in arms})}\n" for name, arms in GROUPS.items()]
    atomic_write_text(options.output / "tables.md", "\n".join(tables))
    print("\n".join(tables))
    return max(draw(name, options.output) for name in GROUPS)


def train(arm: Arm, seed: int, out: Path, settings: Sequence[str]) -> int:
    """Write the run file of an arm and train it to its end with `ernie train`, from its newest checkpoint if it has one.

    Returns: the exit code; 130 if the run was stopped before its end, and saved.
    """
    config, folder = config_of(arm, seed, out, settings), run_folder(out, arm.name, seed)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{folder.name}.yaml"
    atomic_write_text(file, dump_run(config))
    code = ernie(["train", str(file), "--run", str(folder)])
    if code:
        return code
    return 0 if read_run(folder, folder.name).last_step == config.train.steps else 130


def draw(group: str, out: Path) -> int:
    """Curves of a group's arms on each other, of the first seed, with `ernie plot`; returns the exit code."""
    runs = [str(run_folder(out, arm.name, 0)) for arm in GROUPS[group]]
    return ernie(["plot", *runs, "-o", str(out / f"report-{group}")])


if __name__ == "__main__":
    sys.exit(main())
