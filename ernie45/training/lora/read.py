"""Make an adapter of a network from files in PEFT's format, which this package or PEFT has written.

Modules that share an A become one block of the fused matrix; modules with an A each become blocks of it.

Shape letters: E experts, R ranks, N rows (outputs), K columns (inputs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ernie45.checkpoint.safetensors import shown
from ernie45.config.model import ModelConfig
from ernie45.errors import CheckpointError
from ernie45.models.text import CausalLM
from ernie45.training.lora.adapter import Adapter, put_adapter
from ernie45.training.lora.adapter_file import MAGNITUDE, A, AdapterFile, B, read_adapter
from ernie45.training.lora.config import LoraConfig
from ernie45.training.lora.low_rank import Block, LowRank
from ernie45.training.lora.names import EXPERTS, Piece, expert_shapes, pieces_of

_INNER = ".base_layer"


def load_adapter(model: CausalLM, folder: str | Path, config: LoraConfig | None = None) -> Adapter:
    """Put a stored adapter into a network, in place, as `put_adapter` does.

    Args: config: dropout for further training; everything else is the file's. None: no dropout.
    Raises: NotFoundError, CheckpointError for an adapter that cannot be read in full or belongs to another network.
    """
    adapter = adapter_from(read_adapter(folder), model.config)
    for lora in adapter.values():
        if config is not None:
            lora.dropout = config.dropout
    put_adapter(model, adapter)
    return adapter


def adapter_from(file: AdapterFile, config: ModelConfig) -> Adapter:
    """The adapter of a file for a network. Raises: CheckpointError if a module is not that network's or has another shape."""
    pieces = {piece.module: (piece, group) for group in pieces_of(config).values() for piece in group}
    stacked = expert_shapes(config)
    left, adapter = dict(file.tensors), Adapter()
    for module, shapes in stacked.items():
        adapter |= _read_experts(file, module, shapes, left)
    while left:
        module = next(iter(left))
        if module not in pieces:
            raise CheckpointError(
                f"{file.folder}: the adapter is on {shown(module)}, which is no linear layer or expert of this network's "
                "decoder layers: it belongs to another network, or adapts more than is supported"
            )
        piece, group = pieces[module]
        found = [(p, left.pop(p.module)) for p in group if p.module in left]
        adapter[piece.target] = _fused(file, group, found)
    return adapter


def _fused(file: AdapterFile, group: Sequence[Piece], found: list[tuple[Piece, Mapping[str, Tensor]]]) -> LowRank:
    """One adapter of a fused matrix from those of its modules."""
    for piece, parts in found:
        _check_shape(file, piece, parts)
    blocks = _blocks(file, found)
    firsts, seconds = [parts[A] for _, parts in found], [parts[B] for _, parts in found]
    rows, columns = group[-1].rows[1], group[0].columns
    alike = len(found) == len(group) and len({block.alpha for block in blocks}) == 1
    if alike and all(torch.equal(first, firsts[0]) for first in firsts):
        lora = LowRank(rows, columns, [replace(blocks[0], rows=(0, rows))])
        _set(lora, firsts[0], torch.cat(seconds))
    else:
        lora = LowRank(rows, columns, blocks)
        up = torch.zeros_like(lora.lora_B)
        for block, second in zip(blocks, seconds, strict=True):
            up[slice(*block.rows), slice(*block.ranks)] = second
        _set(lora, torch.cat(firsts), up)
    if MAGNITUDE in found[0][1]:
        lora.magnitude = _magnitude(file, group, found)
    return lora


def _magnitude(
    file: AdapterFile, group: Sequence[Piece], found: list[tuple[Piece, Mapping[str, Tensor]]]
) -> nn.Parameter:
    if len(found) < len(group):
        missing = sorted({piece.module for piece in group} - {piece.module for piece, _ in found})
        raise CheckpointError(
            f"{file.folder}: DoRA on {found[0][0].module} without {', '.join(missing)}: they are one matrix here, whose rows all "
            "learn their length"
        )
    return nn.Parameter(torch.cat([parts[MAGNITUDE].flatten() for _, parts in found]))


