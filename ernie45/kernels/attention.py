"""Attention over keys and values in pages: rotary embedding with the append, and the attention itself, for decoding and for
prefill in chunks, over several sequences in one call.

Shape letters: B sequences, T tokens (new ones, packed), N query heads, G key/value heads, D head size, P pages, W token slots
per page. Every operation is a specification in plain PyTorch (`*_reference`), a native twin in `csrc/kernels/attention.cpp` and
`elementwise.cpp`, and a function that chooses. Order of the native sums, bytes moved: `csrc/kernels/attention.hpp`; a token's result
depends neither on the thread count, nor on other sequences, nor on how a prompt was cut into chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        count = (len(self.fresh_B),)
        for name, tensor, shape in (
            ("fresh", self.fresh_B, count),
            ("lengths", self.lengths_B, count),
            ("pages", self.pages_BP, (*count, self.pages_BP.shape[-1])),
        ):
            check_tensor("Sequences", name, tensor, shape, torch.int32)
        if bool((self.fresh_B < 0).any()) or bool((self.fresh_B > self.lengths_B).any()):
            raise ShapeError(
                f"[Sequences] expected new tokens between 0 and the length, got {self.fresh_B.tolist()} of {self.lengths_B.tolist()}"
            )

    @cached_property
    def num_tokens(self) -> int:
        """T of the step."""
        return int(self.fresh_B.sum())

    @cached_property
    def native(self) -> Any:
        """The native object; it points into the tensors."""
        extension = native()
        assert extension is not None, "asked for without the native module"
        return extension.Sequences(self.fresh_B, self.lengths_B, self.pages_BP)


def rope_append(qkv: Tensor, rotation_TJ: Tensor, num_heads: int, store: KvPages, sequences: Sequences) -> Tensor:
    """Rotate queries and keys, append keys and values to the store, return the queries.

    Args: qkv: float32, contiguous, (T, (N + 2 G) D): all query heads, key heads, value heads of a token. rotation_TJ: complex64
        (T, D / 2), the turn of each pair (2 j, 2 j + 1), from `layers.rope.rotary_rotation`. num_heads: N. store: written in
        place; bfloat16 rounds to nearest even, int8 by the largest magnitude of the token's head.
    Returns: float32 (T, N, D).
    Raises: ShapeError for other shapes, dtypes, devices or strides, and for pages that the store does not have.
    """
    num_groups, dim = store.keys_PGWD.shape[1], store.keys_PGWD.shape[3]
    num_tokens = sequences.num_tokens
    check_tensor("rope_append", "qkv", qkv, (num_tokens, (num_heads + 2 * num_groups) * dim))
    check_tensor("rope_append", "rotation", rotation_TJ, (num_tokens, dim // 2), torch.complex64)
    extension = native()
    if extension is None:
        return rope_append_reference(qkv, rotation_TJ, num_heads, store, sequences)
    q_TND = torch.empty(num_tokens, num_heads, dim)
    try:
        extension.rope_append(qkv, rotation_TJ, q_TND, store.native, sequences.native)
    except ValueError as error:
        raise ShapeError(str(error)) from error
    return q_TND


def rope_append_reference(
    qkv: Tensor, rotation_TJ: Tensor, num_heads: int, store: KvPages, sequences: Sequences
) -> Tensor:
    """What `rope_append` computes; differs from the native twin by the rounding of separate multiply and add."""
    num_groups, dim = store.keys_PGWD.shape[1], store.keys_PGWD.shape[3]
    heads = qkv.unflatten(1, (-1, dim))
    pairs = torch.view_as_complex(heads[:, : num_heads + num_groups].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * rotation_TJ[:, None]).flatten(-2)
    pages, slots = _places("rope_append", store, sequences)
    for x_TGD, into, scales in (
        (turned[:, num_heads:], store.keys_PGWD, store.key_scales_PGW),
        (heads[:, num_heads + num_groups :], store.values_PGWD, store.value_scales_PGW),
    ):
        if scales is None:
            into[pages, :, slots] = x_TGD.to(into.dtype)
        else:
            into[pages, :, slots], scales[pages, :, slots] = to_int8(x_TGD)
    return turned[:, :num_heads].contiguous()


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row (the last dimension) to 8 bits: int8 values and float32 scales, largest magnitude / 127."""
    largest = x.abs().amax(-1)
    inverse = torch.where(largest > 0, 127.0 / largest, 0.0)
    return (x * inverse[..., None]).round().to(torch.int8), largest / 127.0


