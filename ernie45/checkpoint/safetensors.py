"""The safetensors file format: a strict reader and a writer that streams.

A file is an 8-byte little-endian header length, a JSON header `{name: {"dtype", "shape", "data_offsets": [begin,
end]}}` with an optional `__metadata__` of strings, and the tensors' bytes, without holes. Format:
huggingface/safetensors, README "Format".

Our own, and not the `safetensors` library, because checkpoints of 40 GB and more are converted with one tensor in
memory, are read straight into parameters that exist already, and may come from anywhere: each way a header can lie ends
in a CheckpointError before memory is taken for it.
"""

import json
import math
import mmap
import os
import reprlib
import stat
import struct
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ernie45.checkpoint.atomic import StreamedFile
from ernie45.errors import CheckpointError, NotFoundError

# The limit of the reference library.
MAX_HEADER_BYTES = 100_000_000
# Far above any weight; keeps products of sizes small whatever a header claims.
MAX_DIMS = 16
# Sizes and strides must fit torch's signed 64-bit integers.
MAX_TENSOR_BYTES = 2**63 - 1

STORED_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
_STORED_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}

_METADATA_KEY = "__metadata__"
_READ_BLOCK_BYTES = 64 << 20

# One map per file, kept as long as a tensor uses it: a map holds a file descriptor, and a checkpoint has tens of
# thousands of tensors. The key is the file's identity (device, inode, size, time of change), never its name.
_maps: "weakref.WeakValueDictionary[tuple[int, int, int, int], mmap.mmap]" = weakref.WeakValueDictionary()
_maps_lock = threading.Lock()


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies on disk."""

    name: str
    dtype: torch.dtype
    """Type of the tensor that reading returns."""
    stored_dtype: str
    """Type as the file names it. Paddle files store bfloat16 bits as "U16", see `as_bfloat16`."""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Absolute position of the first byte in `file`."""
    size_bytes: int

    def as_bfloat16(self) -> "TensorEntry":
        """Return this entry with its 16-bit words read as bfloat16 (no conversion).

        Raises: CheckpointError if not U16/BF16.
        """
        if self.stored_dtype not in ("U16", "BF16"):
            raise CheckpointError(
                f"{self.file}: tensor {shown(self.name)} is stored as {self.stored_dtype}; only U16 can hold bfloat16 "
                "bits"
            )
        return replace(self, dtype=torch.bfloat16)


