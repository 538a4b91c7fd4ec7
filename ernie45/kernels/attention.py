"""Attention over keys and values in pages: rotary embedding with the append, and the attention itself, for decoding and for
prefill in chunks, over several sequences in one call, be their keys and values in one store or in several.

Shape letters: B sequences, T tokens (new ones, packed), N query heads, G key/value heads, D head size, P pages, W token slots
per page. Every operation is a specification in plain PyTorch (`*_reference`), a native twin in `csrc/kernels/attention.cpp` and
`elementwise.cpp`, and a function that chooses. Order of the native sums, bytes moved: `csrc/kernels/attention.hpp`; a token's result
depends neither on the thread count, nor on other sequences, nor on how a prompt was cut into chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.kernels.check import check_tensor
from ernie45.kernels.choice import native

MAX_HEAD_DIM = 256
"""Largest D; D is a multiple of 16."""


@dataclass(frozen=True, kw_only=True)
class KvPages:
    """Keys and values of one layer: views of any page pool or cache whose slots of a head lie one behind the other.

    A contiguous cache (G, capacity, D) is a store of one page: `cache[None]`. int8 values are multiplied by their scale.
    """

    keys_PGWD: Tensor
    """float32, bfloat16 or int8; the strides of pages and heads are free."""
    values_PGWD: Tensor
    """Like the keys."""
    key_scales_PGW: Tensor | None = None
    """float32, with int8 only: largest magnitude of a token's head / 127."""
    value_scales_PGW: Tensor | None = None
    """Like the keys' scales."""

    def __post_init__(self) -> None:
        keys = self.keys_PGWD
        if keys.ndim != 4 or 0 in keys.shape[1:] or keys.shape[3] % 16 or keys.shape[3] > MAX_HEAD_DIM:
            raise ShapeError(
                f"[KvPages] keys: expected shape (P, G, W, D) with D a multiple of 16 up to {MAX_HEAD_DIM}, got {tuple(keys.shape)}"
            )
        if keys.dtype not in (torch.float32, torch.bfloat16, torch.int8):
            raise ShapeError(f"[KvPages] keys: expected float32, bfloat16 or int8, got {keys.dtype}")
        for name, tensor in (("keys", keys), ("values", self.values_PGWD)):
            _check_store(name, tensor, keys.shape, keys.dtype, (keys.shape[3], 1))
        for name, scales in (("key_scales", self.key_scales_PGW), ("value_scales", self.value_scales_PGW)):
            if (scales is not None) != (keys.dtype == torch.int8):
                raise ShapeError(
                    f"[KvPages] {name}: expected with int8 and only with it, got {scales is not None} with {keys.dtype}"
                )
            if scales is not None:
                _check_store(name, scales, keys.shape[:3], torch.float32, (1,))

    @cached_property
    def native(self) -> Any:
        """The native object; it points into the tensors."""
        extension = native()
        assert extension is not None, "asked for without the native module"
        return extension.KvStore(self.keys_PGWD, self.values_PGWD, self.key_scales_PGW, self.value_scales_PGW)


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """The sequences of a step, made once for all its layers. Their new tokens are packed one behind the other along T."""

    fresh_B: Tensor
    """int32: new tokens of each; they add up to T."""
    lengths_B: Tensor
    """int32: tokens of each, the new ones included."""
    pages_BP: Tensor
    """int32: the page of a sequence's first W tokens, of the next W, ..; entries behind its last page are not looked at."""

    def __post_init__(self) -> None:
        count = (self.fresh_B.shape[0],) if self.fresh_B.ndim else (1,)
        for name, tensor, shape in (
            ("fresh", self.fresh_B, count),
            ("lengths", self.lengths_B, count),
            ("pages", self.pages_BP, (*count, self.pages_BP.shape[-1])),
        ):
            check_tensor("Sequences", name, tensor, shape, torch.int32)
        fresh, lengths = self.fresh_B.tolist(), self.lengths_B.tolist()
        if any(not 0 <= new <= length for new, length in zip(fresh, lengths, strict=True)):
            raise ShapeError(f"[Sequences] expected new tokens between 0 and the length, got {fresh} of {lengths}")

    @cached_property
    def num_tokens(self) -> int:
        """T of the step."""
        return sum(self.fresh_B.tolist())

    @cached_property
    def native(self) -> Any:
        """The native object, with the numbers as they are now."""
        extension = native()
        assert extension is not None, "asked for without the native module"
        return extension.Sequences(self.fresh_B, self.lengths_B, self.pages_BP)


Stores = KvPages | tuple[KvPages, ...]
"""One store for all sequences of a step, such as a page pool, or one for each, such as its cache; equal heads and head sizes."""


