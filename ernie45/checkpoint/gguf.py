"""The GGUF file format of llama.cpp, versions 2 and 3, little-endian: a strict reader and a writer that streams.

A file is `GGUF`, version, two counts, key-value metadata, tensor descriptions, and the tensors' bytes, each at a
multiple of the alignment. Format: ggml-org/ggml, `docs/gguf.md`. Every count and length is held against the bytes that
are left before anything is allocated for it, so a lying file costs nothing. Which tensor and key names ERNIE uses is
not known here.
"""

import enum
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

from ernie45.checkpoint.atomic import StreamedFile
from ernie45.checkpoint.ggml_types import GGMLType, blocks_per_chunk, decode_blocks, type_from_id
from ernie45.checkpoint.safetensors import (
    byte_view,
    checked_size_bytes,
    open_regular_file,
    read_fully,
    shown,
    shown_value,
    tensor_bytes,
)
from ernie45.errors import CheckpointError

_MAGIC = b"GGUF"
_READ_VERSIONS = (2, 3)
_WRITE_VERSION = 3
_DEFAULT_ALIGNMENT = 32
_ALIGNMENT_KEY = "general.alignment"

# ggml: GGML_MAX_DIMS; GGML_MAX_NAME is 64 with the terminating zero.
_MAX_DIMS = 4
_MAX_NAME_BYTES = 63

# Metadata and tensor descriptions of the largest published vocabularies take about 20 MB and 1.5 million array items.
# The limits bound what Python objects a hostile file can make us build (about 100 bytes for an item of one byte).
_MAX_HEADER_BYTES = 128 << 20
_MAX_ARRAY_ITEMS = 8_000_000
_MAX_ARRAY_DEPTH = 4

# The least bytes of a key-value pair (key length, type, one byte) and of a tensor (name length, dims, type, offset).
_MIN_PAIR_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8


class ValueType(enum.IntEnum):
    """Metadata types as files number them."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_SCALAR_CODES: dict[int, str] = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "B",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class TypedValue:
    """A metadata value with its width spelled out; made by `uint32` and its like below."""

    type: ValueType
    value: bool | int | float | str | tuple[bool | int | float | str, ...]
    item_type: ValueType | None = None
    """For arrays: the type of every item."""


GGUFValue: TypeAlias = TypedValue | bool | int | float | str
"""What the writer takes as metadata: plain `int` is written as uint32, plain `float` as float32."""


def uint32(value: int) -> TypedValue:
    """An unsigned integer of 32 bits."""
    return TypedValue(ValueType.UINT32, value)


def int32(value: int) -> TypedValue:
    """A signed integer of 32 bits."""
    return TypedValue(ValueType.INT32, value)


def uint64(value: int) -> TypedValue:
    """An unsigned integer of 64 bits."""
    return TypedValue(ValueType.UINT64, value)


def float32(value: float) -> TypedValue:
    """A float32; the value is rounded to it."""
    return TypedValue(ValueType.FLOAT32, value)


def boolean(value: bool) -> TypedValue:
    """A truth value."""
    return TypedValue(ValueType.BOOL, value)


def string(value: str) -> TypedValue:
    """A string, stored as UTF-8."""
    return TypedValue(ValueType.STRING, value)


def array(item_type: ValueType, values: Sequence[bool | int | float | str]) -> TypedValue:
    """A flat array of one type, say `array(ValueType.INT32, [1, 2])`."""
    return TypedValue(ValueType.ARRAY, tuple(values), item_type)


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies in the file and how."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    """Torch order, rows last: the reverse of what the file states."""
    offset: int
    """Absolute position of the first byte."""
    size_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """The validated header of one file."""

    path: Path
    version: int
    metadata: dict[str, bool | int | float | str | list[Any]]
    tensors: dict[str, GGUFTensor]
    alignment: int


def read_gguf(path: Path | str) -> GGUFFile:
    """Read and validate metadata and tensor descriptions; afterwards every tensor is known to lie inside the file.

    Raises: NotFoundError if there is no such file; CheckpointError for everything that is wrong with it.
    """
    file = Path(path)
    with os.fdopen(open_regular_file(file), "rb") as stream:
        cursor = _Cursor(stream, file)
        version = _read_version(cursor)
        num_tensors, num_pairs = cursor.scalar("Q"), cursor.scalar("Q")
        cursor.check_count(num_tensors, _MIN_TENSOR_BYTES, "tensors")
        cursor.check_count(num_pairs, _MIN_PAIR_BYTES, "metadata pairs")
        metadata, types = _read_metadata(cursor, num_pairs)
        alignment = _alignment_of(file, metadata, types)
        tensors = _read_tensors(cursor, num_tensors, alignment)
    return GGUFFile(file, version, metadata, tensors, alignment)


def read_gguf_tensor(file: GGUFFile, tensor: GGUFTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Read and decode one tensor; besides the result only a small block is held at a time.

    Args: dtype: floating-point type of the result; values are decoded in float32 and then rounded to it.
    Raises: CheckpointError if `dtype` is no float type or the file no longer holds the tensor.
    """
    if not dtype.is_floating_point:
        raise CheckpointError(
            f"{file.path}: tensor {shown(tensor.name)} cannot be decoded to {dtype}: choose a float type"
        )
    out = torch.empty(tensor.shape, dtype=dtype)
    kind = tensor.type
    fd = open_regular_file(file.path)
    try:
        if kind.torch_dtype == dtype:
            read_fully(fd, file.path, tensor.offset, byte_view(out))
            return out
        values = out.view(-1, kind.block_length)
        step = blocks_per_chunk(kind)
        for start in range(0, values.shape[0], step):
            part = values[start : start + step]
            raw = torch.empty((part.shape[0], kind.block_bytes), dtype=torch.uint8)
            read_fully(fd, file.path, tensor.offset + start * kind.block_bytes, byte_view(raw))
            part.copy_(decode_blocks(raw, kind))
    finally:
        os.close(fd)
    return out


