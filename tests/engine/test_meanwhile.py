"""Jobs beside a block: done in order on one other thread, none running behind the block, and no trouble at the ends of
processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from ernie45.engine.meanwhile import meanwhile


def test_jobs_run_in_order_on_one_other_thread() -> None:
    seen: list[tuple[int, str]] = []
    for _ in range(2):
        last = threading.Event()
        jobs = [lambda i=i: seen.append((i, threading.current_thread().name)) for i in range(5)]
        with meanwhile([*jobs, last.set]):
            assert last.wait(30)
    assert [i for i, _ in seen] == [*range(5)] * 2
    assert len({name for _, name in seen} - {threading.current_thread().name}) == 1


def test_nothing_runs_behind_the_block() -> None:
    begun, done = threading.Event(), []

    def slow() -> None:
        begun.set()
        time.sleep(0.05)
        done.append("slow")

    with meanwhile([slow, lambda: done.append("no turn")]):
        assert begun.wait(30)
    assert done == ["slow"]
    time.sleep(0.05)
    assert done == ["slow"]


def test_jobs_that_wait_behind_another_block_are_dropped() -> None:
    begun, go_on, done = threading.Event(), threading.Event(), []

    def blocks() -> None:
        begun.set()
        go_on.wait(30)

    def other_engine() -> None:
        with meanwhile([blocks]):
            assert begun.wait(30)

    other = threading.Thread(target=other_engine)
    other.start()
    assert begun.wait(30)
    with meanwhile([lambda: done.append("late")]):
        pass
    go_on.set()
    other.join(30)
    with meanwhile([(last := threading.Event()).set]):
        assert last.wait(30)
    assert done == []


def test_errors_of_jobs_are_dropped_and_those_of_the_block_are_not() -> None:
    last = threading.Event()

    def fails() -> None:
        raise ValueError("job")

    def block() -> None:
        with meanwhile([fails, last.set]):
            assert last.wait(30)
            raise RuntimeError("block")

    with pytest.raises(RuntimeError, match="block"):
        block()


def test_without_jobs_no_thread_is_asked() -> None:
    with meanwhile([]):
        assert threading.current_thread().name


PROGRAMS = {
    # Threads that are no daemons outlive the main one; by then nothing new can be begun.
    "a thread that goes on when the interpreter ends": """
import threading, time
from ernie45.engine.meanwhile import meanwhile
def steps():
    for _ in range(20):
        with meanwhile([lambda: None]):
            time.sleep(0.01)
    print("done", flush=True)
with meanwhile([lambda: None]):
    pass
threading.Thread(target=steps).start()
""",
    "a daemon that is cut off": """
import threading, time
from ernie45.engine.meanwhile import meanwhile
def steps():
    while True:
        with meanwhile([lambda: time.sleep(0.001)]):
            time.sleep(0.001)
threading.Thread(target=steps, daemon=True).start()
time.sleep(0.1)
print("done", flush=True)
""",
    "a child that is forked": """
import os, threading
from ernie45.engine.meanwhile import meanwhile
def works():
    done = threading.Event()
    with meanwhile([done.set]):
        return done.wait(30)
assert works()
child = os.fork()
if child == 0:
    os._exit(0 if works() else 1)
assert os.waitpid(child, 0)[1] == 0
assert works()
print("done", flush=True)
""",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_processes_end(name: str) -> None:
    if "fork" in name and not hasattr(sys.modules["os"], "fork"):
        pytest.skip("this system does not fork")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAMS[name]], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == ("done\n", "", 0)
