"""Checkpoints of a run: everything that the next step depends on, whole or not at all.

A checkpoint is a folder `step-00000100` that holds the weights as a model that can be served (`model/`, or `adapter/`), one
safetensors file per kind of state (`optimizer`, `ema`, `rng`, ..), and `state.json` with counters, the position in the data and
the SHA-256 of every file. It is written beside its name and renamed when it is on the disk, so a run that is killed at any moment
finds the checkpoint before or this one. Older ones are removed only after that.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ernie45.checkpoint.atomic import atomic_folder
from ernie45.checkpoint.load import fill
from ernie45.checkpoint.safetensors import read_tensors, write_tensors
from ernie45.checkpoint.source import TensorSource, open_source
from ernie45.checkpoint.write import write_folder
from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.text import CausalLM

FORMAT_VERSION = 1
STATE_FILE = "state.json"
MODEL_FOLDER, ADAPTER_FOLDER = "model", "adapter"
"""What of a checkpoint can be served: it has one of the two."""
AVERAGE = "ema"
AVERAGE_FILE = f"{AVERAGE}.safetensors"
"""The average of the weights, where a run keeps one."""
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run is saved, and how many of its checkpoints are kept."""

    every: int = 500
    """Steps between two checkpoints; 0 saves at the end alone."""
    keep: int = 3
    """Newest checkpoints that are kept, 1 or more."""
    asynchronous: bool = False
    """Write on a thread while training goes on, at the price of one more copy of weights and optimizer state in memory."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1:
            raise ConfigError(f"every {self.every} and keep {self.keep}: expected 0 or more, and 1 or more")


class Weights(Protocol):
    """What of a checkpoint can be served: a whole model or an adapter."""

    def capture(self, *, copy: bool) -> Callable[[Path], None]:
        """What writes the weights into a checkpoint's folder; with `copy` as they are now, whatever training does meanwhile."""

    def restore(self, folder: Path) -> None:
        """Read them back, bit for bit."""


class ModelWeights:
    """A whole network as a -PT folder `model/`, with tokenizer and template beside it: `ernie chat` takes it as it is."""

    def __init__(self, model: CausalLM, extra_files: Mapping[str, bytes]) -> None:
        self._model, self._extra_files = model, extra_files

    def capture(self, *, copy: bool) -> Callable[[Path], None]:
        """See `Weights`."""
        tensors = {
            name: tensor.detach().clone() if copy else tensor for name, tensor in self._model.state_dict().items()
        }
        source = TensorSource(tensors, self._model.config)
        return lambda folder: write_folder(source, folder / MODEL_FOLDER, layout="pt", extra_files=self._extra_files)

    def restore(self, folder: Path) -> None:
        """See `Weights`."""
        source = open_source(folder / MODEL_FOLDER)
        source.account.check(source.where)
        fill(self._model, source)  # type: ignore[arg-type]  # a folder that we wrote is plain safetensors


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint holds."""

    step: int
    """Steps done."""
    values: Mapping[str, Any]
    """JSON values: counters, the position in the data."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """By file and name."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, weights: Weights, config: CheckpointConfig) -> None:
        self._folder, self._weights, self._config = folder, weights, config
        self._writing: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def every(self) -> int:
        """Steps between two checkpoints, 0 for the end alone."""
        return self._config.every

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, at once or on a thread; one at a time. Raises: CapacityError, CheckpointError, also those of the
        checkpoint before that was written on a thread.
        """
        self.wait()
        copy = self._config.asynchronous
        if copy:
            tensors = {
                file: {name: tensor.detach().clone() for name, tensor in group.items()}
                for file, group in snapshot.tensors.items()
            }
            snapshot = Snapshot(step=snapshot.step, values=snapshot.values, tensors=tensors)
        write_weights = self._weights.capture(copy=copy)
        if not copy:
            self._write(snapshot, write_weights)
            return

        def write() -> None:
            try:
                self._write(snapshot, write_weights)
            except BaseException as error:  # raised again by wait(), on the thread that can act on it
                self._failure = error

        self._writing = threading.Thread(target=write, name="checkpoint")
        self._writing.start()

    def wait(self) -> None:
        """Until the checkpoint that is being written is on the disk. Raises: what went wrong with it."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def restore(self, path: Path) -> Snapshot:
        """Put the weights of a checkpoint into the network and give back the rest.

        Raises: CheckpointError if a file is missing, was changed, or belongs to another format.
        """
        snapshot = read_checkpoint(path)
        self._weights.restore(path)
        return snapshot

    def _write(self, snapshot: Snapshot, write_weights: Callable[[Path], None]) -> None:
        path = self._folder / f"step-{snapshot.step:08d}"
        with atomic_folder(path, overwrite=True) as partial:
            write_weights(partial)
            for name, tensors in snapshot.tensors.items():
                write_tensors(partial / f"{name}.safetensors", tensors)
            state = {
                "format": FORMAT_VERSION,
                "step": snapshot.step,
                "values": snapshot.values,
                "sha256": _hashes(partial),
            }
            (partial / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        for old in checkpoint_paths(self._folder)[: -self._config.keep]:
            (old / STATE_FILE).unlink()  # first: what is half removed must not look whole
            shutil.rmtree(old, ignore_errors=True)


def checkpoint_paths(folder: Path) -> list[Path]:
    """Whole checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / STATE_FILE).is_file()]


def read_checkpoint(path: Path) -> Snapshot:
    """Everything but the weights, after a look at every byte. Raises: CheckpointError."""
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        version, step, values, hashes = state["format"], state["step"], state["values"], state["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no checkpoint of a run: {STATE_FILE} cannot be read ({error})") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {version}, this version reads {FORMAT_VERSION}")
    actual = _hashes(path)
    actual.pop(STATE_FILE, None)
    changed = sorted(name for name in hashes.keys() | actual.keys() if hashes.get(name) != actual.get(name))
    if changed:
        raise CheckpointError(
            f"{path} was changed since it was written: {', '.join(changed)}; resume from another checkpoint of the run"
        )
    files = {file.stem: file for file in sorted(path.glob("*.safetensors"))}
    tensors = {name: read_tensors(file) for name, file in files.items()}
    return Snapshot(step=step, values=values, tensors=tensors)


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder by relative name."""
    out = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                out[path.relative_to(folder).as_posix()] = _file_hash(file)
    return out


def _file_hash(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def random_state() -> Tensor:
    """State of torch's generator on the CPU, uint8, as a checkpoint keeps it (`rng`)."""
    return torch.get_rng_state()


def set_random_state(state: Tensor) -> None:
    """Put it back."""
    torch.set_rng_state(state)
