"""What training leaves in a run's folder: written by a checkpoint, found by whoever wants to use or export it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ernie45.errors import CheckpointError, NotFoundError, UsageError
from ernie45.models.text import CausalLM
from ernie45.store.api import save_model
from ernie45.store.convert import companions_of_folder
from ernie45.store.location import resolve

MODEL_FOLDER, ADAPTER_FOLDER, CHECKPOINTS = "model", "adapter", "checkpoints"
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What is exported."""

    base: Path
    """A folder or .gguf file with weights."""
    adapter: Path | None = None
    """An adapter in PEFT's format."""


def find_trained(what: str | Path, adapter: str | Path | None = None) -> Trained:
    """The weights behind a run's folder (its newest checkpoint), a checkpoint's folder, a model's folder, file or name.

    A checkpoint holds `model/`, or `adapter/` whose configuration names the base. Raises: NotFoundError, UsageError.
    """
    folder = Path(os.path.expanduser(what))
    if (folder / CHECKPOINTS).is_dir():
        folder = _newest(folder / CHECKPOINTS)
    own = folder / ADAPTER_FOLDER
    if (folder / MODEL_FOLDER).is_dir():
        found = Trained(base=folder / MODEL_FOLDER, adapter=own if own.is_dir() else None)
    elif own.is_dir():
        found = Trained(base=_base_of(own), adapter=own)
    else:
        found = Trained(base=resolve(folder if folder.exists() else what))
    if adapter is None:
        return found
    if found.adapter is not None:
        raise UsageError(
            f"{found.adapter} lies beside the weights already: leave --adapter out, or name the base model instead"
        )
    return Trained(base=found.base, adapter=Path(os.path.expanduser(adapter)))


def save_trained(
    model: CausalLM, checkpoint: str | Path, *, tokenizer_from: str | Path | None = None, base: str | None = None
) -> Path:
    """Write what a network has learnt into a checkpoint's folder, where `find_trained` finds it: all weights, or the adapter alone.

    Args: checkpoint: a folder, made if need be. tokenizer_from: a folder whose tokenizer, template and licence go along. base: name
        or absolute path of the model below an adapter.
    Returns: `checkpoint/model` or `checkpoint/adapter`. Raises: CheckpointError if that exists, or for an adapter without `base`.
    """
    from ernie45.training.lora.adapter import adapter_of
    from ernie45.training.lora.write import save_adapter

    adapter = adapter_of(model)
    if not adapter:
        save_model(model, Path(checkpoint) / MODEL_FOLDER, tokenizer_from=tokenizer_from)
        return Path(checkpoint) / MODEL_FOLDER
    if base is None:
        raise CheckpointError("an adapter is of no use without its model: say which one is below it (base)")
    files = {} if tokenizer_from is None else companions_of_folder(Path(tokenizer_from))
    save_adapter(adapter, model.config, Path(checkpoint) / ADAPTER_FOLDER, base=base, extra_files=files)
    return Path(checkpoint) / ADAPTER_FOLDER


def _newest(folder: Path) -> Path:
    steps = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))]
    if not steps:
        raise NotFoundError(f"{folder} holds no checkpoint (step-*): has the run saved one?")
    return max(steps)[1]


def _base_of(adapter: Path) -> Path:
    from ernie45.training.lora.adapter_file import read_adapter

    base = read_adapter(adapter).base
    if base is None:
        raise NotFoundError(
            f"{adapter} does not say which model it belongs to: name that model, and the adapter with --adapter"
        )
    return resolve(base)
