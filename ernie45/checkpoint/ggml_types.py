"""The tensor types of GGUF files that can be read: how their bytes are laid out and what numbers they stand for.

Quantized types cut a row into blocks of equal length, each with its own scale. The "K" types hold 256 values in
sub-blocks of 16 or 32 whose scales are quantized in turn. Every value is a product (and a difference) in float32,
rounded after each step, so the results equal those of the reference decoder bit for bit. Layouts: ggml-org/ggml,
`src/ggml-common.h` (structures) and `src/ggml-quants.c` (`dequantize_row_*`).
"""

import enum
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ernie45.errors import CheckpointError

# Values decoded at a time: temporaries stay near 64 MB however large the tensor is.
_CHUNK_VALUES = 1 << 21


class GGMLType(enum.IntEnum):
    """Type numbers as files state them."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30

    @property
    def block_length(self) -> int:
        """Values per block; a row is a whole number of blocks."""
        return _LAYOUTS[self][0]

    @property
    def block_bytes(self) -> int:
        """Bytes per block."""
        return _LAYOUTS[self][1]

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The torch type with the same bits, None for quantized types."""
        return _PLAIN_DTYPES.get(self)


_LAYOUTS: dict[GGMLType, tuple[int, int]] = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.BF16: (1, 2),
    GGMLType.Q4_0: (32, 18),
    GGMLType.Q4_1: (32, 20),
    GGMLType.Q5_0: (32, 22),
    GGMLType.Q5_1: (32, 24),
    GGMLType.Q8_0: (32, 34),
    GGMLType.Q2_K: (256, 84),
    GGMLType.Q3_K: (256, 110),
    GGMLType.Q4_K: (256, 144),
    GGMLType.Q5_K: (256, 176),
    GGMLType.Q6_K: (256, 210),
}

_PLAIN_DTYPES = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}

# Known, but not readable: only so that the message can name them.
_OTHER_TYPE_NAMES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


def type_from_id(number: int, where: str) -> GGMLType:
    """Return the type with this number. `where` opens the message. Raises: CheckpointError if it cannot be read."""
    try:
        return GGMLType(number)
    except ValueError:
        name = _OTHER_TYPE_NAMES.get(number, "unknown")
        readable = ", ".join(kind.name for kind in GGMLType)
        raise CheckpointError(f"{where} has type {name} ({number}); those that can be read are {readable}") from None


def dequantize(raw: Tensor, kind: GGMLType, shape: Sequence[int]) -> Tensor:
    """Decode a tensor's bytes.

    Args: raw: uint8, any shape, the blocks in order. kind: how they are laid out. shape: torch order, rows last.
    Returns: float32 of `shape`.
    Raises: CheckpointError if the number of bytes does not fit shape and type.
    """
    out = torch.empty(tuple(shape), dtype=torch.float32)
    block_bytes, length = kind.block_bytes, kind.block_length
    row_length = out.shape[-1] if out.ndim else 1
    if raw.dtype != torch.uint8 or row_length % length or raw.numel() != out.numel() // length * block_bytes:
        raise CheckpointError(
            f"{kind.name} of shape {list(shape)} takes rows of whole blocks, {length} values in {block_bytes} bytes "
            "of uint8, "
            f"got {raw.numel()} items of {raw.dtype}"
        )
    blocks, values = raw.reshape(-1, block_bytes), out.view(-1, length)
    step = blocks_per_chunk(kind)
    for start in range(0, blocks.shape[0], step):
        values[start : start + step] = decode_blocks(blocks[start : start + step], kind)
    return out


def blocks_per_chunk(kind: GGMLType) -> int:
    """How many blocks to decode at a time so that the temporaries stay small."""
    return _CHUNK_VALUES // kind.block_length


def decode_blocks(blocks: Tensor, kind: GGMLType) -> Tensor:
    """Decode blocks, uint8 (blocks, bytes per block), to float32 (blocks, values per block)."""
    dtype = kind.torch_dtype
    if dtype is not None:
        return blocks.contiguous().view(dtype).to(torch.float32)
    return _DECODERS[kind](blocks)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:18], 16) - 8.0)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:20], 16).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_five_bits(blocks[:, 2:6], blocks[:, 6:22]) - 16.0)


def _q5_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _five_bits(blocks[:, 4:8], blocks[:, 8:24]).float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _signed(blocks[:, 2:34])


def _q2_k(blocks: Tensor) -> Tensor:
    """16 bytes of (minimum, scale) nibbles, 64 bytes of 2-bit values, scale of scales, scale of minima."""
    packed_scales, packed, d, d_min = blocks[:, :16], blocks[:, 16:80], _half(blocks, 80), _half(blocks, 82)
    scale = (d * (packed_scales & 15).float()).unsqueeze(2)
    minimum = (d_min * (packed_scales >> 4).float()).unsqueeze(2)
    values = _bit_fields(packed, 32, 2).view(-1, 16, 16).float()
    return (scale * values - minimum).view(-1, 256)