def read_gguf_raw(file: GGUFFile, tensor: GGUFTensor) -> Tensor:
    """Read one tensor's bytes as stored, uint8 (size_bytes,).

    Raises: CheckpointError if the file no longer holds them.
    """
    out = torch.empty(tensor.size_bytes, dtype=torch.uint8)
    fd = open_regular_file(file.path)
    try:
        read_fully(fd, file.path, tensor.offset, byte_view(out))
    finally:
        os.close(fd)
    return out


class GGUFWriter:
    """Write a GGUF file tensor by tensor, in any order, holding none of them.

    Float types take a torch tensor of that type and of the planned shape; quantized types take their blocks as uint8.
    The file appears under its name when the block ends well.

        plan = [("token_embd.weight", GGMLType.F32, (8, 4))]
        with GGUFWriter(path, {"general.architecture": "ernie4_5"}, plan) as writer:
            writer.write("token_embd.weight", tensor)
    """

    def __init__(
        self,
        path: Path | str,
        metadata: Mapping[str, GGUFValue],
        plan: Sequence[tuple[str, GGMLType, tuple[int, ...]]],
        *,
        alignment: int = _DEFAULT_ALIGNMENT,
    ) -> None:
        """Lay out the file; tensors are stored in planned order.

        Args: plan: name, type and torch shape of every tensor. alignment: power of two from 8 on, recorded in the
            metadata unless it is the format's default of 32.
        Raises: CheckpointError if metadata or plan cannot be written; CapacityError if the disk is too small.
        """
        self.path = Path(path)
        if alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise CheckpointError(f"{self.path}: alignment is {alignment}, expected a power of two from 8 to {1 << 20}")
        pairs = _with_alignment(self.path, metadata, alignment)
        relative, data_bytes = _plan_tensors(self.path, plan, alignment)
        header = b"".join(
            [
                struct.pack("<4sIQQ", _MAGIC, _WRITE_VERSION, len(relative), len(pairs)),
                *(_encode_pair(self.path, key, value) for key, value in pairs.items()),
                *(_encode_tensor(tensor) for tensor in relative),
            ]
        )
        data_start = _round_up(len(header), alignment)
        self._offsets = {tensor.name: data_start + tensor.offset for tensor in relative}
        self._tensors = {tensor.name: tensor for tensor in relative}
        self._unwritten = dict.fromkeys(self._tensors)
        self._file = StreamedFile(self.path, data_start + data_bytes)
        try:
            self._file.write_at(0, memoryview(header))
        except BaseException:
            self._file.abort()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one planned tensor.

        Raises: CheckpointError if unknown, written before, or of another shape or dtype.
        """
        planned = self._tensors.get(name)
        if planned is None:
            raise CheckpointError(
                f"{self.path}: tensor {shown(name)} is not in the plan of {len(self._tensors)} tensors"
            )
        if name not in self._unwritten:
            raise CheckpointError(f"{self.path}: tensor {shown(name)} was written already")
        plain = planned.type.torch_dtype
        if plain is not None:
            fits, expected = (
                tensor.dtype == plain and tuple(tensor.shape) == planned.shape,
                f"{plain} {list(planned.shape)}",
            )
        else:
            fits, expected = (
                tensor.dtype == torch.uint8 and tensor.numel() == planned.size_bytes,
                f"{planned.size_bytes} uint8",
            )
        if not fits:
            raise CheckpointError(
                f"{self.path}: tensor {shown(name)} is {tensor.dtype} {list(tensor.shape)}, {planned.type.name} takes "
                f"{expected}"
            )
        self._file.write_at(self._offsets[name], tensor_bytes(tensor, f"{self.path}: tensor {shown(name)}"))
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

    def __enter__(self) -> "GGUFWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class _Cursor:
    """Reads the header front to back and never asks for bytes that the file, or the limit on headers, does not have."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.path = path
        self.position = 0
        self.file_bytes = os.fstat(stream.fileno()).st_size
        self.items_left = _MAX_ARRAY_ITEMS
        self._stream = stream
        self._end = min(self.file_bytes, _MAX_HEADER_BYTES)

    def take(self, count: int) -> bytes:
        if count > self._end - self.position:
            limit = (
                f"the file has {self.file_bytes}" if self._end == self.file_bytes else f"a header may take {self._end}"
            )
            raise CheckpointError(
                f"{self.path}: {count} bytes expected at byte {self.position}, {limit}: truncated or damaged, "
                "download it again"
            )
        raw = self._stream.read(count)
        if len(raw) != count:
            raise CheckpointError(
                f"{self.path} ends at byte {self.position + len(raw)}: it was truncated while it was read"
            )
        self.position += count
        return raw

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        start = self.position
        raw = self.take(self.scalar("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: the string at byte {start} is not UTF-8: {error.reason}") from error

    def check_count(self, count: int, least_bytes: int, what: str) -> None:
        """Refuse a count whose items cannot fit in what is left of the header."""
        left = self._end - self.position
        if count * least_bytes > left:
            raise CheckpointError(
                f"{self.path}: {count} {what} announced at byte {self.position}, which take {least_bytes} bytes or "
                "more each, "
                f"but {left} bytes are left: damaged, download it again"
            )


def _read_version(cursor: _Cursor) -> int:
    magic = cursor.take(4)
    if magic != _MAGIC:
        raise CheckpointError(f"{cursor.path} begins with {magic!r}, expected {_MAGIC!r}: not a GGUF file")
    version = int(cursor.scalar("I"))
    if version and version & 0xFFFF == 0:
        raise CheckpointError(
            f"{cursor.path} is a big-endian GGUF file, only little-endian ones can be read: convert it"
        )
    if version not in _READ_VERSIONS:
        raise CheckpointError(f"{cursor.path} has GGUF version {version}; those that can be read are {_READ_VERSIONS}")
    return version


def _read_metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, int]]:
    metadata: dict[str, Any] = {}
    types: dict[str, int] = {}
    for _ in range(count):
        key = cursor.text()
        if key in metadata:
            raise CheckpointError(f"{cursor.path}: the metadata key {shown(key)} appears twice")
        types[key] = cursor.scalar("I")
        metadata[key] = _read_value(cursor, types[key], key, 0)
    return metadata, types


