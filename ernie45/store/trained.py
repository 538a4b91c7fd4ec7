"""What training leaves in a run's folder, found by whoever wants to use or export it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ernie45.errors import NotFoundError, UsageError
from ernie45.store.location import resolve
from ernie45.training.run_folder import CHECKPOINTS
from ernie45.training.state import ADAPTER_FOLDER, AVERAGE_FILE, MODEL_FOLDER, checkpoint_paths


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What is exported."""

    base: Path
    """A folder or .gguf file with weights."""
    adapter: Path | None = None
    """An adapter in PEFT's format."""
    average: Path | None = None
    """The average of what was trained, where the run keeps one."""


def find_trained(what: str | Path, adapter: str | Path | None = None) -> Trained:
    """The weights behind a run's folder (its newest checkpoint), a checkpoint's folder, a model's folder, file or name.

    A checkpoint holds `model/`, or `adapter/` whose configuration names the base. Raises: NotFoundError, UsageError.
    """
    folder = Path(os.path.expanduser(what))
    if (folder / CHECKPOINTS).is_dir():
        folder = _newest(folder / CHECKPOINTS)
    own = folder / ADAPTER_FOLDER
    average = folder / AVERAGE_FILE if (folder / AVERAGE_FILE).is_file() else None
    if (folder / MODEL_FOLDER).is_dir():
        found = Trained(base=folder / MODEL_FOLDER, adapter=own if own.is_dir() else None, average=average)
    elif own.is_dir():
        found = Trained(base=_base_of(own), adapter=own, average=average)
    else:
        found = Trained(base=resolve(folder if folder.exists() else what))
    if adapter is None:
        return found
    if found.adapter is not None:
        raise UsageError(
            f"{found.adapter} lies beside the weights already: leave --adapter out, or name the base model instead"
        )
    return Trained(base=found.base, adapter=Path(os.path.expanduser(adapter)))


def _newest(folder: Path) -> Path:
    found = checkpoint_paths(folder)
    if not found:
        raise NotFoundError(f"{folder} holds no checkpoint (step-*): has the run saved one?")
    return found[-1]


def _base_of(adapter: Path) -> Path:
    from ernie45.training.lora.adapter_file import read_adapter

    base = read_adapter(adapter).base
    if base is None:
        raise NotFoundError(
            f"{adapter} does not say which model it belongs to: name that model, and the adapter with --adapter"
        )
    return resolve(base)
