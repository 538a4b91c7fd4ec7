"""Full-size checkpoints of seeded random weights, written packed: speed and memory do not depend on the values.

Never holds the unpacked model, and one tensor at a time. Scales are set so that every matrix spreads like an initialised one; routers
are random, so that tokens spread over the experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ernie45 import __version__
from ernie45.checkpoint.atomic import atomic_folder
from ernie45.checkpoint.ggml_types import GGMLType
from ernie45.checkpoint.gguf import GGUFWriter, ValueType, array
from ernie45.checkpoint.gguf_config import config_to_gguf
from ernie45.checkpoint.index import write_sharded
from ernie45.checkpoint.layout import gguf_layout
from ernie45.config.model import ModelConfig
from ernie45.config.reader import config_to_json
from ernie45.kernels.packed import ROWS, PackedFormat
from ernie45.quant.folder import PackedStatement
from ernie45.quant.plan import packing_plan
from ernie45.quant.scheme import Scheme

_SPREAD = 0.02
_SHARD_BYTES = 4 * 10**9
# Spread of uniformly drawn codes: the value a scale of 1 gives them.
_CODE_SPREAD = {4: 4.4, 8: 73.9}


def write_packed(
    config: ModelConfig,
    scheme: Scheme,
    folder: Path,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a packed checkpoint of random weights. Raises: CheckpointError if `folder` exists; CapacityError."""
    plan = packing_plan(config, scheme)
    names = [entry for parameter in plan.packed for entry in parameter.tensors()]
    formats = {name: p.format for p in plan.packed for name, _, _ in p.tensors()}
    names += [(name, torch.float32, shape) for name, shape in plan.plain.items()]
    total = sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in names)
    statement = PackedStatement(
        scheme=scheme, tool=f"ernie45 {__version__}, random weights of seed {seed}", calibration=None
    )
    stated = config_to_json(config, dtype="float32") | {"quantization_config": statement.to_json()}
    generator, done = torch.Generator().manual_seed(seed), 0
    with atomic_folder(folder) as partial:
        with write_sharded(partial, names, max_shard_bytes=_SHARD_BYTES) as writer:
            for name, dtype, shape in names:
                tensor = _drawn(name, dtype, shape, formats.get(name), generator)
                writer.write(name, tensor)
                done += tensor.numel() * dtype.itemsize
                if progress is not None:
                    progress(done, total)
        (partial / "config.json").write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")


def _drawn(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], format: PackedFormat | None, generator: torch.Generator
) -> Tensor:
    if format is not None and dtype == torch.uint8:
        drawn = _random_bytes(torch.Size(shape).numel(), generator).view(shape)
        # The byte 0 stands for -128, which no quantizer writes.
        return drawn.clamp_(min=1) if format.bits == 8 else drawn if format.has_minima else _centred(drawn)
    if format is not None:
        scales = torch.full(shape, _SPREAD / _CODE_SPREAD[format.bits], dtype=torch.float16)
        if format.has_minima:  # 16 scales and 16 minima take turns
            scales.view(-1, 2, ROWS)[:, 1] *= -7.5
        return scales
    if name.endswith("norm.weight") or (".mtp_" in name and "norm" in name):
        return torch.ones(shape)
    return torch.empty(shape).normal_(0, _SPREAD, generator=generator)


def write_gguf(
    config: ModelConfig, path: Path, *, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write the same network with random Q4_0 weights (head and embedding Q6_K, as llama.cpp chooses them) as GGUF."""
    metadata = config_to_gguf(config, name="random weights")
    tokens = [f"<{i}>" for i in range(config.vocab_size)]
    metadata |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": array(ValueType.STRING, tokens),
        "tokenizer.ggml.scores": array(ValueType.FLOAT32, [0.0] * len(tokens)),
        "tokenizer.ggml.token_type": array(ValueType.INT32, [1] * len(tokens)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    plan = []
    for stored in gguf_layout(config, str(metadata["general.architecture"])):
        plain = len(stored.shape) == 1 or stored.keep_float32
        table = stored.name in ("token_embd.weight", "output.weight")
        plan.append((stored.name, GGMLType.F32 if plain else GGMLType.Q6_K if table else GGMLType.Q4_0, stored.shape))
    generator, done = torch.Generator().manual_seed(seed), 0
    sizes = [torch.Size(shape).numel() // kind.block_length * kind.block_bytes for _, kind, shape in plan]
    with GGUFWriter(path, metadata, plan) as writer:
        for (name, kind, shape), size in zip(plan, sizes, strict=True):
            if kind == GGMLType.F32:
                ones = "norm" in name
                writer.write(
                    name, torch.ones(shape) if ones else torch.empty(shape).normal_(0, _SPREAD, generator=generator)
                )
            else:
                writer.write(name, _random_blocks(kind, size, generator))
            done += size
            if progress is not None:
                progress(done, sum(sizes))


def _random_blocks(kind: GGMLType, size: int, generator: torch.Generator) -> Tensor:
    """Random bytes with a sane float16 scale in every block: Q4_0 begins with it, Q6_K ends with it."""
    blocks = _random_bytes(size, generator).view(-1, kind.block_bytes)
    if kind == GGMLType.Q4_0:
        blocks = _centred(blocks)
    scale = torch.tensor(
        [_SPREAD / (_CODE_SPREAD[4] if kind == GGMLType.Q4_0 else 18.5 * 74)], dtype=torch.float16
    ).view(torch.uint8)
    where = slice(0, 2) if kind == GGMLType.Q4_0 else slice(kind.block_bytes - 2, None)
    blocks[:, where] = scale
    return blocks.view(-1)


def _random_bytes(count: int, generator: torch.Generator) -> Tensor:
    lowest = -(1 << 63)
    words = torch.empty(-(-count // 8), dtype=torch.int64).random_(lowest, None, generator=generator)
    return words.view(torch.uint8)[:count]


def _centred(nibbles: Tensor) -> Tensor:
    """Take -8 out of 4-bit codes: with it their mean is below zero, all outputs share a direction and all tokens an expert."""
    nibbles |= ((nibbles & 0x0F) == 0).to(torch.uint8).mul_(0x08)
    nibbles |= ((nibbles & 0xF0) == 0).to(torch.uint8).mul_(0x80)
    return nibbles
