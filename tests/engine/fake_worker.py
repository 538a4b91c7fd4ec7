"""A process that speaks as the engine's does, and misbehaves as its first argument says. No torch: it starts at once.

python tests/engine/fake_worker.py BEHAVIOUR FD
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from typing import Any

from ernie45.engine import wire
from ernie45.engine.pages import Books
from ernie45.engine.pieces import Piece
from ernie45.engine.request import End, Output, Usage
from ernie45.engine.stats import EngineStats

STATS = EngineStats(
    running=0,
    waiting=0,
    pages=Books(free=1, cached=0, in_use=0, total=1),
    page_size=16,
    steps=0,
    prompt_tokens=0,
    cached_tokens=0,
    generated_tokens=0,
    drafted_tokens=0,
    accepted_tokens=0,
    preemptions=0,
)
STARTED = wire.Started(
    pid=os.getpid(),
    max_model_len=64,
    context=64,
    vocab_size=100,
    kind="fake",
    weights="none",
    weight_bytes=0,
    parameters=0,
    active_parameters=0,
    kv_dtype="float32",
    kv_bytes=0,
    kv_tokens=16,
    max_num_seqs=2,
    kernels="none",
    load_s=0.0,
)


class Fake:
    """One of them."""

    def __init__(self, behaviour: str, sock: socket.socket) -> None:
        self.behaviour, self.sock = behaviour, sock
        self.paused = False
        self.held: list[str] = []

    def run(self) -> None:
        self.begin()
        self.send(STARTED)
        frames = wire.Frames()
        while data := self.sock.recv(1 << 16):
            for message in map(wire.read_to_worker, frames.push(data)):
                if isinstance(message, wire.Stop) and self.behaviour != "does not stop":
                    return
                self.obey(message)

    def begin(self) -> None:
        if self.behaviour == "exits":
            sys.exit(3)
        if self.behaviour == "refuses to start":
            self.send(wire.NotStarted("CheckpointError", "config.json is damaged"))
            sys.exit(1)
        if self.behaviour == "sends noise first":
            self.sock.sendall(b"\xff" * 64)
            time.sleep(60)
        if self.behaviour == "loads slowly":
            for part in range(8):
                time.sleep(0.3)
                self.send(wire.Loading("loading", part, 8))
        if self.behaviour == "stops while it loads":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.behaviour == "loads for ever":
            time.sleep(60)

    def obey(self, message: wire.ToWorker) -> None:
        if isinstance(message, wire.Ping):
            self.send(wire.Pong(message.number, STATS))
        elif isinstance(message, wire.Pause | wire.Resume):
            self.paused = isinstance(message, wire.Pause)
            self.go_on()
        elif isinstance(message, wire.Abort):
            self.step(message.id, end="aborted")
        elif isinstance(message, wire.Submit) and self.behaviour == "refuses":
            self.send(wire.Refused(message.id, "internal", "secret detail"))
        elif isinstance(message, wire.Submit) and self.behaviour != "takes nothing":
            self.send(wire.Taken(message.id))
            self.held.append(message.id)
            self.go_on()

    def go_on(self) -> None:
        """Answer what is held, unless there is a pause."""
        while self.held and not self.paused:
            request = self.held.pop(0)
            self.step(request)
            self.misbehave(request)

    def misbehave(self, request: str) -> None:
        """What happens amid an answer."""
        if self.behaviour == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.behaviour == "stalls":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.behaviour == "sends noise":
            self.sock.sendall(b"\x05\x00\x00\x00noise")
            time.sleep(60)
        elif self.behaviour == "sends a length":
            self.sock.sendall(b"\xff\xff\xff\xff")
            time.sleep(60)
        elif self.behaviour in ("answers", "loads slowly"):
            self.step(request, end="finished")
            self.step(request, end="failed")

    def send(self, message: Any) -> None:
        self.sock.sendall(wire.frame(message))

    def step(self, request: str, *, end: Any = None) -> None:
        outputs = [Output(request_id=request, index=0, piece=Piece(text="x", ids=(5,)))]
        usage = Usage(prompt_tokens=2, completion_tokens=1)
        ends = [End(request_id=request, kind=end, usage=usage)] if end else []
        self.send(wire.Step(outputs=[] if end else outputs, ends=ends, stats=STATS))


if __name__ == "__main__":
    Fake(sys.argv[1], socket.socket(fileno=int(sys.argv[2]))).run()