def _read_value(cursor: _Cursor, kind: int, key: str, depth: int) -> Any:
    if kind == ValueType.ARRAY:
        return _read_array(cursor, key, depth + 1)
    if kind == ValueType.STRING:
        return cursor.text()
    code = _scalar_code(cursor, kind, key)
    value = cursor.scalar(code)
    return _as_bool(cursor, value, key) if kind == ValueType.BOOL else value


def _read_array(cursor: _Cursor, key: str, depth: int) -> list[Any]:
    if depth > _MAX_ARRAY_DEPTH:
        raise CheckpointError(f"{cursor.path}: metadata {shown(key)} nests arrays more than {_MAX_ARRAY_DEPTH} deep")
    kind, count = cursor.scalar("I"), cursor.scalar("Q")
    is_scalar = kind not in (ValueType.STRING, ValueType.ARRAY)
    code = _scalar_code(cursor, kind, key) if is_scalar else ""
    # A string takes at least its length, an array its item type and count.
    least_bytes = struct.calcsize(f"<{code}") if is_scalar else 8 if kind == ValueType.STRING else 12
    cursor.check_count(count, least_bytes, f"array items of metadata {shown(key)}")
    if count > cursor.items_left:
        raise CheckpointError(f"{cursor.path}: metadata {shown(key)} exceeds {_MAX_ARRAY_ITEMS} array items in all")
    cursor.items_left -= count
    if not is_scalar:
        return [_read_value(cursor, kind, key, depth) for _ in range(count)]
    values = list(struct.unpack(f"<{count}{code}", cursor.take(count * least_bytes)))
    return [_as_bool(cursor, value, key) for value in values] if kind == ValueType.BOOL else values