@dataclass(frozen=True)
class SafetensorsHeader:
    """The validated header of one file; entries in the order of the header."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_header(path: Path | str) -> SafetensorsHeader:
    """Read and validate the header of a safetensors file; afterwards every entry is known to lie inside the file.

    Raises: NotFoundError if there is no such file; CheckpointError for everything that is wrong with it.
    """
    file = Path(path)
    fd = open_regular_file(file)
    try:
        file_bytes = os.fstat(fd).st_size
        if file_bytes < 8:
            raise CheckpointError(f"{file}: {file_bytes} bytes, a safetensors file has at least 8: download it again")
        (header_bytes,) = struct.unpack("<Q", _read_bytes(fd, file, 0, 8))
        limit = min(MAX_HEADER_BYTES, file_bytes - 8)
        if header_bytes > limit:
            raise CheckpointError(
                f"{file}: header of {header_bytes} bytes announced, at most {limit} are possible in a file of "
                f"{file_bytes} "
                "bytes: truncated or not a safetensors file"
            )
        raw = _read_bytes(fd, file, 8, header_bytes)
    finally:
        os.close(fd)
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{file}: the header begins with {raw[:1]!r}, expected '{{': not a safetensors file")
    return _validate_header(file, parse_json_object(raw, file), 8 + header_bytes, file_bytes - 8 - header_bytes)


def read_tensor(entry: TensorEntry) -> Tensor:
    """Read one tensor into fresh CPU memory. Raises: CheckpointError if the file no longer holds all of it."""
    out = torch.empty(entry.shape, dtype=entry.dtype)
    read_into(entry, out)
    return out


def read_into(entry: TensorEntry, out: Tensor) -> None:
    """Read one tensor straight into the memory of `out`, without a second copy.

    Args: out: contiguous CPU tensor of the entry's shape and dtype; may be a parameter.
    Raises: CheckpointError if `out` does not fit or the file ends early.
    """
    where = f"{entry.file}: tensor {shown(entry.name)}"
    if out.device.type != "cpu" or not out.is_contiguous():
        raise CheckpointError(
            f"{where} can only be read into contiguous CPU memory, got {out.device}, strides {out.stride()}"
        )
    if tuple(out.shape) != entry.shape or out.dtype != entry.dtype:
        raise CheckpointError(
            f"{where} is {entry.dtype} {list(entry.shape)}, the destination {out.dtype} {list(out.shape)}: they must "
            "be equal"
        )
    fd = open_regular_file(entry.file)
    try:
        read_fully(fd, entry.file, entry.offset, byte_view(out))
    finally:
        os.close(fd)


def map_tensor(entry: TensorEntry) -> Tensor:
    """Return one tensor as a memory map of its file: pages are read when touched and shared between processes.

    The file is never changed: the map is private, so a write to the tensor stays in this process. The file must not be
    truncated while the tensor lives (the operating system would then end the process); replacing it by rename is safe.

    Raises: CheckpointError if the tensor's position is no multiple of its item size, or the file became shorter.
    """
    if entry.size_bytes == 0:
        return torch.empty(entry.shape, dtype=entry.dtype)
    if entry.offset % entry.dtype.itemsize:
        raise CheckpointError(
            f"{entry.file}: tensor {shown(entry.name)} begins at byte {entry.offset}, no multiple of its item size "
            f"{entry.dtype.itemsize}, and cannot be mapped: read it, or write the file again"
        )
    _require_little_endian()
    whole = _file_map(entry.file)
    if entry.offset + entry.size_bytes > len(whole):
        raise _short_file(entry.file, entry.offset + entry.size_bytes, len(whole))
    flat = torch.frombuffer(whole, dtype=torch.uint8, count=entry.size_bytes, offset=entry.offset)
    return flat.view(entry.dtype).reshape(entry.shape)


class SafetensorsWriter:
    """Write a safetensors file tensor by tensor, in any order, holding none of them.

    The header is written at once from the plan. The data is ordered by decreasing item size, and as planned among
    equals: the format forbids holes, and so every tensor is aligned to its items. The file appears under its name when
    the block ends well.

        with SafetensorsWriter(path, [("a", torch.float32, (2, 3))]) as writer:
            writer.write("a", tensor)
    """

    def __init__(
        self,
        path: Path | str,
        plan: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        *,
        metadata: Mapping[str, str] | None = None,
        store_bf16_as_u16: bool = False,
        align: int = 64,
    ) -> None:
        """Lay out the file.

        Args: plan: name, dtype and shape of every tensor. metadata: strings for the header. store_bf16_as_u16: name
            bfloat16 "U16" as Paddle does. align: the data begins at a multiple of it, a power of two from 8 on.
        Raises: CheckpointError if the plan cannot be written; CapacityError if the disk is too small.
        """
        self.path = Path(path)
        layout = file_layout(self.path, plan, metadata, store_bf16_as_u16=store_bf16_as_u16, align=align)
        self._slots = layout.slots
        self._unwritten = dict.fromkeys(self._slots)
        self._file = StreamedFile(self.path, layout.size_bytes)
        try:
            self._file.write_at(0, memoryview(layout.head))
        except BaseException:
            self._file.abort()
            raise

    @property
    def num_unwritten(self) -> int:
        """Planned tensors that were not written yet."""
        return len(self._unwritten)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one planned tensor.

        Raises: CheckpointError if unknown, written before, or of another shape or dtype.
        """
        slot = self._slots.get(name)
        if slot is None:
            raise CheckpointError(f"{self.path}: tensor {shown(name)} is not in the plan of {len(self._slots)} tensors")
        if name not in self._unwritten:
            raise CheckpointError(f"{self.path}: tensor {shown(name)} was written already")
        if tensor.dtype != slot.dtype or tuple(tensor.shape) != slot.shape:
            raise CheckpointError(
                f"{self.path}: tensor {shown(name)} is {tensor.dtype} {list(tensor.shape)}, planned was {slot.dtype} "
                f"{list(slot.shape)}"
            )
        self._file.write_at(slot.offset, tensor_bytes(tensor, f"{self.path}: tensor {shown(name)}"))
        del self._unwritten[name]

    def close(self) -> None:
        """Finish the file and give it its name.

        Raises: CheckpointError if a planned tensor is missing (nothing is kept).
        """
        if self._unwritten:
            self.abort()
            raise CheckpointError(
                f"{self.path}: {len(self._unwritten)} planned tensors were never written, the first is "
                f"{shown(next(iter(self._unwritten)))}"
            )
        try:
            self._file.commit()
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Remove what was written so far."""
        self._file.abort()

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def write_tensors(
    path: Path | str, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors that are in memory as one file, from any device and without their gradients' history.

    Raises: as `SafetensorsWriter`.
    """
    plan = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with SafetensorsWriter(path, plan, metadata=metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.detach().cpu().contiguous())


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """All tensors of a file, in fresh CPU memory. Raises: NotFoundError, CheckpointError."""
    return {name: read_tensor(entry) for name, entry in read_header(path).entries.items()}


