"""The thread pool under fork, spawn, several Python threads, a changing thread count, and at exit."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ernie45.kernels.norm import rms_norm


def work(seed: int = 0) -> str:
    """A result that takes the pool (large enough to be divided), as a digest."""
    x = torch.arange(200 * 1024, dtype=torch.float32).sub(seed).sin().reshape(200, 1024)
    y = rms_norm(x, torch.ones(1024), 1e-5)
    return hashlib.sha256(y.numpy().tobytes()).hexdigest()


def test_a_forked_child_computes_and_exits(extension: ModuleType) -> None:
    extension.set_num_threads(3)
    x, weight = torch.arange(200 * 1024, dtype=torch.float32).reshape(200, 1024), torch.ones(1024)
    expected, found = torch.empty_like(x), torch.empty_like(x)
    extension.rms_norm(x, weight, 1e-5, expected)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # only the kernel and plain system calls: PyTorch's own threads do not survive a fork
        for _ in range(5):
            extension.rms_norm(x, weight, 1e-5, found)
        os.write(writer, hashlib.sha256(found.numpy().tobytes()).hexdigest().encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        assert stream.read() == hashlib.sha256(expected.numpy().tobytes()).hexdigest()
    assert os.waitpid(child, 0)[1] == 0
    extension.rms_norm(x, weight, 1e-5, found)
    assert torch.equal(found, expected), "the parent's pool goes on"


def test_a_spawned_process_computes(extension: ModuleType) -> None:
    here = work()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_digest_of_spawned, (str(Path(__file__)),)) == here


def _digest_of_spawned(path: str) -> str:
    code = f"import runpy; print(runpy.run_path({path!r})['work']())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_several_python_threads_at_once(extension: ModuleType) -> None:
    extension.set_num_threads(3)
    expected = [work(seed) for seed in range(4)]
    found: list[str] = [""] * 4

    def run(seed: int) -> None:
        for _ in range(10):
            found[seed] = work(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == expected


def test_thread_count_changes_while_kernels_run(extension: ModuleType) -> None:
    expected, stop, wrong = work(), threading.Event(), []

    def run() -> None:
        while not stop.is_set():
            if work() != expected:
                wrong.append(True)

    worker = threading.Thread(target=run)
    worker.start()
    for count in [1, 2, 8, 3] * 10:
        extension.set_num_threads(count)
        assert extension.num_threads() == count
        work()
    stop.set()
    worker.join(timeout=60)
    assert not worker.is_alive()
    assert not wrong


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="/proc/self/task counts threads on Linux only")
def test_threads_start_late_and_end_with_the_count(extension: ModuleType) -> None:
    """In a process of its own, whose threads nobody else starts or ends."""
    code = f"""
import os, runpy, time
work = runpy.run_path({str(Path(__file__))!r})["work"]
from ernie45.kernels.choice import native
pool = native()

def count():  # a joined thread stays in /proc for a moment
    time.sleep(0.2)
    return len(os.listdir("/proc/self/task"))

pool.set_num_threads(1)
work(); before = count()
pool.set_num_threads(4)
waiting = count()
work(); running = count()
pool.set_num_threads(1)
print(waiting - before, running - before, count() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "0 3 0\n"


def test_process_ends_cleanly_with_a_live_pool(extension: ModuleType) -> None:
    code = f"""
import runpy, threading
work = runpy.run_path({str(Path(__file__))!r})["work"]
from ernie45.kernels.choice import native
native().set_num_threads(4)
threading.Thread(target=lambda: [work() for _ in range(20)]).start()
work(); print("done")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")


def test_a_wrong_count_is_refused(extension: ModuleType) -> None:
    for count in (0, -1, 1025):
        with pytest.raises(ValueError, match=rf"\[set_num_threads\] expected 1 to 1024, got {count}"):
            extension.set_num_threads(count)
