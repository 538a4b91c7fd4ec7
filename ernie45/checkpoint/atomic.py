"""Files and folders that appear whole or not at all, also when the writer is killed or the disk fills up.

Everything is first written beside its destination as `.{name}.partial-{owner}-{random}` and renamed once it is on the
disk. The owner part identifies the writing process, so that a later run can tell what a killed one left behind and
remove it.
"""

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ernie45.errors import CapacityError, CheckpointError, NotFoundError

# Linux: flags of renameat2(2).
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100

# One system call moves at most 2 GiB; smaller blocks also keep an interrupt (Ctrl-C) responsive.
_BLOCK_BYTES = 64 << 20

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_folder(dst: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a fresh folder to fill; when the block ends well it becomes `dst`, otherwise it is removed.

    With `overwrite`, an existing `dst` is exchanged in one step (Linux) and then deleted; where the file system cannot
    exchange, two renames leave a moment without `dst`, and the next call puts the old folder back if the process died
    in that moment.

    Args: dst: folder to create; parents are made. overwrite: whether an existing folder may be replaced.
    Raises: CheckpointError before any work if `dst` exists and may not be replaced, or is not a plain folder.
    """
    target = Path(os.path.abspath(dst))
    if not target.name:
        raise CheckpointError(f"{target} cannot be replaced: name a folder below it")
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean_up_after_killed_runs(target)
    check_folder_target(target, overwrite=overwrite)
    partial = partial_path(target)
    partial.mkdir()
    try:
        yield partial
        publish_folder(partial, target, overwrite=overwrite)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yield a fresh hidden folder beside what will become `target`; it is removed when the block ends, or by the next run for
    that target if this one is killed. Parents of `target` are made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean_up_after_killed_runs(target)
    scratch = partial_path(target)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_folder_target(target: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError if a folder cannot become `target`: something is there that may not be replaced."""
    if not os.path.lexists(target):
        return
    if target.is_symlink():
        raise CheckpointError(f"{target} is a symbolic link: name the folder it points to ({os.path.realpath(target)})")
    if not target.is_dir():
        raise CheckpointError(f"{target} exists and is not a folder: choose another name or remove it")
    if not overwrite:
        raise CheckpointError(f"{target} exists already: choose another folder, remove it, or allow overwriting")


def publish_folder(partial: Path, target: Path, *, overwrite: bool) -> None:
    """Bring a finished folder to the disk and give it its name, in place of an older folder if that is allowed."""
    _sync_tree(partial)
    _publish_folder(partial, target, overwrite)
    _sync_path(target.parent)


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8 so that `path` holds either its old content or all of the new one."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data` so that `path` holds either its old content or all of the new one.

    Raises: CapacityError if the disk is full; NotFoundError if the folder does not exist.
    """
    target = Path(path)
    file = StreamedFile(target, len(data))
    try:
        file.write_at(0, memoryview(data))
        file.commit()
    except BaseException:
        file.abort()
        raise


class StreamedFile:
    """A file of known size that is filled at offsets, in any order, and appears at `path` when `commit` is called.

    Nothing is held in memory. Places that are never written read as zero, so the caller keeps the account of what it
    wrote.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Reserve the name and check the room.

        Raises: CapacityError if the disk has fewer than `size_bytes` free; NotFoundError if the folder does not exist.
        """
        self.path = Path(path)
        self.size_bytes = size_bytes
        self._fd = -1
        if not self.path.parent.is_dir():
            raise NotFoundError(f"cannot write {self.path}: there is no folder {self.path.parent}")
        if self.path.is_dir():
            raise CheckpointError(f"cannot write {self.path}: it is a folder")
        _clean_up_after_killed_runs(self.path)
        require_room(self.path, size_bytes)
        self._partial = partial_path(self.path)
        try:
            self._fd = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            os.ftruncate(self._fd, size_bytes)
        except OSError as error:
            self.abort()
            raise self._explain(error) from error

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write `data` (bytes) at `offset`. Raises: CapacityError if the disk is full, CheckpointError if it fails."""
        end = offset + data.nbytes
        assert 0 <= offset <= end <= self.size_bytes, f"bytes {offset} to {end} lie outside {self.size_bytes}"
        done = 0
        try:
            while done < data.nbytes:
                done += os.pwrite(self._fd, data[done : done + _BLOCK_BYTES], offset + done)
        except OSError as error:
            raise self._explain(error) from error

    def commit(self) -> None:
        """Bring the file to the disk and give it its name, replacing an older file."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._explain(error) from error
        os.close(self._fd)
        self._fd = -1
        os.replace(self._partial, self.path)
        _sync_path(self.path.parent)

    def abort(self) -> None:
        """Remove what was written; does nothing after `commit` or a second time."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._partial.unlink(missing_ok=True)

    def _explain(self, error: OSError) -> CapacityError | CheckpointError:
        if error.errno in _DISK_FULL:
            return _disk_full(self.path, self.size_bytes, _free_bytes(self.path.parent))
        return CheckpointError(f"cannot write {self.path}: {error.strerror}")


def require_room(path: Path, size_bytes: int) -> None:
    """Raise CapacityError unless the disk of `path` has `size_bytes` free: better now than after an hour of writing."""
    free = _free_bytes(path.parent)
    if size_bytes > free:
        raise _disk_full(path, size_bytes, free)


def partial_path(path: Path) -> Path:
    """Return a fresh hidden sibling name for what will become `path`; it names this process as its owner."""
    return _sibling(path, "partial")


def _sibling(path: Path, role: str) -> Path:
    pid = os.getpid()
    return path.with_name(f".{path.name}.{role}-{pid}.{_start_ticks(pid)}-{_host_tag()}-{secrets.token_hex(4)}")


def _clean_up_after_killed_runs(target: Path) -> None:
    """Remove partial siblings of `target` whose owner is dead, and restore a folder that was about to be replaced."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"(partial|replaced)-(\d+)\.(\d+)-([0-9a-f]{8})-[0-9a-f]{8}")
    for name in os.listdir(target.parent):
        match = pattern.fullmatch(name)
        if match is None:
            continue
        role, pid, start, host = match.groups()
        # A shared disk may carry the work of other machines, whose processes cannot be seen from here.
        if host != _host_tag() or _is_alive(int(pid), int(start)):
            continue
        left_behind = target.parent / name
        if role == "replaced" and not os.path.lexists(target):
            os.rename(left_behind, target)
        elif left_behind.is_dir() and not left_behind.is_symlink():
            shutil.rmtree(left_behind, ignore_errors=True)
        else:
            left_behind.unlink(missing_ok=True)


def _host_tag() -> str:
    return hashlib.sha256(socket.gethostname().encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _start_ticks(pid: int) -> int:
    """Start time of a process in clock ticks after boot, 0 where it cannot be read.

    Process ids come back, in containers at every start: the start time tells the old bearer of a number from the new
    one.
    Source: proc(5), field 22 of /proc/[pid]/stat; the second field, in parentheses, may itself hold spaces.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    return int(text.rpartition(b")")[2].split()[19])


def _is_alive(pid: int, start: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it exists and belongs to somebody else
    return _start_ticks(pid) in (0, start)


def _publish_folder(partial: Path, target: Path, overwrite: bool) -> None:
    if not (overwrite and target.is_dir()):
        _rename_new(partial, target)
        return
    if _renameat2(partial, target, _RENAME_EXCHANGE):
        old = partial
    else:
        old = _sibling(target, "replaced")
        os.rename(target, old)
        try:
            os.rename(partial, target)
        except OSError:
            os.rename(old, target)
            raise
    _sync_path(target.parent)
    try:
        shutil.rmtree(old)
    except OSError as error:
        raise CheckpointError(
            f"{target} is replaced, but its old content in {old} cannot be deleted: {error}"
        ) from error


def _rename_new(partial: Path, target: Path) -> None:
    try:
        # A plain rename would replace an empty folder that somebody made in the meantime.
        if not _renameat2(partial, target, _RENAME_NOREPLACE):
            os.rename(partial, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise CheckpointError(
                f"{target} was created by another process meanwhile: choose another folder"
            ) from error
        raise


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Call renameat2(2); False if the C library, kernel or file system does not know it. Other failures: OSError."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(target))


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if path.is_file() and not path.is_symlink():
                _sync_path(path)
        _sync_path(Path(root))


def _sync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(fd)


def _free_bytes(folder: Path) -> int:
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize


def _disk_full(path: Path, needed: int, free: int) -> CapacityError:
    return CapacityError(
        f"no room to write {path}: it needs {needed} bytes, {free} are free in {path.parent}: "
        "free some space or choose another disk"
    )