def _scalar_code(cursor: _Cursor, kind: int, key: str) -> str:
    code = _SCALAR_CODES.get(kind)
    if code is None:
        raise CheckpointError(
            f"{cursor.path}: metadata {shown(key)} has value type {kind}, known are 0 to {max(ValueType)}"
        )
    return code


def _as_bool(cursor: _Cursor, value: int, key: str) -> bool:
    if value not in (0, 1):
        raise CheckpointError(f"{cursor.path}: metadata {shown(key)} holds the truth value {value}, expected 0 or 1")
    return bool(value)


def _alignment_of(file: Path, metadata: Mapping[str, Any], types: Mapping[str, int]) -> int:
    value = metadata.get(_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT)
    if types.get(_ALIGNMENT_KEY, ValueType.UINT32) != ValueType.UINT32 or value == 0 or value & (value - 1):
        raise CheckpointError(f"{file}: {_ALIGNMENT_KEY} is {shown_value(value)}, expected a power of two as uint32")
    return int(value)


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GGUFTensor]:
    tensors: dict[str, GGUFTensor] = {}
    for _ in range(count):
        tensor = _read_tensor_info(cursor, alignment)
        if tensor.name in tensors:
            raise CheckpointError(f"{cursor.path}: tensor {shown(tensor.name)} appears twice")
        tensors[tensor.name] = tensor
    # Offsets count from the end of the header, rounded up; only now is that place known.
    data_start = _round_up(cursor.position, alignment)
    placed = {
        name: GGUFTensor(name, tensor.type, tensor.shape, data_start + tensor.offset, tensor.size_bytes)
        for name, tensor in tensors.items()
    }
    _check_placement(cursor, placed)
    return placed


def _read_tensor_info(cursor: _Cursor, alignment: int) -> GGUFTensor:
    name = cursor.text()
    where = f"{cursor.path}: tensor {shown(name)}"
    num_dims = cursor.scalar("I")
    if num_dims > _MAX_DIMS:
        raise CheckpointError(f"{where} has {num_dims} dimensions, the format allows {_MAX_DIMS}")
    dims = struct.unpack(f"<{num_dims}Q", cursor.take(8 * num_dims))
    kind = type_from_id(cursor.scalar("I"), where)
    offset = cursor.scalar("Q")
    if offset % alignment:
        raise CheckpointError(f"{where} begins at byte {offset} of the data, no multiple of the alignment {alignment}")
    shape = tuple(reversed(dims))
    return GGUFTensor(name, kind, shape, offset, _size_bytes(shape, kind, where))


def _size_bytes(shape: tuple[int, ...], kind: GGMLType, where: str) -> int:
    row_length = shape[-1] if shape else 1
    if row_length % kind.block_length:
        raise CheckpointError(
            f"{where} has rows of {row_length} values, {kind.name} needs whole blocks of {kind.block_length}: shape "
            f"{list(shape)}"
        )
    # Decoding may fill float64: the limit has to hold for eight bytes per value as well.
    checked_size_bytes(shape, 8, 1, where)
    return checked_size_bytes(shape, kind.block_bytes, kind.block_length, where)


def _check_placement(cursor: _Cursor, tensors: Mapping[str, GGUFTensor]) -> None:
    end = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.size_bytes)):
        where = f"{cursor.path}: tensor {shown(tensor.name)}"
        if tensor.size_bytes and tensor.offset < end:
            raise CheckpointError(f"{where} begins at byte {tensor.offset}, inside the tensor that ends at {end}")
        if tensor.offset + tensor.size_bytes > cursor.file_bytes:
            raise CheckpointError(
                f"{where} takes bytes {tensor.offset} to {tensor.offset + tensor.size_bytes}, the file has "
                f"{cursor.file_bytes}: "
                "truncated, download it again"
            )
        end = max(end, tensor.offset + tensor.size_bytes)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _with_alignment(file: Path, metadata: Mapping[str, GGUFValue], alignment: int) -> dict[str, GGUFValue]:
    pairs = dict(metadata)
    stated = pairs.get(_ALIGNMENT_KEY, alignment)
    if stated not in (alignment, uint32(alignment)):
        raise CheckpointError(f"{file}: {_ALIGNMENT_KEY} in the metadata is {stated}, but alignment is {alignment}")
    if alignment != _DEFAULT_ALIGNMENT:
        pairs[_ALIGNMENT_KEY] = uint32(alignment)
    return pairs


