"""A checkpoint folder as one set of tensors: `model.safetensors`, or shards with `model.safetensors.index.json`.

Reading validates the header of every shard and holds index and shards against each other, so that a download that lacks
a shard, mixes two exports or was tampered with is refused before any weight is read. Writing splits a plan into shards.
Layout: reference "Files" (4.1); `{"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ernie45.checkpoint.atomic import atomic_write_text, require_room
from ernie45.checkpoint.safetensors import (
    SafetensorsWriter,
    TensorEntry,
    check_plan,
    open_regular_file,
    parse_json_object,
    read_fully,
    read_header,
    shorten,
    shown,
    shown_value,
)
from ernie45.errors import CheckpointError, NotFoundError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# Paddle repositories may keep the weights of the draft head (multi-token prediction) in this sub-folder.
MTP_FOLDER = "mtp"

# The index repeats the tensor names of all headers; the same limit as for one header leaves room for a million tensors.
MAX_INDEX_BYTES = 100_000_000


@dataclass(frozen=True)
class WeightIndex:
    """All tensors of a checkpoint folder."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    """Header metadata of all files; a key on which files disagree says nothing about the whole and is left out."""
    files: list[Path]
    total_bytes: int
    """Sum of the tensors' sizes. (The index file states a total as well; it is not relied on.)"""


