"""Weights that Paddle quantized before publishing: what `config.json` states about them, and the order of their bytes.

A linear layer `X` of such a -Paddle folder is `X.quant_weight` (int8) and `X.weight_scale` (one step per output) in
place of `X.weight`; a weight is code times step, symmetric, without zero point. The codes come in one of three orders:

- `gpu`, the published one, is the layout of the mixed GEMM of Paddle's CUTLASS kernels from compute capability 7.5 on:
  rows (inputs) permuted in blocks of 16 (int8) or 32 (int4), columns (outputs) one after the other but interleaved
  by 2 or 4 in tiles of 64 rows, codes stored with a bias, and the codes of each 32-bit word shuffled. Shapes: int8
  [N, K], int4 [N / 2, K]. Source: inference reference 2.2; PaddlePaddle/Paddle,
  `paddle/phi/kernels/impl/weight_quantize_kernel_impl.h`.
- `in_out` [K, N] and `out_in` [N, K] are the natural ones in two's complement; int4 packs two neighbours along K into a
  byte, the lower one in the lower half: [K / 2, N] and [N, K / 2].

Shape letters: K inputs, N outputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ernie45.checkpoint.safetensors import shorten, shown_value
from ernie45.config.nearest import nearest
from ernie45.errors import CheckpointError

Bits = Literal[4, 8]
Order = Literal["gpu", "in_out", "out_in"]

TILE = 64
"""Inputs per tile of the `gpu` order; their number is a multiple of it."""
_INTERLEAVE: dict[Bits, int] = {8: 2, 4: 4}
_BITS: dict[str, Bits] = {"wint8": 8, "wint4": 4}
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Codes decoded at a time: temporaries stay near 32 MB however large the tensor is.
_CHUNK_CODES = 1 << 22

# Language layers alone are quantized; embedding, head, routers and the vision encoder keep floating-point values.
_LINEAR = re.compile(r"ernie\.((layers|mtp_block)\.\d+\..+_proj|mtp_linear_proj\.\d+)\.weight")
_ROUTED = re.compile(r"ernie\.layers\.\d+\.mlp\.experts\.(\d+)\..+")

# Keys of `quantization_config` that say nothing about weights in these formats.
_INERT = {
    "is_quantized",
    "is_moe_quantized",
    "kv_cache_quant_type",
    "is_channel_wise",
    "has_zero_point",
    "hadamard_block_size",
    "moe_dynamic_quant",
}
_KNOWN = _INERT | {
    "quantization",
    "dense_quant_type",
    "moe_quant_type",
    "image_moe_quant_type",
    "dense_quant_granularity",
    "is_permuted",
    "weight_order",
}


@dataclass(frozen=True, kw_only=True)
class PrequantizedStatement:
    """What `quantization_config` says about the weights."""

    dense: tuple[Bits, ...]
    """Of attention, dense layers, shared experts and the prediction block; of several, the shape tells which it is."""
    routed: Bits
    vision_routed: Bits
    order: Order

    def bits_of(self, name: str, num_experts: int) -> tuple[Bits, ...]:
        """Widths that the linear layer `name` may have. `num_experts`: of the text pool, the vision pool follows."""
        match = _ROUTED.fullmatch(name)
        if match is None:
            return self.dense
        return (self.routed if int(match[1]) < num_experts else self.vision_routed,)


def read_statement(stated: object, where: str) -> PrequantizedStatement:
    """Interpret the `quantization_config` of a -Paddle folder.

    Raises: CheckpointError for a format that is not read, an unknown key, or statements that contradict each other.
    """
    if not isinstance(stated, dict):
        raise CheckpointError(f"{where}: quantization_config is {shown_value(stated)}, expected an object")
    whole = None if stated.get("quantization") == "mix_quant" else _bits(stated, "quantization", where)
    _check_keys(stated, where)
    dense: tuple[Bits, ...] = (_bits(stated, "dense_quant_type", where, whole),)
    if whole == 4 and stated.get("dense_quant_type") is None:
        # To some tools that means int8 layers with int4 experts, to others int4 throughout; the shapes tell.
        dense = (8, 4)
    routed = _bits(stated, "moe_quant_type", where, whole)
    vision_routed = _bits(stated, "image_moe_quant_type", where, routed)
    return PrequantizedStatement(dense=dense, routed=routed, vision_routed=vision_routed, order=_order(stated, where))


def is_linear(name: str) -> bool:
    """Whether the -Paddle tensor `name` is a weight that these files may hold quantized."""
    return _LINEAR.fullmatch(name) is not None


def stored_shape(rows: int, columns: int, bits: Bits, order: Order) -> tuple[int, int]:
    """Shape of `quant_weight` for a matrix of N `rows` and K `columns`."""
    per_byte = 8 // bits
    if order == "gpu":
        return rows // per_byte, columns
    return (columns // per_byte, rows) if order == "in_out" else (rows, columns // per_byte)


def check_size(rows: int, columns: int, bits: Bits, order: Order, where: str) -> None:
    """Raise CheckpointError if a matrix of N `rows` and K `columns` has no such layout."""
    interleave = _INTERLEAVE[bits]
    if order == "gpu" and (columns % TILE or rows % interleave):
        raise CheckpointError(
            f"{where} has {columns} inputs and {rows} outputs; the gpu order of wint{bits} takes multiples of {TILE} "
            f"and {interleave}: state the order of the files in quantization_config, see docs/checkpoints.md"
        )
    if order != "gpu" and columns % (8 // bits):
        raise CheckpointError(f"{where} has {columns} inputs; int4 packs two into a byte: expected an even number")


def row_unit(bits: Bits, order: Order) -> int:
    """Rows (outputs) that lie together in the file and are read together; 0 if only the whole tensor can be read."""
    return {"gpu": _INTERLEAVE[bits], "out_in": 1, "in_out": 0}[order]


def dequantize(raw: Tensor, scale_N: Tensor, columns: int, bits: Bits, order: Order, where: str) -> Tensor:
    """Decode `quant_weight`.

    Args: raw: int8, a whole number of row units, in file order. scale_N: steps, any floating-point type.
    Returns: float32 (N, K): code times step; exact for steps of 16 bits.
    Raises: CheckpointError if the codes cannot be those of this order.
    """
    rows = len(scale_N)
    out = torch.empty(rows, columns)
    if not out.numel():
        return out
    if order == "in_out":
        raw = raw.T
    # The `gpu` order has the shape of halved rows for int4; its bytes are those of whole rows all the same.
    data = raw.contiguous().view(torch.uint8).view(rows, -1)
    unit = max(row_unit(bits, order), 1)
    step = max(_CHUNK_CODES // columns // unit, 1) * unit
    lowest = zeros = 0
    middle = 1 << (bits - 1)
    for start in range(0, rows, step):
        part = data[start : start + step]
        codes = _gpu_codes(part, columns, bits) if order == "gpu" else _natural_codes(part, bits)
        lowest, zeros = lowest + int((codes == 0).sum()), zeros + int((codes == middle).sum())
        out[start : start + step] = (codes.float() - middle) * scale_N[start : start + step, None].float()
    if lowest > zeros:
        # Reading biased codes as two's complement, or the reverse, turns every zero into the lowest value.
        raise CheckpointError(
            f"{where} holds {lowest} times {-middle} and {zeros} times 0 when read in {order} order; symmetric wint{bits} "
            f"runs from {1 - middle} to {middle - 1}, so this is another order: state weight_order in quantization_config, "
            f"one of {', '.join(get_args(Order))}"
        )
    return out


def check_scale_dtype(dtype: torch.dtype, stored_dtype: str, where: str) -> None:
    """Raise CheckpointError if steps cannot have this type."""
    if dtype not in _SCALE_DTYPES:
        raise CheckpointError(f"{where} is stored as {stored_dtype}, expected float32, bfloat16 or float16")


def _gpu_codes(data: Tensor, columns: int, bits: Bits) -> Tensor:
    """Biased codes, uint8 (N, K), from bytes (N, K x bits / 8) in `gpu` order; N is a multiple of the interleave."""
    interleave = _INTERLEAVE[bits]
    tiles = data.reshape(-1, columns // TILE, interleave, TILE * bits // 8)
    rows = tiles.transpose(1, 2).reshape(data.shape)
    if bits == 4:
        rows = torch.stack((rows & 15, rows >> 4), dim=-1).flatten(1)
    places = _PLACES[bits]
    return rows.view(len(data), -1, len(places))[..., places].view(len(data), columns)


def _natural_codes(data: Tensor, bits: Bits) -> Tensor:
    """Biased codes, uint8 (N, K), from two's complement, bytes (N, K x bits / 8)."""
    if bits == 8:
        return data ^ 0x80
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(1) ^ 8


