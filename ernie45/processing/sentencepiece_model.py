"""Read and write the part of SentencePiece's ModelProto that tokenization depends on.

The file is a protocol buffer. This walker reads the fields below straight from the wire format, checks everything that
the C++ library takes on trust, and writes the message again with other piece types, so that a marker such as
`<|im_start|>` can be made unreachable from plain text. Field numbers: sentencepiece_model.proto of the SentencePiece
project.

    ModelProto      1 pieces (repeated)   2 trainer_spec   3 normalizer_spec
    SentencePiece   1 piece (string)      2 score (float)  3 type (enum, default NORMAL)
    TrainerSpec     3 model_type          24 treat_whitespace_as_suffix   35 byte_fallback
    NormalizerSpec  2 precompiled_charsmap   3 add_dummy_prefix   4 remove_extra_whitespaces   5 escape_whitespaces
"""

import math
import re
import struct
from array import array
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

from ernie45.errors import CheckpointError

SPACE = "\u2581"  # how pieces spell a space
MAX_PIECES = 1 << 22
MAX_PIECE_BYTES = 1 << 16

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_UNIGRAM, _BPE = 1, 2


class PieceType(IntEnum):
    """What a piece is; GGUF's `tokenizer.ggml.token_type` uses the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """One vocabulary entry."""

    text: str
    score: float
    type: PieceType

    @property
    def byte(self) -> int | None:
        """The value of a byte piece, None for every other piece."""
        return int(self.text[3:5], 16) if self.type is PieceType.BYTE else None


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """A checked SentencePiece vocabulary."""

    pieces: tuple[Piece, ...]
    trainer_spec: bytes
    """The serialised TrainerSpec."""
    normalizer_spec: bytes
    """The serialised NormalizerSpec, its character map checked."""
    add_dummy_prefix: bool = True
    """Encoding puts a space before the text."""
    remove_extra_whitespaces: bool = True
    """Encoding trims and collapses spaces, which no decoding can undo."""
    rewrites: bool = False
    """Encoding replaces characters by a map of its own."""

    @classmethod
    def parse(cls, data: bytes, source: str) -> "SentencePieceModel":
        """Read a serialised ModelProto; `source` names it in errors. Raises: CheckpointError."""
        try:
            return _parse_model(data)
        except _WireError as error:
            raise CheckpointError(f"{source} is not a usable SentencePiece model: {error}") from error

    @classmethod
    def build(
        cls, pieces: Iterable[Piece], *, add_dummy_prefix: bool, remove_extra_whitespaces: bool, source: str
    ) -> "SentencePieceModel":
        """Make a BPE model with identity normalisation from `pieces`. Raises: CheckpointError."""
        pieces = tuple(pieces)
        byte_fallback = any(piece.type is PieceType.BYTE for piece in pieces)
        trainer = _varint_field(3, _BPE) + _varint_field(4, len(pieces)) + _varint_field(35, byte_fallback)
        unknown = [idx for idx, piece in enumerate(pieces) if piece.type is PieceType.UNKNOWN]
        if unknown:
            trainer += _varint_field(40, unknown[0]) + _bytes_field(45, pieces[unknown[0]].text.encode())
        normalizer = (
            _bytes_field(1, b"identity")
            + _varint_field(3, add_dummy_prefix)
            + _varint_field(4, remove_extra_whitespaces)
            + _varint_field(5, True)
        )
        return cls.parse(_serialise(pieces, trainer, normalizer), source)

    def serialise(self) -> bytes:
        """Write the ModelProto: pieces, trainer and normaliser settings; other messages are left out."""
        return _serialise(self.pieces, self.trainer_spec, self.normalizer_spec)

    def with_control(self, ids: Collection[int]) -> "SentencePieceModel":
        """Return the model with the pieces `ids` retyped as CONTROL, which text never matches."""
        chosen = set(ids)
        pieces = (
            piece._replace(type=PieceType.CONTROL) if idx in chosen and piece.type is not PieceType.UNKNOWN else piece
            for idx, piece in enumerate(self.pieces)
        )
        return replace(self, pieces=tuple(pieces))

    def without_dummy_prefix(self) -> "SentencePieceModel":
        """Return the model for text that does not begin a prompt: no space is put before it."""
        # The last value of a repeated scalar field wins, so appending overrides.
        return replace(self, normalizer_spec=self.normalizer_spec + _varint_field(3, False), add_dummy_prefix=False)


class _WireError(ValueError):
    """The bytes are no well-formed or no acceptable ModelProto."""


def _parse_model(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer, normalizer = b"", b""
    for number, value in _fields(data):
        if number in (1, 2, 3) and not isinstance(value, bytes):
            raise _WireError(f"field {number} is no message")
        if number == 1:
            if len(pieces) >= MAX_PIECES:
                raise _WireError(f"it has more than {MAX_PIECES} pieces")
            pieces.append(_parse_piece(bytes(value), len(pieces)))  # type: ignore[arg-type]  # bytes, checked above
        elif number == 2:
            trainer += bytes(value)  # type: ignore[arg-type]  # repeated messages merge by concatenation
        elif number == 3:
            normalizer += bytes(value)  # type: ignore[arg-type]
    _check_pieces(pieces)
    _check_trainer(trainer, pieces)
    flags = _check_normalizer(normalizer)
    return SentencePieceModel(
        pieces=tuple(pieces),
        trainer_spec=trainer,
        normalizer_spec=normalizer,
        add_dummy_prefix=flags[3],
        remove_extra_whitespaces=flags[4],
        rewrites=flags[2],
    )


def _parse_piece(data: bytes, idx: int) -> Piece:
    text, score, kind = b"", 0.0, int(PieceType.NORMAL)
    for number, value in _fields(data):
        match number, value:
            case 1, bytes():
                text = value
            case 2, float():
                score = value
            case 3, int():
                kind = value
            case 1 | 2 | 3, _:
                raise _WireError(f"field {number} of piece {idx} has the wrong wire type")
    if not 0 < len(text) <= MAX_PIECE_BYTES:
        raise _WireError(f"piece {idx} has {len(text)} bytes, expected 1 to {MAX_PIECE_BYTES}")
    if not math.isfinite(score):
        raise _WireError(f"the score of piece {idx} is {score}")
    try:
        return Piece(text.decode(), score, PieceType(kind))
    except UnicodeDecodeError as error:
        raise _WireError(f"piece {idx} is not UTF-8 ({error.reason})") from error
    except ValueError as error:
        raise _WireError(f"piece {idx} has the unknown type {kind}") from error


def _check_pieces(pieces: list[Piece]) -> None:
    unknown = sum(piece.type is PieceType.UNKNOWN for piece in pieces)
    if unknown != 1:
        raise _WireError(f"it has {unknown} unknown pieces among {len(pieces)}, expected 1")
    seen: set[str] = set()
    for idx, piece in enumerate(pieces):
        if piece.text in seen:
            raise _WireError(f"piece {idx} ({piece.text!r}) appears twice")
        if "\0" in piece.text:
            raise _WireError(f"piece {idx} ({piece.text!r}) holds a zero character")
        if piece.type is PieceType.BYTE and not _BYTE_PIECE.fullmatch(piece.text):
            raise _WireError(f"byte piece {idx} is {piece.text!r}, expected a name like '<0x0A>'")
        seen.add(piece.text)


def _check_trainer(data: bytes, pieces: list[Piece]) -> None:
    model_type, suffix, byte_fallback = _UNIGRAM, 0, 0
    for number, value in _fields(data):
        if number in (3, 24, 35) and not isinstance(value, int):
            raise _WireError(f"trainer field {number} has the wrong wire type")
        if number == 3:
            model_type = int(value)
        elif number == 24:
            suffix = int(value)
        elif number == 35:
            byte_fallback = int(value)
    if model_type not in (_UNIGRAM, _BPE):
        raise _WireError(f"its model type is {model_type}, expected 1 (unigram) or 2 (BPE)")
    if suffix:
        raise _WireError("it writes spaces after words (treat_whitespace_as_suffix), which is not supported")
    num_bytes = sum(piece.type is PieceType.BYTE for piece in pieces)
    if num_bytes != (256 if byte_fallback else 0):
        raise _WireError(f"it has {num_bytes} byte pieces, expected 256 with byte fallback and none without")


def _check_normalizer(data: bytes) -> dict[int, bool]:
    flags = {2: False, 3: True, 4: True, 5: True}
    for number, value in _fields(data):
        if number == 2:
            if not isinstance(value, bytes):
                raise _WireError("the character map has the wrong wire type")
            _check_charsmap(value)
            flags[2] = flags[2] or bool(value)
        elif number in flags:
            if not isinstance(value, int):
                raise _WireError(f"normaliser field {number} has the wrong wire type")
            flags[number] = bool(value)
    if not flags[5]:
        raise _WireError("it keeps spaces as they are (escape_whitespaces is off), which is not supported")
    return flags


def _check_charsmap(data: bytes) -> None:
    """Prove that no lookup in the character map can leave it.

    The blob is a little-endian length, a double-array trie (Darts) of that many bytes, and zero-terminated replacement
    strings. The library follows offsets of the trie without bounds checks. A step goes from unit `i` to `i ^ offset`,
    then to `that ^ byte`; with a length that is a multiple of 256 units it stays inside exactly if `i ^ offset` does.
    """
    if not data:
        return
    size = int.from_bytes(data[:4], "little")
    strings = data[4 + size :]
    if len(data) < 4 or size == 0 or size % 1024 or size > len(data) - 4:
        raise _WireError("its character map has an impossible size")
    if not strings.endswith(b"\0"):
        raise _WireError("the replacement strings of its character map are not terminated")
    try:
        strings.decode()
    except UnicodeDecodeError as error:
        raise _WireError("the replacement strings of its character map are not UTF-8") from error
    units = array("I", struct.unpack(f"<{size // 4}I", data[4 : 4 + size]))
    for idx, unit in enumerate(units):
        if unit >> 31:  # a leaf: holds a value, is never stepped from
            continue
        target = idx ^ ((unit >> 10) << ((unit & 0x200) >> 6))
        if target >= len(units):
            raise _WireError("the trie of its character map points outside itself")
        if unit & 0x100:
            value = units[target] & 0x7FFFFFFF
            if value >= len(strings) or (value and strings[value - 1]):
                raise _WireError("the trie of its character map points outside the replacement strings")


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Walk the fields of a message: (number, value), value by wire type int, float (32 bits) or bytes."""
    pos = 0
    while pos < len(data):
        key, pos = _varint(data, pos)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, pos = _varint(data, pos)
            yield number, value
            continue
        if wire_type == _BYTES:
            size, pos = _varint(data, pos)
        elif wire_type in (_FIXED32, _FIXED64):
            size = 4 if wire_type == _FIXED32 else 8
        else:
            raise _WireError(f"wire type {wire_type} at byte {pos}")
        chunk = data[pos : pos + size]
        if number == 0 or len(chunk) != size:
            raise _WireError(f"the field at byte {pos} is damaged or cut off")
        pos += size
        yield number, struct.unpack("<f", chunk)[0] if wire_type == _FIXED32 else chunk


def _varint(data: bytes, pos: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if pos >= len(data):
            raise _WireError("it is cut off inside a number")
        byte = data[pos]
        pos += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, pos
    raise _WireError(f"the number before byte {pos} is too long")


def _serialise(pieces: Iterable[Piece], trainer_spec: bytes, normalizer_spec: bytes) -> bytes:
    parts = []
    for piece in pieces:
        body = _bytes_field(1, piece.text.encode())
        body += b"\x15" + struct.pack("<f", piece.score)  # field 2, 32 bits
        if piece.type is not PieceType.NORMAL:
            body += _varint_field(3, piece.type)
        parts.append(_bytes_field(1, body))
    return b"".join(parts) + _bytes_field(2, trainer_spec) + _bytes_field(3, normalizer_spec)


def _varint_field(number: int, value: int) -> bytes:
    return _encode_varint(number << 3 | _VARINT) + _encode_varint(int(value))


def _bytes_field(number: int, value: bytes) -> bytes:
    return _encode_varint(number << 3 | _BYTES) + _encode_varint(len(value)) + value


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