def open_folder(folder: Path | str) -> WeightIndex:
    """Find and validate the weights in a folder.

    Accepted are `model.safetensors.index.json` with its shards, a single `model.safetensors`, or exactly one other
    `*.safetensors`; an `mtp/` sub-folder with further weights is merged in. Symbolic links to files are followed (the
    Hugging Face cache consists of them).

    Raises: NotFoundError if the folder or its weights are missing; CheckpointError if they are damaged or contradict
        themselves.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NotFoundError(f"there is no folder {root}")
    files = _open_weight_files(root)
    if not files:
        raise NotFoundError(
            f"no weights in {root}: looked for {INDEX_NAME}, {WEIGHTS_NAME} and one other *.safetensors file"
        )
    draft = root / MTP_FOLDER
    if draft.is_dir():
        files += _open_weight_files(draft)
    return _merge(files)


class ShardedWriter:
    """Write a plan of tensors into shards and their index, in any order, holding no tensor. See `write_sharded`."""

    def __init__(
        self,
        folder: Path,
        plan: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        max_shard_bytes: int,
        metadata: Mapping[str, str] | None,
        store_bf16_as_u16: bool,
    ) -> None:
        self.folder = folder
        self._metadata = metadata
        self._store_bf16_as_u16 = store_bf16_as_u16
        self._shards = _split(plan, max_shard_bytes)
        self._names = shard_names(len(self._shards))
        self._shard_of: dict[str, int] = {}
        for idx, shard in enumerate(self._shards):
            for name, _, _ in shard:
                if name in self._shard_of:
                    raise CheckpointError(f"{folder}: planned tensor {shown(name)} is named twice")
                self._shard_of[name] = idx
        for name, shard in zip(self._names, self._shards, strict=True):
            check_plan(folder / name, shard, metadata)
        require_room(folder / self._names[0], self._total_bytes())
        # Open are only the shards between their first and last tensor: few, if the tensors come roughly in planned
        # order.
        self._open: dict[int, SafetensorsWriter] = {}
        self._finished: set[int] = set()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one planned tensor.

        Raises: CheckpointError if unknown, written before, or of another shape or dtype.
        """
        idx = self._shard_of.get(name)
        if idx is None:
            raise CheckpointError(
                f"{self.folder}: tensor {shown(name)} is not in the plan of {len(self._shard_of)} tensors"
            )
        if idx in self._finished:
            raise CheckpointError(f"{self.folder / self._names[idx]}: tensor {shown(name)} was written already")
        writer = self._writer(idx)
        writer.write(name, tensor)
        if writer.num_unwritten == 0:
            self._finish(idx)

    def close(self) -> None:
        """Finish the last shards and write the index.

        Raises: CheckpointError if a tensor is missing (nothing is kept).
        """
        try:
            for idx in range(len(self._shards)):
                if idx not in self._finished:
                    self._writer(idx)  # a shard without any tensor still becomes a file, or names what is missing
                    self._finish(idx)
            if len(self._shards) > 1:
                self._write_index()
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Remove what was written so far."""
        for writer in self._open.values():
            writer.abort()
        for idx in self._finished:
            (self.folder / self._names[idx]).unlink(missing_ok=True)
        self._open.clear()
        self._finished.clear()

    def _writer(self, idx: int) -> SafetensorsWriter:
        if idx not in self._open:
            self._open[idx] = SafetensorsWriter(
                self.folder / self._names[idx],
                self._shards[idx],
                metadata=self._metadata,
                store_bf16_as_u16=self._store_bf16_as_u16,
            )
        return self._open[idx]

    def _finish(self, idx: int) -> None:
        self._open[idx].close()
        del self._open[idx]
        self._finished.add(idx)

    def _write_index(self) -> None:
        weight_map = {name: self._names[idx] for name, idx in sorted(self._shard_of.items())}
        content = {"metadata": {"total_size": self._total_bytes()}, "weight_map": weight_map}
        atomic_write_text(self.folder / INDEX_NAME, json.dumps(content, indent=2) + "\n")

    def _total_bytes(self) -> int:
        return sum(_size_bytes(dtype, shape) for shard in self._shards for _, dtype, shape in shard)

    def __enter__(self) -> "ShardedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def write_sharded(
    folder: Path | str,
    plan: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    *,
    max_shard_bytes: int,
    metadata: Mapping[str, str] | None = None,
    store_bf16_as_u16: bool = False,
) -> ShardedWriter:
    """Start writing a checkpoint folder: one `model.safetensors`, or shards of at most `max_shard_bytes` with an index.

    The plan is split in its order; a tensor above the limit gets a shard of its own. Use the result as a context
    manager.

    Args: plan: name, dtype and shape of every tensor. metadata: strings for the header of every shard.
        store_bf16_as_u16: as for SafetensorsWriter.
    Raises: CheckpointError if the folder holds weights already (two exports must not mix) or the plan cannot be
        written; CapacityError if the disk has no room for all of it.
    """
    target = Path(folder)
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes is {max_shard_bytes}, expected at least 1")
    target.mkdir(parents=True, exist_ok=True)
    present = [path.name for path in (target / INDEX_NAME, *_weight_files(target)) if os.path.lexists(path)]
    if present:
        raise CheckpointError(f"{target} holds weights already ({shorten(', '.join(present))}): choose an empty folder")
    return ShardedWriter(target, plan, max_shard_bytes, metadata, store_bf16_as_u16)


def shard_names(count: int) -> list[str]:
    """Published names of the weight files of a folder."""
    if count == 1:
        return [WEIGHTS_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


@dataclass(frozen=True)
class _OpenedFile:
    path: Path
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]


def _open_weight_files(folder: Path) -> list[_OpenedFile]:
    """Read the headers of one folder (without `mtp/`); empty if it has no weights."""
    if os.path.lexists(folder / INDEX_NAME):
        return _open_shards(folder)
    present = _weight_files(folder)
    names = [path.name for path in present]
    if WEIGHTS_NAME in names:
        present = [folder / WEIGHTS_NAME]
    if len(present) > 1:
        raise CheckpointError(
            f"{folder} has {len(present)} weight files ({shorten(', '.join(names))}) and no {INDEX_NAME}: "
            "the index is missing, download it, or keep one file"
        )
    return [_open_file(path) for path in present]


def _weight_files(folder: Path) -> list[Path]:
    # Hidden files are not weights: unfinished ones, and the copies that some file systems keep beside each file.
    return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors" and not path.name.startswith("."))


def _open_file(path: Path) -> _OpenedFile:
    header = read_header(path)
    return _OpenedFile(path, header.entries, header.metadata)


def _open_shards(folder: Path) -> list[_OpenedFile]:
    index = folder / INDEX_NAME
    shards: dict[str, set[str]] = {}
    for tensor, file in _read_weight_map(index).items():
        shards.setdefault(file, set()).add(tensor)
    if WEIGHTS_NAME not in shards and os.path.lexists(folder / WEIGHTS_NAME):
        raise CheckpointError(
            f"{folder} has both {INDEX_NAME} and a {WEIGHTS_NAME} that the index does not know: remove the one that "
            "is stale"
        )
    # Other files are left alone: repositories carry adapters and exports for other programs beside the indexed shards.
    return [_open_shard(index, name, shards[name]) for name in sorted(shards)]


def _open_shard(index: Path, name: str, promised: set[str]) -> _OpenedFile:
    try:
        shard = _open_file(index.parent / name)
    except NotFoundError as error:
        raise CheckpointError(f"{index} names the shard {shown(name)}, which is missing: download it") from error
    _refuse_difference(promised - shard.entries.keys(), f"{index} promises in {name}, where it is not")
    _refuse_difference(shard.entries.keys() - promised, f"{shard.path} holds, but {index.name} does not place there")
    return shard


def _refuse_difference(names: set[str], what: str) -> None:
    if names:
        raise CheckpointError(
            f"tensor {shown(min(names))} (one of {len(names)}): {what}; index and shards do not fit together"
        )


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = parse_json_object(_read_bounded(index), index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map of tensors, got {shown_value(weight_map)}")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise CheckpointError(
                f"{index}: tensor {shown(tensor)} lies in {shown_value(file)}; expected the plain name of a "
                ".safetensors file "
                "in the same folder"
            )
    return weight_map


def _is_plain_name(name: str) -> bool:
    """Whether a name from an index can only mean a file directly in the folder."""
    return name.endswith(".safetensors") and not any(trick in name for trick in ("/", "\\", "..", "\0"))


def _read_bounded(path: Path) -> bytes:
    fd = open_regular_file(path)
    try:
        size = os.fstat(fd).st_size
        if size > MAX_INDEX_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, an index has at most {MAX_INDEX_BYTES}")
        raw = bytearray(size)
        read_fully(fd, path, 0, memoryview(raw))
    finally:
        os.close(fd)
    return bytes(raw)


def _merge(files: Sequence[_OpenedFile]) -> WeightIndex:
    entries: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    disputed: set[str] = set()
    for file in files:
        for name, entry in file.entries.items():
            if name in entries:
                raise CheckpointError(
                    f"tensor {shown(name)} is in {entries[name].file} and again in {file.path}: keep one"
                )
            entries[name] = entry
        for key, value in file.metadata.items():
            if metadata.setdefault(key, value) != value:
                disputed.add(key)
    agreed = {key: value for key, value in metadata.items() if key not in disputed}
    total_bytes = sum(entry.size_bytes for entry in entries.values())
    return WeightIndex(entries, agreed, [file.path for file in files], total_bytes)


def _split(
    plan: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], max_shard_bytes: int
) -> list[list[tuple[str, torch.dtype, tuple[int, ...]]]]:
    shards: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, dtype, shape in plan:
        size = _size_bytes(dtype, shape)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, shape))
        filled += size
    return shards


def _size_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size