def attend(
    qkv: Tensor, rotation_TJ: Tensor, num_heads: int, stores: Stores, sequences: Sequences, scale: float
) -> Tensor:
    """`rope_append` and `attention` in one call, to the bit. Arguments and errors are theirs. Returns: float32 (T, N D)."""
    stores = _each_store(stores)
    extension = native()
    if extension is None:
        q_TND = rope_append_reference(qkv, rotation_TJ, num_heads, stores, sequences)
        return attention_reference(q_TND, stores, sequences, scale).flatten(1)
    out_TX = torch.empty(sequences.num_tokens, num_heads * stores[0].keys_PGWD.shape[3])
    try:
        extension.attend(qkv, rotation_TJ, out_TX, [store.native for store in stores], sequences.native, scale)
    except (TypeError, ValueError) as error:
        _check_qkv("attend", qkv, rotation_TJ, num_heads, stores, sequences)
        raise ShapeError(str(error)) from error
    return out_TX


def rope_append(qkv: Tensor, rotation_TJ: Tensor, num_heads: int, stores: Stores, sequences: Sequences) -> Tensor:
    """Rotate queries and keys, append keys and values to the stores, return the queries.

    Args: qkv: float32, contiguous, (T, (N + 2 G) D): all query heads, key heads, value heads of a token. rotation_TJ: complex64
        (T, D / 2), the turn of each pair (2 j, 2 j + 1), from `layers.rope.rotary_rotation`. num_heads: N. stores: written in
        place; bfloat16 rounds to nearest even, int8 by the largest magnitude of the token's head.
    Returns: float32 (T, N, D).
    Raises: ShapeError for other shapes, dtypes, devices or strides, and for pages that a store does not have.
    """
    stores = _each_store(stores)
    extension = native()
    if extension is None:
        return rope_append_reference(qkv, rotation_TJ, num_heads, stores, sequences)
    q_TND = torch.empty(sequences.num_tokens, num_heads, stores[0].keys_PGWD.shape[3])
    try:
        extension.rope_append(qkv, rotation_TJ, q_TND, [store.native for store in stores], sequences.native)
    except (TypeError, ValueError) as error:
        _check_qkv("rope_append", qkv, rotation_TJ, num_heads, stores, sequences)
        raise ShapeError(str(error)) from error
    return q_TND