def _q3_k(blocks: Tensor) -> Tensor:
    """32 bytes of third bits, 64 bytes of low bit pairs, 12 bytes of 6-bit scales, scale of scales.

    The third bit is stored inverted: where it is 0, the value is lowered by 4. Scales: low nibbles in 8 bytes, first
    the lower halves (scales 0 to 7), then the upper ones (8 to 15); the upper bit pairs in 4 bytes, four scales per
    shift.
    """
    third, packed, packed_scales, d = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108], _half(blocks, 108)
    low = _bit_fields(packed_scales[:, :8], 8, 4)
    high = _bit_fields(packed_scales[:, 8:], 4, 2)
    scale = (d * ((low | (high << 4)).float() - 32.0)).unsqueeze(2)
    lowered = (1 - _bit_fields(third, 32, 1).float()) * 4.0
    values = (_bit_fields(packed, 32, 2).float() - lowered).view(-1, 16, 16)
    return (scale * values).view(-1, 256)


def _q4_k(blocks: Tensor) -> Tensor:
    """Scale of scales, scale of minima, 12 bytes of 6-bit scales and minima, 128 bytes of 4-bit values."""
    scale, minimum = _k_scales(blocks)
    values = _nibbles(blocks[:, 16:144], 32).view(-1, 8, 32).float()
    return (scale * values - minimum).view(-1, 256)


def _q5_k(blocks: Tensor) -> Tensor:
    """As Q4_K, with 32 bytes of fifth bits (bit j of byte l: value l of sub-block j) before the values."""
    scale, minimum = _k_scales(blocks)
    fifth = _bit_fields(blocks[:, 16:48], 32, 1)
    values = (_nibbles(blocks[:, 48:176], 32) | (fifth << 4)).view(-1, 8, 32).float()
    return (scale * values - minimum).view(-1, 256)


def _q6_k(blocks: Tensor) -> Tensor:
    """128 bytes of low nibbles, 64 bytes of upper bit pairs, 16 signed scales, scale of scales."""
    low = _nibbles(blocks[:, :128], 64)
    high = _bit_fields(blocks[:, 128:192], 32, 2)
    scale = (_half(blocks, 208) * _signed(blocks[:, 192:208])).unsqueeze(2)
    values = ((low | (high << 4)).float() - 32.0).view(-1, 16, 16)
    return (scale * values).view(-1, 256)


_DECODERS: dict[GGMLType, Callable[[Tensor], Tensor]] = {
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
}


def _half(blocks: Tensor, position: int) -> Tensor:
    """The float16 at this byte of every block, as float32 (blocks, 1)."""
    return blocks[:, position : position + 2].contiguous().view(torch.float16).to(torch.float32)


def _signed(column: Tensor) -> Tensor:
    return column.contiguous().view(torch.int8).to(torch.float32)


def _bit_fields(packed: Tensor, run: int, bits: int) -> Tensor:
    """Unpack fields of `bits` bits. Each run of bytes yields first the lowest field of all its bytes, then the next.

    Args: packed: uint8 (blocks, n runs * run). Returns: uint8 (blocks, n runs * (8 / bits) * run).
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).view(1, 1, -1, 1)
    fields = (packed.reshape(packed.shape[0], -1, 1, run) >> shifts) & ((1 << bits) - 1)
    return fields.view(packed.shape[0], -1)


def _nibbles(packed: Tensor, run: int) -> Tensor:
    return _bit_fields(packed, run, 4)


def _five_bits(fifth: Tensor, packed: Tensor) -> Tensor:
    """Join 4-bit values with their fifth bits, stored as one little-endian word of 32 bits."""
    shifts = torch.arange(8, dtype=torch.uint8)
    high = ((fifth.unsqueeze(2) >> shifts) & 1).view(-1, 32)
    return _nibbles(packed, 16) | (high << 4)


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of Q4_K and Q5_K, float32 (blocks, 8, 1) each.

    Bytes 0 to 3: scales 0 to 3 in the lower 6 bits; 4 to 7: minima 0 to 3 likewise; 8 to 11: scales 4 to 7 in the
    lower, minima 4 to 7 in the upper nibble, with their top bit pairs in the upper bits of bytes 0 to 3 and 4 to 7.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], dim=1).float()
    minimum = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], dim=1).float()
    return (_half(blocks, 0) * scale).unsqueeze(2), (_half(blocks, 2) * minimum).unsqueeze(2)