@dataclass(frozen=True)
class FileLayout:
    """A file before its data is written."""

    head: bytes
    """Header length and header."""
    slots: dict[str, TensorEntry]
    """Where each planned tensor will lie."""
    size_bytes: int


def file_layout(
    path: Path,
    plan: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
    *,
    store_bf16_as_u16: bool = False,
    align: int = 64,
) -> FileLayout:
    """Lay out a file as SafetensorsWriter writes it. Raises: CheckpointError if the plan cannot be written."""
    if align < 8 or align & (align - 1):
        raise CheckpointError(f"{path}: align is {align}, expected a power of two from 8 on")
    header, slots, data_bytes = _lay_out(path, plan, dict(metadata or {}), store_bf16_as_u16)
    header += b" " * (-(8 + len(header)) % align)
    if len(header) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: the header takes {len(header)} bytes, the format allows {MAX_HEADER_BYTES}: write smaller shards"
        )
    data_start = 8 + len(header)
    return FileLayout(
        head=struct.pack("<Q", len(header)) + header,
        slots={name: replace(slot, offset=data_start + slot.offset) for name, slot in slots.items()},
        size_bytes=data_start + data_bytes,
    )


def check_plan(
    path: Path, plan: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> None:
    """Raise CheckpointError if SafetensorsWriter would refuse this plan for a file at `path`."""
    _lay_out(path, plan, dict(metadata or {}), False)


def parse_json_object(raw: bytes, file: Path) -> dict[str, Any]:
    """Parse a JSON object from a file nobody vouches for.

    Raises: CheckpointError if it is not UTF-8, not JSON, not an object, repeats a key, or is nested without end.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique_pairs, parse_int=_short_int, parse_constant=_no_constant
        )
    except RecursionError as error:
        raise CheckpointError(f"{file}: the JSON is nested too deeply to be a header or an index") from error
    except ValueError as error:  # includes malformed JSON, wrong UTF-8, lone surrogates, numbers of thousands of digits
        raise CheckpointError(f"{file}: no valid JSON object: {shorten(str(error))}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: the JSON is a {type(value).__name__}, expected an object")
    return value


def open_regular_file(path: Path) -> int:
    """Open a file for reading and return its descriptor, which the caller closes; symbolic links are followed.

    Raises: NotFoundError if it does not exist; CheckpointError if it is no regular file or cannot be opened.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for its writer, possibly for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {path}") from error
    except OSError as error:
        raise CheckpointError(f"cannot open {path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{path} is not a regular file")
    return fd


def read_fully(fd: int, path: Path, offset: int, out: memoryview) -> None:
    """Fill `out` (bytes) from `offset` on. Raises: CheckpointError if the file ends before or cannot be read."""
    _require_little_endian()
    done = 0
    while done < out.nbytes:
        try:
            count = os.preadv(fd, [out[done : done + _READ_BLOCK_BYTES]], offset + done)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        if count == 0:
            raise _short_file(path, offset + out.nbytes, offset + done)
        done += count


def byte_view(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as writable bytes, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def tensor_bytes(tensor: Tensor, where: str) -> memoryview:
    """Return the tensor's values as bytes in row order; copies only what is not contiguous CPU memory already.

    Raises: CheckpointError if the tensor has no values (meta device) or is not dense.
    """
    if tensor.is_meta or tensor.layout != torch.strided:
        raise CheckpointError(f"{where} has no plain values to write: device {tensor.device}, layout {tensor.layout}")
    _require_little_endian()
    return byte_view(tensor.detach().cpu().resolve_neg().contiguous())


def checked_size_bytes(shape: Sequence[int], bytes_per_block: int, block_length: int, where: str) -> int:
    """Bytes of a tensor whose items come in blocks, in exact integers. Raises: CheckpointError if it cannot exist.

    Sizes of zero make the product small whatever the others are; torch still multiplies those for its strides,
    therefore the limit counts each zero as one.
    """
    if math.prod(max(size, 1) for size in shape) * bytes_per_block > MAX_TENSOR_BYTES:
        raise CheckpointError(f"{where} has shape {shorten(str(list(shape)))}, more than {MAX_TENSOR_BYTES} bytes")
    return math.prod(shape) // block_length * bytes_per_block


def shown(text: str) -> str:
    """A name from a file, quoted, escaped and short enough for a message."""
    return shorten(repr(text[:200]))


def shown_value(value: object) -> str:
    """A parsed value for a message; unlike `repr`, follows no deep nesting and builds no long text."""
    return reprlib.repr(value)


def shorten(text: str, limit: int = 160) -> str:
    """Cut a message part that a file can make arbitrarily long."""
    return text if len(text) <= limit else text[:limit] + "..."


def _validate_header(file: Path, header: dict[str, Any], data_start: int, data_bytes: int) -> SafetensorsHeader:
    metadata = header.pop(_METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: {_METADATA_KEY} must map strings to strings, got {shown_value(metadata)}")
    entries = {name: _validate_entry(file, name, fields, data_start, data_bytes) for name, fields in header.items()}
    _check_coverage(file, entries, data_start, data_bytes)
    return SafetensorsHeader(entries, metadata)


def _validate_entry(file: Path, name: str, fields: object, data_start: int, data_bytes: int) -> TensorEntry:
    where = f"{file}: tensor {shown(name)}"
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} needs exactly dtype, shape and data_offsets, got {shown_value(fields)}")
    stored_dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(stored_dtype, str) or stored_dtype not in STORED_DTYPES:
        raise CheckpointError(
            f"{where} has dtype {shown_value(stored_dtype)}; those that can be read are {', '.join(STORED_DTYPES)}"
        )
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        raise CheckpointError(
            f"{where} has shape {shown_value(shape)}, expected up to {MAX_DIMS} non-negative integers"
        )
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has data_offsets {shown_value(offsets)}, expected two non-negative integers")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise CheckpointError(f"{where} has data_offsets [{begin}, {end}], the file holds data from 0 to {data_bytes}")
    dtype = STORED_DTYPES[stored_dtype]
    size_bytes = checked_size_bytes(shape, dtype.itemsize, 1, where)
    if size_bytes != end - begin:
        raise CheckpointError(
            f"{where} of {stored_dtype} {shape} takes {size_bytes} bytes, its data_offsets [{begin}, {end}] hold "
            f"{end - begin}"
        )
    return TensorEntry(name, dtype, stored_dtype, tuple(shape), file, data_start + begin, size_bytes)


def _are_sizes(value: object) -> bool:
    # `type is int` because True is an int to Python; the bound keeps a number of thousands of digits out of arithmetic.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_coverage(file: Path, entries: Mapping[str, TensorEntry], data_start: int, data_bytes: int) -> None:
    position = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.size_bytes)):
        if entry.offset != position:
            problem = "overlaps the tensor before it" if entry.offset < position else "leaves a hole before it"
            raise CheckpointError(
                f"{file}: tensor {shown(entry.name)} {problem}: it begins at byte {entry.offset - data_start} of the "
                "data, "
                f"expected {position - data_start}"
            )
        position += entry.size_bytes
    if position != data_start + data_bytes:
        raise CheckpointError(
            f"{file}: the tensors take {position - data_start} bytes, the file holds {data_bytes}: damaged or not "
            "complete"
        )


