"""The folder of a run: its configuration as resolved, its metrics, its checkpoints; and whether a run may go on in it.

RUN/run.yaml              the configuration, every default written out
RUN/run.json              method, sizes, versions: what `ernie plot` puts beside the curves
RUN/metrics.jsonl         one line per logged step
RUN/checkpoints/step-..   see `state.py`
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from ernie45 import __version__
from ernie45.checkpoint.atomic import atomic_write_text
from ernie45.config.run_file import dump_run, parse_run, to_plain
from ernie45.errors import CheckpointError
from ernie45.training.metrics import METRICS_FILE, RUN_FILE
from ernie45.training.state import checkpoint_paths

T = TypeVar("T")

CONFIG_FILE = "run.yaml"
CHECKPOINTS = "checkpoints"
# What may differ when a run goes on: none of it changes what a step computes.
_FREE = ("train.log_every", "train.eval_every", "train.eval_rows", "returns_memory", "checkpoint")


class RunFolder:
    """Opens a folder for a run: a new one, or one whose run goes on."""

    def __init__(self, path: Path, config: Any) -> None:
        """Args: config: the run's configuration, a dataclass.
        Raises: CheckpointError if the folder belongs to a run with another configuration, or to something else.
        """
        self.path, self._config = path, config
        self.checkpoints = path / CHECKPOINTS
        found = checkpoint_paths(self.checkpoints)
        self.newest = found[-1] if found else None
        """The checkpoint to go on from, None for a new run."""
        if (path / CONFIG_FILE).is_file():
            self._check_same()
        elif path.exists() and any(path.iterdir()):
            raise CheckpointError(f"{path} holds files but no run: choose another folder with --run")

    def _check_same(self) -> None:
        text = (self.path / CONFIG_FILE).read_text(encoding="utf-8")
        before = _flat(to_plain(parse_run(text, type(self._config), origin=str(self.path / CONFIG_FILE))))
        now = _flat(to_plain(self._config))
        differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        differing = [key for key in differing if not any(key == free or key.startswith(f"{free}.") for free in _FREE)]
        if differing and self.newest is not None:
            key, more = differing[0], f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
            raise CheckpointError(
                f"{self.path} holds a run with another configuration: {key} was {before.get(key)!r}, now {now.get(key)!r}{more}; "
                "choose another folder with --run, or remove this one"
            )

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Write the configuration and the facts of the run; the time of its first beginning is kept."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if self.newest is None:
            # A run that ended before its first checkpoint begins anew, and its metrics with it.
            (self.path / METRICS_FILE).unlink(missing_ok=True)
        atomic_write_text(self.path / CONFIG_FILE, dump_run(self._config))
        run = {
            "started": self.fact("started", str) or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": {"ernie45": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "threads": torch.get_num_threads(),
            "config": to_plain(self._config),
            **facts,
        }
        atomic_write_text(self.path / RUN_FILE, json.dumps(run, indent=1, ensure_ascii=False))

    def fact(self, name: str, kind: type[T]) -> T | None:
        """What was written down when the run began; None for a new run, and where nothing of that kind can be read."""
        if self.newest is None:
            return None
        try:
            value = json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))[name]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return value if isinstance(value, kind) else None


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    if not isinstance(value, dict):
        return {path: value}
    out: dict[str, Any] = {}
    for key, child in value.items():
        out |= _flat(child, f"{path}.{key}" if path else key)
    return out