def _blocks(file: AdapterFile, found: list[tuple[Piece, Mapping[str, Tensor]]]) -> list[Block]:
    blocks, rank = [], 0
    for piece, parts in found:
        end = rank + len(parts[A])
        blocks.append(Block(rows=piece.rows, ranks=(rank, end), alpha=file.alpha(piece.module), rslora=file.rslora))
        rank = end
    return blocks


def _read_experts(
    file: AdapterFile, module: str, shapes: Mapping[str, tuple[int, int, int]], left: dict[str, Mapping[str, Tensor]]
) -> Adapter:
    """The adapters of one layer's routed experts, taken out of `left`."""
    outer, inner = left.pop(module, None), left.pop(f"{module}{_INNER}", None)
    named: dict[str, Mapping[str, Tensor]] = {}
    if outer is not None and inner is not None:
        named = {"up_gate_proj": inner, "down_proj": outer}
    elif inner is not None:
        raise CheckpointError(f"{file.folder}: the adapter on {module} has an inner part without the outer one")
    elif outer is not None:
        named = {_only_expert_parameter(file, module, outer, shapes): outer}
    adapter: Adapter = {}
    for parameter, parts in named.items():
        alpha = file.alpha(f"{module}.{EXPERTS[parameter]}")
        adapter[f"{module}.{parameter}"] = _stacked(file, module, parts, shapes[parameter], alpha)
    return adapter


def _only_expert_parameter(
    file: AdapterFile, module: str, parts: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int, int]]
) -> str:
    """Which of the two stacked parameters a single adapter is on; the file's tensors do not say, its configuration does."""
    stated = file.stated.get("target_parameters") or []
    named = {ours for ours, theirs in EXPERTS.items() if any(str(name).endswith(theirs) for name in stated)}
    widths = {parts[A].shape[1], parts[B].shape[0]}
    fitting = [ours for ours in named if widths == set(shapes[ours][1:])]
    if len(fitting) != 1:
        raise CheckpointError(f"{file.folder}: target_parameters do not say what the adapter on {module} belongs to")
    return fitting[0]


def _stacked(
    file: AdapterFile, module: str, parts: Mapping[str, Tensor], shape: tuple[int, int, int], alpha: float
) -> LowRank:
    num, rows, columns = shape
    down, up = parts[A], parts[B]
    rank = len(down) // num
    if rank == 0 or len(down) != rank * num or up.shape[1] != rank * num:
        raise CheckpointError(
            f"{file.folder}: the adapter on {module} has {len(down)} ranks, no multiple of {num} experts"
        )
    down_ERK, up_ENR = down.unflatten(0, (num, rank)), up.unflatten(1, (rank, num)).permute(2, 0, 1)
    if (down.shape[1], up.shape[0]) == (rows, columns) and rows != columns:
        # PEFT before 0.19 took the rows for inputs: its product is the transpose of this one.
        down_ERK, up_ENR = up_ENR.transpose(1, 2), down_ERK.transpose(1, 2)
    if (down_ERK.shape[2], up_ENR.shape[1]) != (columns, rows):
        raise CheckpointError(
            f"{file.folder}: the adapter on {module} maps {down.shape[1]} inputs to {up.shape[0]} outputs, the experts have "
            f"{columns} and {rows}"
        )
    block = Block(rows=(0, rows), ranks=(0, rank), alpha=alpha, rslora=file.rslora)
    lora = LowRank(rows, columns, [block], num_experts=num)
    _set(lora, down_ERK, up_ENR)
    return lora


def _set(lora: LowRank, first: Tensor, second: Tensor) -> None:
    with torch.no_grad():
        lora.lora_A.copy_(first)
        lora.lora_B.copy_(second)


def _check_shape(file: AdapterFile, piece: Piece, parts: Mapping[str, Tensor]) -> None:
    rows, shapes = piece.rows[1] - piece.rows[0], (parts[A].shape[1], parts[B].shape[0])
    magnitude = parts.get(MAGNITUDE)
    if shapes != (piece.columns, rows) or (magnitude is not None and magnitude.numel() != rows):
        raise CheckpointError(
            f"{file.folder}: the adapter on {piece.module} maps {shapes[0]} inputs to {shapes[1]} outputs, this network has "
            f"{piece.columns} and {rows}: it belongs to another network"
        )
