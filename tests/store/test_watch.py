"""Watching a folder grow."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ernie45.store.watch import watched


def test_the_folder_is_measured_until_the_block_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ernie45.store.watch._POLL_S", 0.001)
    seen: list[tuple[int, int]] = []
    reached = {size: threading.Event() for size in (0, 10, 25)}

    def report(done: int, total: int) -> None:
        seen.append((done, total))
        reached[done].set()

    with watched(tmp_path, 25, report):
        assert reached[0].wait(10)
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "a").write_bytes(b"x" * 10)
        # a folder has a size of its own, which is no download
        assert reached[10].wait(10)
        (tmp_path / "b").write_bytes(b"x" * 100)  # more than promised
        assert reached[25].wait(10)
    assert {total for _, total in seen} == {25}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert not any(thread.name == "download progress" for thread in threading.enumerate())


def test_nobody_listening_costs_nothing(tmp_path: Path) -> None:
    with watched(tmp_path / "missing", 10, None):
        assert not any(thread.name == "download progress" for thread in threading.enumerate())