def rope_append_reference(
    qkv: Tensor, rotation_TJ: Tensor, num_heads: int, stores: Stores, sequences: Sequences
) -> Tensor:
    """What `rope_append` computes; differs from the native twin by the rounding of separate multiply and add."""
    stores = _each_store(stores)
    _check_qkv("rope_append", qkv, rotation_TJ, num_heads, stores, sequences)
    num_groups, dim = stores[0].keys_PGWD.shape[1], stores[0].keys_PGWD.shape[3]
    heads = qkv.unflatten(1, (-1, dim))
    pairs = torch.view_as_complex(heads[:, : num_heads + num_groups].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * rotation_TJ[:, None]).flatten(-2)
    start = 0
    for store, fresh, length, row in _each_sequence("rope_append", stores, sequences):
        at = torch.arange(length - fresh, length)
        pages, slots = row[at // store.keys_PGWD.shape[2]].long(), at % store.keys_PGWD.shape[2]
        here = slice(start, start + fresh)
        for x_TGD, into, scales in (
            (turned[here, num_heads:], store.keys_PGWD, store.key_scales_PGW),
            (heads[here, num_heads + num_groups :], store.values_PGWD, store.value_scales_PGW),
        ):
            if scales is None:
                into[pages, :, slots] = x_TGD.to(into.dtype)
            else:
                into[pages, :, slots], scales[pages, :, slots] = to_int8(x_TGD)
        start += fresh
    return turned[:, :num_heads].contiguous()


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row (the last dimension) to 8 bits: int8 values and float32 scales, largest magnitude / 127."""
    largest = x.abs().amax(-1)
    inverse = torch.where(largest > 0, 127.0 / largest, 0.0)
    return (x * inverse[..., None]).round().to(torch.int8), largest / 127.0


def attention(q_TND: Tensor, stores: Stores, sequences: Sequences, scale: float) -> Tensor:
    """Softmax attention of each sequence's new tokens over all its tokens, causal; N / G query heads share a key head.

    Args: q_TND: float32, contiguous. stores: keys and values, those of the new tokens included. scale: usually D ** -0.5.
    Returns: float32 (T, N, D).
    Raises: ShapeError for other shapes, dtypes, devices or strides, and for pages that a store does not have.
    """
    stores = _each_store(stores)
    extension = native()
    if extension is None:
        return attention_reference(q_TND, stores, sequences, scale)
    out_TND = torch.empty_like(q_TND)
    try:
        extension.attention(q_TND, out_TND, [store.native for store in stores], sequences.native, scale)
    except (TypeError, ValueError) as error:
        _check_q(q_TND, stores, sequences)
        raise ShapeError(str(error)) from error
    return out_TND


def attention_reference(q_TND: Tensor, stores: Stores, sequences: Sequences, scale: float) -> Tensor:
    """What `attention` computes, sequence by sequence; differs from the native twin by the order of the sums."""
    stores = _each_store(stores)
    _check_q(q_TND, stores, sequences)
    out_TND = torch.empty_like(q_TND)
    start = 0
    for store, fresh, length, pages in _each_sequence("attention", stores, sequences):
        keys_GSD, values_GSD = _gather(store, length, pages)
        num_groups = keys_GSD.shape[0]
        q_GRTD = q_TND[start : start + fresh].unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3)
        scores = q_GRTD * scale @ keys_GSD[:, None].mT
        hidden = torch.arange(length) > torch.arange(length - fresh, length)[:, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out_TND[start : start + fresh] = (weights @ values_GSD[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
        start += fresh
    return out_TND


def _each_store(stores: Stores) -> tuple[KvPages, ...]:
    if isinstance(stores, KvPages):
        return (stores,)
    if not stores:
        raise ShapeError("[attention] expected one store, or one for each sequence, got none")
    return stores


def _each_sequence(
    operation: str, stores: tuple[KvPages, ...], sequences: Sequences
) -> list[tuple[KvPages, int, int, Tensor]]:
    """Store, new tokens, length and row of pages of every sequence, checked."""
    count = len(sequences.fresh_B)
    if len(stores) != 1 and len(stores) != count:
        raise ShapeError(f"[{operation}] expected one store, or one for each of {count} sequences, got {len(stores)}")
    shapes = {(store.keys_PGWD.shape[1], store.keys_PGWD.shape[3]) for store in stores}
    if len(shapes) != 1:
        raise ShapeError(f"[{operation}] expected stores of equal heads and head sizes, got {sorted(shapes)}")
    found = []
    for index, (fresh, length, pages) in enumerate(
        zip(sequences.fresh_B.tolist(), sequences.lengths_B.tolist(), sequences.pages_BP, strict=True)
    ):
        store = stores[0] if len(stores) == 1 else stores[index]
        _check_pages(f"[{operation}] sequence {index}", store, length, pages)
        found.append((store, fresh, length, pages))
    return found


def _gather(store: KvPages, length: int, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence in float32, each (G, S, D)."""
    used = pages[: -(-length // store.keys_PGWD.shape[2])].long()
    halves = []
    for tensor, scales in ((store.keys_PGWD, store.key_scales_PGW), (store.values_PGWD, store.value_scales_PGW)):
        wide = tensor[used].float() if scales is None else tensor[used].float() * scales[used][..., None]
        halves.append(wide.transpose(0, 1).flatten(1, 2)[:, :length])
    return halves[0], halves[1]


def _check_pages(where: str, store: KvPages, length: int, pages: Tensor) -> None:
    num_pages, _, slots_per_page, _ = store.keys_PGWD.shape
    needed = -(-length // slots_per_page)
    if needed > len(pages):
        raise ShapeError(f"{where}: expected {needed} pages for {length} tokens, got {len(pages)}")
    outside = [page for page in pages[:needed].tolist() if not 0 <= page < num_pages]
    if outside:
        raise ShapeError(f"{where}: expected pages from 0 to {num_pages - 1}, got {outside[0]}")


def _check_q(q_TND: Tensor, stores: tuple[KvPages, ...], sequences: Sequences) -> None:
    num_groups, dim = stores[0].keys_PGWD.shape[1], stores[0].keys_PGWD.shape[3]
    num_heads = q_TND.shape[1] if q_TND.ndim == 3 else 0
    check_tensor("attention", "q", q_TND, (sequences.num_tokens, num_heads, dim), torch.float32)
    if num_heads == 0 or num_heads % num_groups:
        raise ShapeError(
            f"[attention] expected query heads in equal groups over {num_groups} key heads, got {num_heads}"
        )


def _check_qkv(
    operation: str,
    qkv: Tensor,
    rotation_TJ: Tensor,
    num_heads: int,
    stores: tuple[KvPages, ...],
    sequences: Sequences,
) -> None:
    num_groups, dim = stores[0].keys_PGWD.shape[1], stores[0].keys_PGWD.shape[3]
    num_tokens = sequences.num_tokens
    check_tensor(operation, "qkv", qkv, (num_tokens, (num_heads + 2 * num_groups) * dim), torch.float32)
    check_tensor(operation, "rotation", rotation_TJ, (num_tokens, dim // 2), torch.complex64)


def _check_store(name: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype, strides: tuple[int, ...]) -> None:
    fits = tensor.shape == shape and tensor.dtype == dtype and tensor.device.type == "cpu"
    if not fits or tensor.stride()[-len(strides) :] != strides:
        raise ShapeError(
            f"[KvPages] {name}: expected {dtype} of shape {tuple(shape)} on the CPU, its last strides {strides}, got "
            f"{tensor.dtype}, {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
        )
