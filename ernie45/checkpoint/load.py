"""Load a network from any checkpoint that can be read, with an account of every tensor.

The network is built on the meta device; each parameter is allocated once and filled from the file, so that the peak is
the final size plus one tensor. Where dtype and order agree, the file's bytes go straight into the parameter.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ernie45.checkpoint.layout import Part, Stored
from ernie45.checkpoint.source import GgufSource, SafetensorsSource, Source, open_source
from ernie45.errors import CapacityError
from ernie45.models.build import build_model, parse_dtype
from ernie45.models.text import CausalLM

_READERS = 4
_HUGE_PAGE, _MADV_HUGEPAGE = 2 << 20, 14  # <linux/mman.h>

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def load_model(
    path: str | Path,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    *,
    progress: Progress | None = None,
) -> CausalLM:
    """Load a checkpoint for inference, in evaluation mode, without gradients.

    Args: path: a -PT, -Paddle or packed folder, or a GGUF file; what Paddle or llama.cpp quantized is dequantized.
            dtype: `float32`, `bfloat16`, `float16`, or `auto` for the dtype that the file holds; packed weights compute
            in float32. device: where the weights go. progress: called with bytes read and bytes in all.
    Returns: the network; its `load_account` says what became of every tensor of the file.
    Raises: NotFoundError, ConfigError, CheckpointError (missing or unexpected tensors, wrong shapes, damaged files),
        CapacityError if the weights do not fit into memory.
    """
    source = open_source(path)
    if not isinstance(source, SafetensorsSource | GgufSource):
        from ernie45.quant.load import load_packed

        return load_packed(source, dtype, device, progress)
    target_dtype = parse_dtype(file_dtype(source) if dtype == "auto" else dtype)
    model = build_model(source.config, dtype=target_dtype, device="meta")
    try:
        model.to_empty(device=device)
    except (RuntimeError, MemoryError) as error:
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        raise CapacityError(
            f"{source.where}: the weights need {size / 2**30:.1f} GiB as {target_dtype} on {device}, more than there "
            "is: use a narrower dtype or a smaller model"
        ) from error
    fill(model, source, progress)
    model.load_account = source.account
    return model.requires_grad_(False).eval()


def file_dtype(source: Source) -> torch.dtype:
    """The dtype of most of a file's values; quantized GGUF files count as float32, odd widths as float32."""
    sizes: dict[torch.dtype, int] = {}
    for stored in source.layout:
        dtype = source.stored_dtype(stored)
        sizes[dtype] = sizes.get(dtype, 0) + torch.Size(stored.shape).numel()
    dtype = max(sizes, key=lambda d: sizes[d])
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


@torch.no_grad()
def fill(model: CausalLM, source: SafetensorsSource | GgufSource, progress: Progress | None = None) -> None:
    """Copy every tensor of `source` into the network.

    What can be read straight into a parameter is read by several threads, because one alone spends its time on fresh
    memory pages; what must be converted or turned goes through one temporary tensor at a time.
    """
    tensors = model.state_dict()
    for tensor in tensors.values():
        _ask_for_huge_pages(tensor)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    done = 0

    def read(stored: Stored) -> int:
        regions = [(part, _region(tensors[part.target], part)) for part in stored.parts]
        if not (isinstance(source, SafetensorsSource) and source.read_straight(stored, regions[0][1])):
            value = source.read(stored)
            for part, region in regions:
                rows = value if part.rows is None else value[part.rows[0] : part.rows[1]]
                region.copy_(rows.reshape(region.shape))
        return sum(region.numel() * region.element_size() for _, region in regions)

    straight: list[Stored] = []
    converted: list[Stored] = []
    for stored in source.layout:
        target = _region(tensors[stored.parts[0].target], stored.parts[0])
        can = isinstance(source, SafetensorsSource) and source.reads_straight(stored, target)
        (straight if can else converted).append(stored)
    with ThreadPoolExecutor(max_workers=min(_READERS, os.cpu_count() or 1)) as readers:
        for size in itertools.chain(readers.map(read, straight), map(read, converted)):
            done += size
            if progress is not None:
                progress(done, total)
    for name in tensors.keys() - {part.target for stored in source.layout for part in stored.parts}:
        source.fill(tensors[name], name, ())


def _ask_for_huge_pages(tensor: Tensor) -> None:
    """Advise Linux to back a large parameter with 2 MiB pages: taking half a million small ones costs more than reading.

    Only advice: where the system has no such call or declines, nothing changes.
    """
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or size < 2 * _HUGE_PAGE or not sys.platform.startswith("linux"):
        return
    start = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    length = (tensor.data_ptr() + size - start) // _HUGE_PAGE * _HUGE_PAGE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)


def _region(tensor: Tensor, part: Part) -> Tensor:
    return tensor[tuple(slice(start, end) for start, end in part.box)]
