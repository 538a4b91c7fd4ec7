"""The arms: run files that differ from a base in one option each, for as many seeds as one likes.

Arms of the same seed begin with the same weights and read the same rows in the same order, so that their differences are those of
the option.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ernie45.config.run_file import read_run_file
from ernie45.training.config import RunConfig

FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A run file with one option changed."""

    name: str
    base: str
    """Its file in this folder."""
    settings: tuple[str, ...] = ()
    """What is changed, as `section.key=value`."""
    starts_from: str | None = None
    """The arm of the same seed whose weights it begins with; None: random ones."""


BASELINE = "all"
GROUPS: Mapping[str, tuple[Arm, ...]] = {
    "pretrain": (
        Arm(name=BASELINE, base="base.yaml"),
        Arm(name="no-orthogonal", base="base.yaml", settings=("loss.router.orthogonal=0",)),
        Arm(name="orthogonal-x300", base="base.yaml", settings=("loss.router.orthogonal=0.3",)),
        Arm(name="no-bias", base="base.yaml", settings=("balance.bias_rate=0",)),
        Arm(name="no-mtp", base="base.yaml", settings=("loss.mtp_weight=0",)),
    ),
    "tune": (
        Arm(name="plain-mean", base="mixed.yaml", starts_from=BASELINE),
        Arm(name="token-balance", base="mixed.yaml", settings=("loss.token_balance=true",), starts_from=BASELINE),
    ),
}
"""In the order in which they run; the first of a group is what the others are compared with."""


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """Where an arm runs."""
    return out / f"{arm}-{seed}"


def config_of(arm: Arm, seed: int, out: Path, settings: Sequence[str] = ()) -> RunConfig:
    """The run of an arm. Args: settings: further `section.key=value`, for every arm alike. Raises: ConfigError."""
    begin = (
        () if arm.starts_from is None else (f"model.start={json.dumps(str(run_folder(out, arm.starts_from, seed)))}",)
    )
    seeds = (f"train.seed={seed}", f"data.seed={seed}")
    return read_run_file(FOLDER / arm.base, RunConfig, [*begin, *seeds, *settings, *arm.settings])
