"""Atomic files and folders, with processes that are really killed."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ernie45.checkpoint import atomic
from ernie45.checkpoint.atomic import StreamedFile, atomic_folder, atomic_write_bytes, atomic_write_text, partial_path
from ernie45.errors import CapacityError, CheckpointError, NotFoundError

REPOSITORY = Path(atomic.__file__).parents[2]

# Replaces the folder again and again: files `a` and `b` hold the same number, 40 more make the deletion slow.
REPLACE_FOR_EVER = """
import itertools, sys
from ernie45.checkpoint import atomic
if sys.argv[2] == "renames":
    atomic._renameat2 = lambda *_: False
for number in itertools.count():
    with atomic.atomic_folder(sys.argv[1], overwrite=True) as folder:
        (folder / "a").write_text(str(number))
        for filler in range(40):
            (folder / f"f{filler}").write_text("x")
        (folder / "b").write_text(str(number))
    print(number, flush=True)
"""

WRITE_AND_WAIT = """
import sys, time
from pathlib import Path
from ernie45.checkpoint.atomic import StreamedFile, atomic_folder
StreamedFile(Path(sys.argv[1]) / "file", 10)
with atomic_folder(Path(sys.argv[1]) / "folder") as folder:
    (folder / "a").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def start(code: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_folder_appears_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with atomic_folder(target) as folder:
        assert not target.exists()
        assert folder.parent == target.parent
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        (folder / "link").symlink_to("sub/a")
    assert (target / "link").read_text() == "1"
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == tmp_path.joinpath("deep").stat().st_mode & 0o777


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_replaces_all(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_renameat2", lambda *_: False)
    target = tmp_path / "model"
    for round_ in ("old", "new"):
        with atomic_folder(target, overwrite=True) as folder:
            (folder / round_).write_text(round_)
    assert content(target) == {"new": "new"}
    assert list(tmp_path.iterdir()) == [target]


def test_existing_targets_are_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("model")
    for name, overwrite, message in [
        ("model", False, "allow overwriting"),
        ("file", True, "not a folder"),
        ("link", True, "symbolic link"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            atomic_folder(tmp_path / name, overwrite=overwrite).__enter__()
    with pytest.raises(CheckpointError, match="name a folder"):
        atomic_folder("/").__enter__()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "model"]


@pytest.mark.parametrize("exchange", [True, False])
def test_target_made_meanwhile_is_not_touched(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_renameat2", lambda *_: False)

    def race() -> None:
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "mine").write_text("1")
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "theirs").write_text("2")

    with pytest.raises(CheckpointError, match="another process"):
        race()
    assert content(tmp_path / "model") == {"theirs": "2"}
    assert len(list(tmp_path.iterdir())) == 1


def test_errors_keep_the_old_folder(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "model", overwrite=True) as folder:
            (folder / "b").write_text("new")
            raise ZeroDivisionError

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_text("old")
    with pytest.raises(ZeroDivisionError):
        fail()
    assert content(tmp_path / "model") == {"a": "old"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("how", ["exchange", "renames"])
def test_killed_in_the_middle_leaves_old_or_new(how: str, tmp_path: Path) -> None:
    target = tmp_path / "model"
    for delay_ms in (1, 3, 7):
        process = start(REPLACE_FOR_EVER, str(target), how)
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first == "0\n"
        time.sleep(delay_ms / 1000)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.stdout.close()
        process.wait()
        done = int(rest[-1]) if rest else 0
        # Two renames may leave the moment between them; the next start repairs it. The exchange leaves none.
        if how == "renames":
            atomic._clean_up_after_killed_runs(target)
        found = content(target)
        assert len(found) == 42
        assert found["a"] == found["b"]
        assert int(found["a"]) in (done, done + 1)
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "a").write_text("last")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_leftovers_of_the_dead_are_removed_and_of_the_living_kept(tmp_path: Path) -> None:
    process = start(WRITE_AND_WAIT, str(tmp_path))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    foreign = partial_path(tmp_path / "folder")
    foreign = foreign.with_name(foreign.name.replace(atomic._host_tag(), "00000000"))
    reused = tmp_path / f".folder.partial-{os.getpid()}.1-{atomic._host_tag()}-00000000"
    unrelated = [tmp_path / ".folder.partial-x", tmp_path / ".folder2.partial-1.1-00000000-00000000", foreign]
    for folder in (*unrelated, reused):
        folder.mkdir()
    with atomic_folder(tmp_path / "folder"):
        pass
    assert not reused.exists()  # the number lives on in this process, but the one that wrote it started at another time
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".f")]) == len(unrelated) + 2
    process.kill()
    process.stdout.close()
    process.wait()
    atomic_write_text(tmp_path / "file", "x")
    with atomic_folder(tmp_path / "folder", overwrite=True):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder", *(path.name for path in unrelated)}


def test_interrupted_replacement_is_undone(tmp_path: Path) -> None:
    old = tmp_path / f".model.replaced-{2**22 + 1}.1-{atomic._host_tag()}-00000000"
    old.mkdir()
    (old / "a").write_text("old")
    with pytest.raises(CheckpointError, match="exists already"):
        atomic_folder(tmp_path / "model").__enter__()
    assert content(tmp_path / "model") == {"a": "old"}


def test_failed_second_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_renameat2", lambda *_: False)
    rename = os.rename

    def fail_on_partial(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise OSError(errno.EIO, "broken disk")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_on_partial)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_text("old")
    with pytest.raises(OSError, match="broken disk"), atomic_folder(tmp_path / "model", overwrite=True):
        pass
    assert content(tmp_path / "model") == {"a": "old"}
    assert len(list(tmp_path.iterdir())) == 1


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    atomic_write_text(path, "ü")
    atomic_write_text(path, "文心")
    assert path.read_bytes() == "文心".encode()
    atomic_write_bytes(path, b"")
    assert path.read_bytes() == b""
    atomic_write_bytes(path, b"old")
    with pytest.raises(NotFoundError, match="no folder"):
        atomic_write_text(tmp_path / "no" / "a", "")
    with pytest.raises(CheckpointError, match="is a folder"):
        atomic_write_text(tmp_path, "")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CapacityError, match="needs 3 bytes"):
        atomic_write_bytes(path, b"new")
    assert content(tmp_path) == {"a.json": "old"}


def test_file_size_limit_of_the_process_is_a_capacity_error(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from ernie45.checkpoint.atomic import atomic_write_bytes
from ernie45.errors import CapacityError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    atomic_write_bytes(Path(sys.argv[1]) / "a", bytes(1001))
except CapacityError as error:
    print(error)
"""
    process = start(code, str(tmp_path))
    assert "needs 1001 bytes" in process.communicate()[0]
    assert list(tmp_path.iterdir()) == []


def test_streamed_file_is_invisible_until_commit(tmp_path: Path) -> None:
    file = StreamedFile(tmp_path / "a", 6)
    file.write_at(4, memoryview(b"ef"))
    file.write_at(0, memoryview(b"abcd"))
    assert not (tmp_path / "a").exists()
    file.commit()
    file.abort()
    assert content(tmp_path) == {"a": "abcdef"}
    with pytest.raises(AssertionError, match="bytes 5 to 7 lie outside 6"):
        file.write_at(5, memoryview(b"xy"))