def _plan_tensors(
    file: Path, plan: Sequence[tuple[str, GGMLType, tuple[int, ...]]], alignment: int
) -> tuple[list[GGUFTensor], int]:
    """Place the tensors, offsets from the start of the data; also return the bytes of all data."""
    tensors: dict[str, GGUFTensor] = {}
    position = 0
    for name, kind, shape in plan:
        where = f"{file}: planned tensor {shown(name)}"
        if name in tensors:
            raise CheckpointError(f"{where} is named twice")
        if len(_encode_text(file, name)) - 8 > _MAX_NAME_BYTES:
            raise CheckpointError(
                f"{where} has a name of more than {_MAX_NAME_BYTES} bytes, which llama.cpp does not read"
            )
        if not 1 <= len(shape) <= _MAX_DIMS or any(type(size) is not int or size < 1 for size in shape):
            raise CheckpointError(f"{where} has shape {list(shape)}, expected 1 to {_MAX_DIMS} positive integers")
        tensors[name] = GGUFTensor(name, kind, tuple(shape), position, _size_bytes(tuple(shape), kind, where))
        # The padding after the last tensor belongs to the file too: llama.cpp counts it in.
        position += _round_up(tensors[name].size_bytes, alignment)
    return list(tensors.values()), position


def _encode_tensor(tensor: GGUFTensor) -> bytes:
    dims = tuple(reversed(tensor.shape))
    name = tensor.name.encode("utf-8")
    return struct.pack(f"<Q{len(name)}sI{len(dims)}QIQ", len(name), name, len(dims), *dims, tensor.type, tensor.offset)


def _encode_pair(file: Path, key: str, value: GGUFValue) -> bytes:
    typed = value if isinstance(value, TypedValue) else _infer_type(file, key, value)
    head = _encode_text(file, key) + struct.pack("<I", typed.type)
    if typed.type != ValueType.ARRAY:
        return head + _encode_items(file, key, typed.type, (typed.value,))
    if typed.item_type in (None, ValueType.ARRAY) or not isinstance(typed.value, tuple):
        raise CheckpointError(f"{file}: metadata {shown(key)} is no flat array of one type: {shown_value(typed)}")
    assert typed.item_type is not None
    return (
        head
        + struct.pack("<IQ", typed.item_type, len(typed.value))
        + _encode_items(file, key, typed.item_type, typed.value)
    )


def _infer_type(file: Path, key: str, value: object) -> TypedValue:
    if isinstance(value, bool):  # before int: True is an int to Python
        return boolean(value)
    if isinstance(value, int):
        return uint32(value)
    if isinstance(value, float):
        return float32(value)
    if isinstance(value, str):
        return string(value)
    raise CheckpointError(
        f"{file}: metadata {shown(key)} is a {type(value).__name__}; wrap lists with array(item type, values)"
    )


def _encode_items(file: Path, key: str, kind: ValueType, values: Sequence[object]) -> bytes:
    expected: tuple[type, ...] = (int,)
    if kind == ValueType.STRING:
        expected = (str,)
    elif kind == ValueType.BOOL:
        expected = (bool,)
    elif kind in (ValueType.FLOAT32, ValueType.FLOAT64):
        expected = (float, int)
    for value in values:
        if not isinstance(value, expected) or (kind != ValueType.BOOL and isinstance(value, bool)):
            raise CheckpointError(f"{file}: metadata {shown(key)} of type {kind.name} holds {shown_value(value)}")
    if kind == ValueType.STRING:
        return b"".join(_encode_text(file, str(value)) for value in values)
    try:
        return struct.pack(f"<{len(values)}{_SCALAR_CODES[kind]}", *values)
    except (struct.error, OverflowError) as error:
        raise CheckpointError(
            f"{file}: metadata {shown(key)} does not fit {kind.name}: {error}; choose a wider or a signed type"
        ) from error


def _encode_text(file: Path, text: str) -> bytes:
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{file}: {shown(text)} cannot be written as UTF-8") from error
    return struct.pack("<Q", len(raw)) + raw