def _places(bits: Bits) -> Tensor:
    """Where input k of each block of inputs lies in the stored block: int8 16, int4 32 entries."""
    block, per_word = 128 // bits, 32 // bits
    half = per_word // 2
    # Input that the permutation of rows puts at place i.
    permuted = [8 * (i % per_word // 2) + i % 2 + 2 * (i // per_word) for i in range(block)]
    # Within each 32-bit word first the even places, then the odd ones.
    shuffled = [2 * (j % per_word) if j % per_word < half else 2 * (j % per_word - half) + 1 for j in range(block)]
    stored = [permuted[j // per_word * per_word + shuffled[j]] for j in range(block)]
    return torch.tensor([stored.index(k) for k in range(block)])


_PLACES: dict[Bits, Tensor] = {8: _places(8), 4: _places(4)}


def _check_keys(stated: Mapping[str, Any], where: str) -> None:
    for key, value in stated.items():
        if key not in _KNOWN and value:
            raise CheckpointError(
                f"{where}: quantization_config has {shorten(repr(key))} = {shown_value(value)}, which might change how "
                f"weights are stored and is not known here; the nearest known key is {nearest(key[:100], _KNOWN)}"
            )
    granularity = stated.get("dense_quant_granularity")
    if granularity not in (None, "per_channel"):
        raise CheckpointError(
            f"{where}: dense_quant_granularity is {shown_value(granularity)}, which is not read yet; 'per_channel' is"
        )


def _bits(stated: Mapping[str, Any], key: str, where: str, default: Bits | None = None) -> Bits:
    value = stated.get(key)
    if value is None:
        if default is None:
            raise CheckpointError(f"{where}: quantization_config does not state {key}, expected wint8 or wint4")
        return default
    if not isinstance(value, str) or value not in _BITS:
        raise CheckpointError(
            f"{where}: {key} is {shown_value(value)}, which is not read yet; wint8, wint4 and mix_quant of both are. Take "
            "the bfloat16 weights of the model and `ernie quantize` them"
        )
    return _BITS[value]


def _order(stated: Mapping[str, Any], where: str) -> Order:
    permuted, order = stated.get("is_permuted"), stated.get("weight_order")
    if not isinstance(permuted, bool | None):
        raise CheckpointError(f"{where}: is_permuted is {shown_value(permuted)}, expected true or false")
    if order is None:
        return "in_out" if permuted is False else "gpu"
    if order not in get_args(Order):
        raise CheckpointError(
            f"{where}: weight_order is {shown_value(order)}, expected one of {', '.join(get_args(Order))}"
        )
    if permuted is not None and permuted != (order == "gpu"):
        raise CheckpointError(f"{where}: is_permuted is {permuted}, but weight_order is {order!r}: remove one of them")
    return order