def attention(q_TND: Tensor, store: KvPages, sequences: Sequences, scale: float) -> Tensor:
    """Softmax attention of each sequence's new tokens over all its tokens, causal; N / G query heads share a key head.

    Args: q_TND: float32, contiguous. store: keys and values, those of the new tokens included. scale: usually D ** -0.5.
    Returns: float32 (T, N, D).
    Raises: ShapeError for other shapes, dtypes, devices or strides, and for pages that the store does not have.
    """
    num_groups, dim = store.keys_PGWD.shape[1], store.keys_PGWD.shape[3]
    num_heads = q_TND.shape[1] if q_TND.ndim == 3 else 0
    check_tensor("attention", "q", q_TND, (sequences.num_tokens, num_heads, dim))
    if num_heads == 0 or num_heads % num_groups:
        raise ShapeError(
            f"[attention] expected query heads in equal groups over {num_groups} key heads, got {num_heads}"
        )
    extension = native()
    if extension is None:
        return attention_reference(q_TND, store, sequences, scale)
    out_TND = torch.empty_like(q_TND)
    try:
        extension.attention(q_TND, out_TND, store.native, sequences.native, scale)
    except ValueError as error:
        raise ShapeError(str(error)) from error
    return out_TND


def attention_reference(q_TND: Tensor, store: KvPages, sequences: Sequences, scale: float) -> Tensor:
    """What `attention` computes, sequence by sequence; differs from the native twin by the order of the sums."""
    out_TND = torch.empty_like(q_TND)
    start = 0
    for fresh, keys_GSD, values_GSD in _each(store, sequences):
        num_groups, length = keys_GSD.shape[:2]
        q_GRTD = q_TND[start : start + fresh].unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3)
        scores = q_GRTD * scale @ keys_GSD[:, None].mT
        hidden = torch.arange(length) > torch.arange(length - fresh, length)[:, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out_TND[start : start + fresh] = (weights @ values_GSD[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
        start += fresh
    return out_TND


def _each(store: KvPages, sequences: Sequences) -> Iterator[tuple[int, Tensor, Tensor]]:
    """New tokens, keys and values (G, S, D) in float32 of every sequence."""
    _check_pages("attention", store, sequences)
    for fresh, length, pages in zip(
        sequences.fresh_B.tolist(), sequences.lengths_B.tolist(), sequences.pages_BP, strict=True
    ):
        used = pages[: -(-length // store.keys_PGWD.shape[2])].long()
        halves = []
        for tensor, scales in (
            (store.keys_PGWD, store.key_scales_PGW),
            (store.values_PGWD, store.value_scales_PGW),
        ):
            wide = tensor[used].float() if scales is None else tensor[used].float() * scales[used][..., None]
            halves.append(wide.transpose(0, 1).flatten(1, 2)[:, :length])
        yield fresh, halves[0], halves[1]


def _places(operation: str, store: KvPages, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Page and slot of every new token, int64 (T,)."""
    _check_pages(operation, store, sequences)
    slots_per_page = store.keys_PGWD.shape[2]
    pages, slots = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for fresh, length, row in zip(
        sequences.fresh_B.tolist(), sequences.lengths_B.tolist(), sequences.pages_BP, strict=True
    ):
        at = torch.arange(length - fresh, length)
        pages.append(row[at // slots_per_page].long())
        slots.append(at % slots_per_page)
    return torch.cat(pages), torch.cat(slots)


def _check_pages(operation: str, store: KvPages, sequences: Sequences) -> None:
    num_pages, _, slots_per_page, _ = store.keys_PGWD.shape
    for index, (length, pages) in enumerate(zip(sequences.lengths_B.tolist(), sequences.pages_BP, strict=True)):
        needed = -(-length // slots_per_page)
        if needed > len(pages):
            raise ShapeError(
                f"[{operation}] sequence {index}: expected {needed} pages for {length} tokens, got {len(pages)}"
            )
        outside = [page for page in pages[:needed].tolist() if not 0 <= page < num_pages]
        if outside:
            raise ShapeError(
                f"[{operation}] sequence {index}: expected pages from 0 to {num_pages - 1}, got {outside[0]}"
            )


def _check_store(name: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype, strides: tuple[int, ...]) -> None:
    fits = tensor.shape == shape and tensor.dtype == dtype and tensor.device.type == "cpu"
    if not fits or tensor.stride()[-len(strides) :] != strides:
        raise ShapeError(
            f"[KvPages] {name}: expected {dtype} of shape {tuple(shape)} on the CPU, its last strides {strides}, got "
            f"{tensor.dtype}, {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
        )
