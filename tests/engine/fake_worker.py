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


def main(behaviour: str, sock: socket.socket) -> None:
    def send(message: Any) -> None:
        sock.sendall(wire.frame(message))

    def step(request: str, *, end: str | None = None) -> None:
        outputs = [Output(request_id=request, index=0, piece=Piece(text="x", ids=(5,)))]
        usage = Usage(prompt_tokens=2, completion_tokens=1)
        ends: list[Any] = [End(request_id=request, kind=end, usage=usage)] if end else []  # type: ignore[arg-type]
        send(wire.Step(outputs=[] if end else outputs, ends=ends, stats=STATS))

    frames = wire.Frames()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behaviour == "exits":
        sys.exit(3)
    if behaviour == "refuses to start":
        send(wire.NotStarted("CheckpointError", "config.json is damaged"))
        sys.exit(1)
    if behaviour == "sends noise first":
        sock.sendall(b"\xff" * 64)
        time.sleep(60)
    if behaviour == "loads for ever":
        time.sleep(60)
    send(STARTED)
    while data := sock.recv(1 << 16):
        for message in map(wire.read_to_worker, frames.push(data)):
            match message:
                case wire.Ping():
                    send(wire.Pong(message.number, STATS))
                case wire.Stop():
                    if behaviour != "does not stop":
                        return
                case wire.Abort():
                    step(message.id, end="aborted")
                case wire.Submit() if behaviour == "refuses":
                    send(wire.Refused(message.id, "internal", "secret detail"))
                case wire.Submit() if behaviour == "takes nothing":
                    pass
                case wire.Submit():
                    send(wire.Taken(message.id))
                    step(message.id)
                    if behaviour == "dies":
                        os.kill(os.getpid(), signal.SIGKILL)
                    if behaviour == "stalls":
                        os.kill(os.getpid(), signal.SIGSTOP)
                    if behaviour == "sends noise":
                        sock.sendall(b"\x05\x00\x00\x00noise")
                        time.sleep(60)
                    if behaviour == "sends a length":
                        sock.sendall(b"\xff\xff\xff\xff")
                        time.sleep(60)
                    if behaviour == "answers":
                        step(message.id, end="finished")
                        step(message.id, end="failed")


if __name__ == "__main__":
    main(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
