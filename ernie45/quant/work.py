"""A checkpoint folder in the making that survives `kill -9`: shards at their final size, and a journal of what is done.

The folder is `.NAME.quantizing` beside the destination, the journal `.NAME.quantizing.journal`. The journal's first
line says which work this is; each further line names finished tensors with their checksums, and is written once their
bytes are on the disk. Going on checks every checksum again. At the end the folder is renamed, then the journal
removed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ernie45.checkpoint.atomic import check_folder_target, publish_folder, require_room
from ernie45.checkpoint.index import INDEX_NAME, shard_names
from ernie45.checkpoint.safetensors import TensorEntry, file_layout, read_tensor, tensor_bytes
from ernie45.errors import CapacityError, CheckpointError

Plan = Sequence[tuple[str, torch.dtype, tuple[int, ...]]]
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BLOCK_BYTES = 16 << 20
_MARK = "ernie45 quantizing "


class WorkFolder:
    """Fill with `write` and `finish`, end with `publish`. What `done` names is there already and must not be written.

    The lock on the journal keeps a second process out; it ends with this one.
    """

    def __init__(
        self, target: Path, shards: Sequence[Plan], identity: Mapping[str, Any], *, resume: bool, overwrite: bool
    ) -> None:
        """Open or create.

        Args: shards: the tensors of every weight file. identity: what the result depends on; work begun under another
                identity is thrown away. resume: False throws away in any case.
        Raises: CheckpointError if the target exists and may not be replaced, another process is at it, or the names
            are taken by something else; CapacityError if the disk has no room.
        """
        self.target, self._overwrite = Path(os.path.abspath(target)), overwrite
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.folder = self.target.with_name(f".{self.target.name}.quantizing")
        self._journal_path = self.target.with_name(f"{self.folder.name}.journal")
        self.done: dict[str, dict[str, Any]] = {}
        """Records of finished work by key."""
        self.published = False
        """The target is finished already: nothing is left to do."""
        self._hashes: dict[str, Any] = {}
        self._files: dict[Path, int] = {}
        self._journal = _locked(self._journal_path)
        try:
            identity_line = _MARK + json.dumps(identity, sort_keys=True)
            # Killed between the last two steps, giving the name and removing the journal.
            self.published = (
                self.target.is_dir()
                and not self.folder.exists()
                and _first_line(self._journal_path.read_bytes()) == identity_line
            )
            if self.published:
                self._journal_path.unlink()
                return
            check_folder_target(self.target, overwrite=overwrite)
            records = self._read_journal(identity_line) if resume else None
            if records is None:
                self._start_anew(identity_line)
            self._open_files(shards)
            for record in records or ():
                if all(self._hash(name) == digest for name, digest in record["sha256"].items()):
                    self.done[record["key"]] = record
            self._require_room()
        except BaseException:
            if not os.fstat(self._journal).st_size:
                self._journal_path.unlink()
            self.close()
            raise

    def write(self, name: str, tensor: Tensor, offset_bytes: int = 0) -> None:
        """Write (a piece of) a tensor; pieces come in order. Raises: CapacityError if the disk is full."""
        slot = self._slots[name]
        data = tensor_bytes(tensor, f"{slot.file}: tensor {name}")
        assert offset_bytes + data.nbytes <= slot.size_bytes, f"{name} takes {slot.size_bytes} bytes"
        self._hashes.setdefault(name, hashlib.sha256()).update(data)
        self._write_at(slot.file, slot.offset + offset_bytes, data)

    def finish(self, key: str, names: Sequence[str], facts: Mapping[str, Any]) -> None:
        """Record that tensors are complete, once they are on the disk."""
        for file in {self._slots[name].file for name in names}:
            os.fsync(self._files[file])
        digests = {name: self._hashes.pop(name).hexdigest() for name in names}
        record = {"key": key, "sha256": digests, **facts}
        self._append(json.dumps(record))
        self.done[key] = record

    def read(self, name: str) -> Tensor:
        """A tensor that is finished."""
        return read_tensor(self._slots[name])

    def publish(self, extra_files: Mapping[str, bytes]) -> None:
        """Add the small files and give the folder its name. Raises: CheckpointError if a tensor is missing."""
        finished = {name for record in self.done.values() for name in record["sha256"]}
        missing = self._slots.keys() - finished
        assert not missing, f"{len(missing)} tensors were never written: {sorted(missing)[:3]}"
        self._close_files()
        for name, content in ({INDEX_NAME: self._index()} | dict(extra_files)).items():
            try:
                (self.folder / name).write_bytes(content)
            except OSError as error:
                raise self._explain(error, self.folder / name) from error
        publish_folder(self.folder, self.target, overwrite=self._overwrite)
        self._journal_path.unlink()

    def discard(self) -> None:
        """Remove folder and journal: for input that can never be finished."""
        self._close_files()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._journal_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of files and lock; what is done stays for the next run."""
        self._close_files()
        os.close(self._journal)

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_journal(self, identity_line: str) -> list[dict[str, Any]] | None:
        """Records of this same work; None if there is none to go on with."""
        text = self._journal_path.read_bytes()
        if _first_line(text) != identity_line or not self.folder.is_dir():
            return None
        end = text.rfind(b"\n") + 1  # a killed process may leave half a line
        os.ftruncate(self._journal, end)
        lines = text[:end].decode().splitlines()
        return [json.loads(line) for line in lines[1:]]

    def _start_anew(self, identity_line: str) -> None:
        begun = _first_line(self._journal_path.read_bytes())
        if os.path.lexists(self.folder) and not begun.startswith(_MARK):
            raise CheckpointError(
                f"{self.folder} is in the way and not of such a run: remove it, or choose another folder"
            )
        if begun and not begun.startswith(_MARK):
            raise CheckpointError(
                f"{self._journal_path} is in the way and no journal: remove it, or choose another folder"
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        os.ftruncate(self._journal, 0)
        self._append(identity_line)
        self.folder.mkdir()

    def _open_files(self, shards: Sequence[Plan]) -> None:
        """Lay out every shard; an existing one keeps its data."""
        self._slots: dict[str, TensorEntry] = {}
        for name, plan in zip(shard_names(len(shards)), shards, strict=True):
            path = self.folder / name
            layout = file_layout(path, plan, {"format": "ernie45"})
            self._slots |= layout.slots
            try:
                self._files[path] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                os.ftruncate(self._files[path], layout.size_bytes)
            except OSError as error:
                raise self._explain(error, path) from error
            self._write_at(path, 0, memoryview(layout.head))

    def _require_room(self) -> None:
        finished = {name for record in self.done.values() for name in record["sha256"]}
        missing = sum(slot.size_bytes for name, slot in self._slots.items() if name not in finished)
        require_room(self.folder, missing)

    def _write_at(self, path: Path, offset: int, data: memoryview) -> None:
        done = 0
        try:
            while done < data.nbytes:
                done += os.pwrite(self._files[path], data[done : done + _BLOCK_BYTES], offset + done)
        except OSError as error:
            raise self._explain(error, path) from error

    def _append(self, line: str) -> None:
        try:
            os.lseek(self._journal, 0, os.SEEK_END)
            os.write(self._journal, line.encode() + b"\n")
            os.fsync(self._journal)
        except OSError as error:
            raise self._explain(error, self._journal_path) from error

    def _hash(self, name: str) -> str | None:
        slot = self._slots.get(name)
        if slot is None:
            return None
        digest, position, end = hashlib.sha256(), slot.offset, slot.offset + slot.size_bytes
        while position < end:
            block = os.pread(self._files[slot.file], min(_BLOCK_BYTES, end - position), position)
            if not block:
                return None
            digest.update(block)
            position += len(block)
        return digest.hexdigest()

    def _index(self) -> bytes:
        total = sum(slot.size_bytes for slot in self._slots.values())
        weight_map = {name: slot.file.name for name, slot in sorted(self._slots.items())}
        return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()

    def _explain(self, error: OSError, path: Path) -> CapacityError | CheckpointError:
        kept = f"finished tensors are kept in {self.folder}: run the same command again, or remove it"
        if error.errno in _DISK_FULL:
            return CapacityError(f"no room to write {path} ({error.strerror}); {kept}")
        return CheckpointError(f"cannot write {path} ({error.strerror}); {kept}")

    def _close_files(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()


def _locked(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise CheckpointError(f"another process is at work on {path}: wait for it, or choose another folder") from error
    return fd


def _first_line(text: bytes) -> str:
    """Empty if not even that was written to its end."""
    return text[: text.index(b"\n")].decode("utf-8", "replace") if b"\n" in text else ""