def _lay_out(
    file: Path,
    plan: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    metadata: dict[str, str],
    store_bf16_as_u16: bool,
) -> tuple[bytes, dict[str, TensorEntry], int]:
    """Return the JSON header, the slots (offsets from the start of the data) and the bytes of all data."""
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise CheckpointError(f"{file}: metadata must map strings to strings, got {key!r}: {value!r}")
    header: dict[str, object] = {_METADATA_KEY: metadata} if metadata else {}
    slots: dict[str, TensorEntry] = {}
    position = 0
    for name, dtype, shape in sorted(plan, key=lambda item: -item[1].itemsize):
        where = f"{file}: planned tensor {shown(name)}"
        if name in slots or name == _METADATA_KEY:
            raise CheckpointError(f"{where} is named twice or has a reserved name")
        if dtype not in _STORED_NAMES:
            raise CheckpointError(f"{where} has dtype {dtype}; those that can be stored are {list(_STORED_NAMES)}")
        if not _are_sizes(list(shape)) or len(shape) > MAX_DIMS:
            raise CheckpointError(f"{where} has shape {list(shape)}, expected up to {MAX_DIMS} non-negative integers")
        stored = "U16" if store_bf16_as_u16 and dtype == torch.bfloat16 else _STORED_NAMES[dtype]
        size_bytes = checked_size_bytes(shape, dtype.itemsize, 1, where)
        slots[name] = TensorEntry(name, dtype, stored, tuple(shape), file, position, size_bytes)
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [position, position + size_bytes]}
        position += size_bytes
    try:
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{file}: a name or metadata value cannot be written as UTF-8: {error}") from error
    return encoded, slots, position


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {shown(key)} appears twice")
        key.encode("utf-8")  # "\\ud800" is JSON, but such a string can be neither printed nor be a file name
        if isinstance(value, str):
            value.encode("utf-8")
        result[key] = value
    return result


def _short_int(text: str) -> int:
    # The time to convert grows with the square of the length; 64-bit sizes have at most 20 digits.
    if len(text) > 20:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _read_bytes(fd: int, path: Path, offset: int, count: int) -> bytes:
    raw = bytearray(count)
    read_fully(fd, path, offset, memoryview(raw))
    return bytes(raw)


def _file_map(path: Path) -> mmap.mmap:
    fd = open_regular_file(path)
    try:
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        with _maps_lock:
            found = _maps.get(key)
            if found is None:
                # Private and writable: a read-only map makes torch warn, and a stray write end the process. Nothing is
                # copied or, with NORESERVE, set aside unless somebody writes.
                flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
                try:
                    found = mmap.mmap(fd, status.st_size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
                except (OSError, ValueError) as error:
                    raise CheckpointError(f"cannot map {path} ({status.st_size} bytes): {error}") from error
                _maps[key] = found
            return found
    finally:
        os.close(fd)


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise CheckpointError(
            "weight files are little-endian; this machine is not, and swapping bytes is not supported"
        )


def _short_file(path: Path, needed: int, got: int) -> CheckpointError:
    return CheckpointError(f"{path} ends at byte {got}, {needed} were expected: it was truncated, download it again")
