"""Messages between the process that computes (`ernie45/worker.py`) and the one that serves (`client.py`), and their one codec.

A frame is a length, four bytes little-endian, and MessagePack. Frames hold data alone: nothing in them is executed, and what
is no known message of this version ends the connection. No torch here.
"""

from __future__ import annotations

import struct
from typing import Literal, TypeVar

import msgspec

from ernie45.engine.config import EngineConfig
from ernie45.engine.drafts import MtpSpeculation, NgramSpeculation
from ernie45.engine.params import SamplingParams
from ernie45.engine.request import End, Output, PromptScores
from ernie45.engine.stats import EngineStats
from ernie45.errors import ConfigError, Ernie45Error, TransferError
from ernie45.processing.constraint import Constraint

VERSION = 1
MAX_FRAME_BYTES = 1 << 28
"""A prompt of a million tokens takes 5 MB; more than this is a damaged length."""
_LENGTH = struct.Struct("<I")
_Message = TypeVar("_Message")

Speculation = Literal["none", "ngram", "mtp"]
RefusalKind = Literal["request", "internal", "aborted"]


class Launch(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The first message: what to load and how to run it."""

    version: int = VERSION
    model: str
    """A folder or a .gguf file."""
    chat_format: str | None = None
    kernels: Literal["native", "reference"] | None = None
    max_model_len: int | None = None
    max_num_seqs: int = EngineConfig.max_num_seqs
    kv_cache_memory: int | None = None
    kv_dtype: str | None = None
    page_size: int = EngineConfig.page_size
    max_step_tokens: int = EngineConfig.max_step_tokens
    max_step_tokens_beside_decodes: int | None = EngineConfig.max_step_tokens_beside_decodes
    prefix_cache: bool = True
    speculation: Speculation = "none"
    num_speculative_tokens: int | None = None
    """Most guesses per step; None = what the kind of speculation has as default."""

    def engine_config(self) -> EngineConfig:
        """The engine's settings. Raises: ConfigError."""
        return EngineConfig(
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            kv_cache_memory=self.kv_cache_memory,
            kv_dtype=self.kv_dtype,
            page_size=self.page_size,
            max_step_tokens=self.max_step_tokens,
            max_step_tokens_beside_decodes=self.max_step_tokens_beside_decodes,
            prefix_cache=self.prefix_cache,
            speculation=_speculation(self.speculation, self.num_speculative_tokens),
        )


class Submit(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A request; answered with `Taken` or `Refused`, and after `Taken` with exactly one end."""

    id: str
    prompt: list[int]
    params: SamplingParams
    constraint: Constraint | None = None
    begun: str | None = None
    """Text that the prompt ends with and the answer continues, as part of what is constrained."""
    priority: int = 0
    tenant: str = ""
    cache_salt: str | None = None
    timeout_s: float | None = None


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End a request; one that has ended already is no error."""

    id: str


class Pause(msgspec.Struct, frozen=True, tag=True):
    """Compute nothing until `Resume`."""


class Resume(msgspec.Struct, frozen=True, tag=True):
    """Go on."""


class ForgetPrefixes(msgspec.Struct, frozen=True, tag=True):
    """Empty the prefix cache."""


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Answered with a `Pong` between two steps."""

    number: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the process; what runs is lost."""


class Loading(msgspec.Struct, frozen=True, tag=True):
    """How far loading has come."""

    stage: str
    done: int
    total: int


class Started(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The engine runs: what it has become."""

    pid: int
    max_model_len: int
    context: int
    """Tokens that the model's positions reach."""
    vocab_size: int
    """Rows of the embedding; prompts may hold ids below it."""
    kind: str
    """As `MoE text`."""
    weights: str
    """How weights are stored, as `bfloat16` or `wint4-all`."""
    weight_bytes: int
    """Of the files."""
    parameters: int
    active_parameters: int
    kv_dtype: str
    kv_bytes: int
    """Of the whole page pool."""
    kv_tokens: int
    """Tokens that the pool holds."""
    max_num_seqs: int
    kernels: str
    """What computes and why, in one line."""
    load_s: float


class NotStarted(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot run: the error's class by name, and its message."""

    error: str
    message: str


class Taken(msgspec.Struct, frozen=True, tag=True):
    """The engine has the request."""

    id: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The engine does not take the request."""

    id: str
    kind: RefusalKind
    message: str


class Step(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """What a step brought, in this order for every request: scores, outputs, its end."""

    scores: list[PromptScores] = []
    outputs: list[Output] = []
    ends: list[End] = []
    stats: EngineStats


class Pong(msgspec.Struct, frozen=True, tag=True):
    """The engine's loop is alive."""

    number: int
    stats: EngineStats


ToWorker = Launch | Submit | Abort | Pause | Resume | ForgetPrefixes | Ping | Stop
FromWorker = Loading | Started | NotStarted | Taken | Refused | Step | Pong

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def frame(message: ToWorker | FromWorker) -> bytes:
    """A message with its length in front."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Cuts bytes that arrive in any pieces into the bodies of frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def push(self, data: bytes) -> list[bytes]:
        """Add bytes; returns the bodies that are complete. Raises: TransferError for an impossible length."""
        self._buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise TransferError(f"a frame of {length} bytes arrived, the limit is {MAX_FRAME_BYTES}")
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return bodies


def read_to_worker(body: bytes) -> ToWorker:
    """The message in a frame's body. Raises: TransferError if it is none."""
    return _read(_to_worker, body)


def read_from_worker(body: bytes) -> FromWorker:
    """The message in a frame's body. Raises: TransferError if it is none."""
    return _read(_from_worker, body)


def _read(decoder: msgspec.msgpack.Decoder[_Message], body: bytes) -> _Message:
    try:
        return decoder.decode(body)
    # Beside msgspec's own: what the fields' classes raise, bytes that are no UTF-8, and bottomless nesting.
    except (msgspec.MsgspecError, Ernie45Error, UnicodeDecodeError, RecursionError) as error:
        raise TransferError(f"a frame of {len(body)} bytes is no message of version {VERSION}: {error}") from error


def _speculation(kind: Speculation, max_tokens: int | None) -> NgramSpeculation | MtpSpeculation | None:
    if kind == "none":
        if max_tokens is not None:
            raise ConfigError(f"{max_tokens} speculative tokens without speculation: choose ngram or mtp")
        return None
    chosen = NgramSpeculation if kind == "ngram" else MtpSpeculation
    return chosen() if max_tokens is None else chosen(max_tokens=max_tokens)
