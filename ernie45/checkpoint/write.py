"""Write checkpoints, and convert one into another, one tensor in memory at a time.

Everything is written into a temporary sibling and moved into place at the end: a killed run leaves the old folder or
the new one, never half of either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ernie45.checkpoint.atomic import atomic_folder
from ernie45.checkpoint.ggml_types import GGMLType
from ernie45.checkpoint.gguf import GGUFValue, GGUFWriter
from ernie45.checkpoint.gguf_config import config_to_gguf
from ernie45.checkpoint.index import write_sharded
from ernie45.checkpoint.layout import Stored, gguf_layout, paddle_layout, pt_layout
from ernie45.checkpoint.load import Progress
from ernie45.checkpoint.source import Source
from ernie45.config.reader import config_to_json
from ernie45.errors import CheckpointError
from ernie45.models.build import dtype_name

FolderLayout = Literal["pt", "paddle"]
DEFAULT_SHARD_BYTES = 5 * 10**9

_GGML_TYPES = {torch.float32: GGMLType.F32, torch.float16: GGMLType.F16, torch.bfloat16: GGMLType.BF16}


def write_folder(
    source: Source,
    folder: str | Path,
    *,
    layout: FolderLayout,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a -PT or -Paddle checkpoint.

    Args: source: where the weights come from. layout: names, fusions and orientation. dtype: of all weights but routers
            and correction bias, which stay float32; None keeps each tensor as it is. max_shard_bytes: size of one file.
        extra_files: further files of the folder by name, such as the tokenizer's. overwrite: replace an existing
        folder.
    Raises: CheckpointError if the folder exists and `overwrite` is false; CapacityError when the disk is full.
    """
    stored_list = (paddle_layout if layout == "paddle" else pt_layout)(source.config)
    plan = [(s.name, _dtype_of(source, s, dtype), s.shape) for s in stored_list]
    main_dtype = max((d for _, d, _ in plan), key=lambda d: sum(torch.Size(s).numel() for _, e, s in plan if e == d))
    config = config_to_json(source.config, dtype=dtype_name(main_dtype), layout=layout)
    with atomic_folder(folder, overwrite=overwrite) as partial:
        writer = write_sharded(
            partial,
            plan,
            max_shard_bytes=max_shard_bytes,
            metadata={"format": "np" if layout == "paddle" else "pt"},  # transformers refuses files without this entry
            store_bf16_as_u16=layout == "paddle",
        )
        with writer:
            _copy(source, stored_list, {name: d for name, d, _ in plan}, writer, progress)
        for name, content in ({"config.json": _json_bytes(config)} | dict(extra_files or {})).items():
            (partial / name).write_bytes(content)


def write_gguf(
    source: Source,
    path: str | Path,
    *,
    name: str,
    dtype: torch.dtype | None = None,
    vocabulary: Mapping[str, GGUFValue] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Write a GGUF file for llama.cpp: matrices in `dtype`, vectors, routers and correction bias in float32.

    Args: name: `general.name`. dtype: None keeps each matrix as it is. vocabulary: the tokenizer's metadata.
    Returns: what could not be taken along, in words. Raises: CheckpointError for a network that the format cannot hold.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists: choose another name or allow overwriting")
    metadata = config_to_gguf(source.config, name=name) | dict(vocabulary or {})
    stored_list = gguf_layout(source.config, str(metadata["general.architecture"]))
    dtypes = {
        s.name: torch.float32 if len(s.shape) == 1 or s.keep_float32 else _dtype_of(source, s, dtype)
        for s in stored_list
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with GGUFWriter(path, metadata, [(s.name, _GGML_TYPES[dtypes[s.name]], s.shape) for s in stored_list]) as writer:
        _copy(source, stored_list, dtypes, writer, progress)
    dropped = source.config.num_nextn_predict_layers
    return [f"{dropped} multi-token prediction block: llama.cpp has no such tensors"] if dropped else []


def read_stored(source: Source, stored: Stored, dtype: torch.dtype) -> Tensor:
    """One tensor of a layout, assembled from whatever the source holds, contiguous, in the stored orientation."""
    out = None
    rows: list[Tensor] = []
    for part in stored.parts:
        shape = source.region_shape(part.target, part.box)
        out = torch.empty(shape, dtype=dtype)
        source.fill(out, part.target, part.box)
        rows.append(out)
    value = rows[0] if len(rows) == 1 else torch.stack(rows)
    value = value.reshape(stored.shape[::-1] if stored.transposed else stored.shape)
    return value.T.contiguous() if stored.transposed else value


def _dtype_of(source: Source, stored: Stored, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return torch.float32 if stored.keep_float32 else dtype
    return source.region_dtype(stored.parts[0].target, stored.parts[0].box)


def _copy(
    source: Source, layout: list[Stored], dtypes: Mapping[str, torch.dtype], writer: Any, progress: Progress | None
) -> None:
    total = sum(torch.Size(s.shape).numel() * dtypes[s.name].itemsize for s in layout)
    done = 0
    for stored in layout:
        value = read_stored(source, stored, dtypes[stored.name])
        writer.write(stored.name, value)
        done += value.numel() * value.element_size()
        if progress is not None:
            progress(done, total)


def _json_bytes(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
