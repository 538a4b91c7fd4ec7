"""Read an adapter in PEFT's format, from this package or from PEFT.

Modules that share an A become one block of the fused matrix; modules with an A each become blocks of it. What an adapter could
change beside linear layers and routed experts is refused, never left out in silence.

Shape letters: E experts, R ranks, N rows (outputs), K columns (inputs).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ernie45.checkpoint.safetensors import parse_json_object, read_header, read_tensor, shown
from ernie45.config.model import ModelConfig
from ernie45.errors import CheckpointError, NotFoundError
from ernie45.models.text import CausalLM
from ernie45.training.lora.adapter import Adapter, put_adapter
from ernie45.training.lora.config import LoraConfig
from ernie45.training.lora.low_rank import Block, LowRank
from ernie45.training.lora.names import EXPERTS, PREFIX, Piece, expert_shapes, pieces_of
from ernie45.training.lora.write import CONFIG_NAME, WEIGHTS_NAME

_MAX_CONFIG_BYTES = 1 << 20
_A, _B, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_KEY = re.compile(rf"{re.escape(PREFIX)}(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
_INNER = ".base_layer"
# Settings that change what the tensors mean, with the value that means what is read here.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "trainable_token_indices": (None, [], {}),
}
# Initialisations that change the base model as well.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """An adapter folder, validated as far as it can be without a network."""

    folder: Path
    stated: Mapping[str, Any]
    """`adapter_config.json`."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """By module (with `.base_layer` where PEFT nests), then `lora_A.weight`, `lora_B.weight`, `lora_magnitude_vector`."""

    @property
    def base(self) -> str | None:
        """Name or path of the network that it belongs to, if the folder says so."""
        base = self.stated.get("base_model_name_or_path")
        return base if isinstance(base, str) and base else None

    @property
    def rslora(self) -> bool:
        """Whether alpha is divided by the root of the rank."""
        return self.stated.get("use_rslora") is True

    def alpha(self, name: str) -> float:
        """Of a module or stacked parameter. Raises: CheckpointError if it is no number above 0."""
        patterns = self.stated.get("alpha_pattern") or {}
        found = [value for pattern, value in patterns.items() if _fits(pattern, name, self.folder)]
        alpha = found[0] if found else self.stated.get("lora_alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e9:
            raise CheckpointError(
                f"{self.folder}: lora_alpha of {name} is {str(alpha)[:40]}, expected a number above 0"
            )
        return float(alpha)


def load_adapter(model: CausalLM, folder: str | Path, config: LoraConfig | None = None) -> Adapter:
    """Put a stored adapter into a network, in place, as `put_adapter` does.

    Args: config: dropout and LoRA+ for further training; everything else is the file's. None: no dropout, plain rates.
    Raises: NotFoundError, CheckpointError for an adapter that cannot be read in full or belongs to another network.
    """
    adapter = adapter_from(read_adapter(folder), model.config)
    for lora in adapter.values():
        if config is not None:
            lora.dropout, lora.lr_scale = config.dropout, config.lora_plus_scale
    put_adapter(model, adapter)
    return adapter


def read_adapter(folder: str | Path) -> AdapterFile:
    """Read both files of a folder. Raises: NotFoundError; CheckpointError for what cannot be read or would be left out."""
    root = Path(folder)
    config = root / CONFIG_NAME
    if not config.is_file() or not (root / WEIGHTS_NAME).is_file():
        raise NotFoundError(f"{root} is no adapter: expected {CONFIG_NAME} and {WEIGHTS_NAME}")
    if config.stat().st_size > _MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"{config}: {config.stat().st_size} bytes, a configuration has at most {_MAX_CONFIG_BYTES}"
        )
    stated = parse_json_object(config.read_bytes(), config)
    _check_config(stated, config)
    tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, entry in read_header(root / WEIGHTS_NAME).entries.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{root}: tensor {shown(name)} is no part of a linear layer's or expert's adapter")
        tensors[match[1]][match[2]] = read_tensor(entry).float()
    for module, parts in tensors.items():
        _check_parts(module, parts, root, dora=stated.get("use_dora") is True)
    return AdapterFile(folder=root, stated=stated, tensors=dict(tensors))


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
    rows = group[-1].rows[1]
    blocks = _blocks(file, found)
    shared = len(found) == len(group) and len({(b.alpha, b.rank) for b in blocks}) == 1
    first_A = found[0][1][_A]
    if shared and all(torch.equal(parts[_A], first_A) for _, parts in found):
        lora = LowRank(rows, first_A.shape[1], [replace(blocks[0], rows=(0, rows))])
        _set(lora.lora_A, first_A)
        _set(lora.lora_B, torch.cat([parts[_B] for _, parts in found]))
    else:
        lora = LowRank(rows, first_A.shape[1], blocks)
        _set(lora.lora_A, torch.cat([parts[_A] for _, parts in found]))
        up = torch.zeros_like(lora.lora_B)
        for block, (_, parts) in zip(blocks, found, strict=True):
            up[slice(*block.rows), slice(*block.ranks)] = parts[_B]
        _set(lora.lora_B, up)
    if _MAGNITUDE in found[0][1]:
        if len(found) < len(group):
            missing = sorted({piece.module for piece in group} - {piece.module for piece, _ in found})
            raise CheckpointError(
                f"{file.folder}: DoRA on {found[0][0].module} without {', '.join(missing)}: they are one here"
            )
        lora.magnitude = nn.Parameter(torch.cat([parts[_MAGNITUDE].flatten() for _, parts in found]))
    return lora


def _blocks(file: AdapterFile, found: list[tuple[Piece, Mapping[str, Tensor]]]) -> list[Block]:
    blocks, rank = [], 0
    for piece, parts in found:
        end = rank + len(parts[_A])
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
    widths = {parts[_A].shape[1], parts[_B].shape[0]}
    fitting = [ours for ours in named if widths == set(shapes[ours][1:])]
    if len(fitting) != 1:
        raise CheckpointError(f"{file.folder}: target_parameters do not say what the adapter on {module} belongs to")
    return fitting[0]


def _stacked(
    file: AdapterFile, module: str, parts: Mapping[str, Tensor], shape: tuple[int, int, int], alpha: float
) -> LowRank:
    num, rows, columns = shape
    down, up = parts[_A], parts[_B]
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
    _set(lora.lora_A, down_ERK)
    _set(lora.lora_B, up_ENR)
    return lora


def _set(parameter: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def _check_config(stated: Mapping[str, Any], where: Path) -> None:
    for name, allowed in _PLAIN.items():
        if stated.get(name, allowed[-1]) not in allowed:
            raise CheckpointError(f"{where}: {name} is {str(stated.get(name))[:60]!r}, only {allowed[0]!r} can be read")
    variants = [name for name, value in stated.items() if name.startswith("use_") and value is True]
    unknown = sorted(set(variants) - {"use_rslora", "use_dora"})
    if unknown:
        raise CheckpointError(f"{where}: {', '.join(unknown)} is set: a kind of adapter that cannot be read")
    start = stated.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{where}: init_lora_weights is {start[:40]!r}, which changed the base model: convert the adapter to plain LoRA "
            "with PEFT (path_initial_model_for_weight_conversion)"
        )


def _check_parts(module: str, parts: Mapping[str, Tensor], root: Path, *, dora: bool) -> None:
    wanted = {_A, _B, _MAGNITUDE} if dora else {_A, _B}
    if parts.keys() != wanted:
        raise CheckpointError(f"{root}: {shown(module)} has {sorted(parts)}, expected {sorted(wanted)}")
    if parts[_A].ndim != 2 or parts[_B].ndim != 2 or parts[_A].shape[0] != parts[_B].shape[1]:
        raise CheckpointError(
            f"{root}: {shown(module)} has A {list(parts[_A].shape)} and B {list(parts[_B].shape)}, expected [r, in] and [out, r]"
        )
    if not all(bool(tensor.isfinite().all()) for tensor in parts.values()):
        raise CheckpointError(f"{root}: the adapter on {shown(module)} holds values that are not finite")


def _check_shape(file: AdapterFile, piece: Piece, parts: Mapping[str, Tensor]) -> None:
    rows, shapes = piece.rows[1] - piece.rows[0], (parts[_A].shape[1], parts[_B].shape[0])
    magnitude = parts.get(_MAGNITUDE)
    if shapes != (piece.columns, rows) or (magnitude is not None and magnitude.numel() != rows):
        raise CheckpointError(
            f"{file.folder}: the adapter on {piece.module} maps {shapes[0]} inputs to {shapes[1]} outputs, this network has "
            f"{piece.columns} and {rows}: it belongs to another network"
        )


def _fits(pattern: str, name: str, folder: Path) -> bool:
    """Whether a key of `alpha_pattern` means this module: PEFT takes it as an expression for the end of the name.

    Only names are understood, with the anchors and escapes that PEFT's own files carry: other expressions are refused.
    """
    plain = pattern.removeprefix("^").removeprefix(".*\\.").removesuffix("$").replace("\\", "")
    if not re.fullmatch(r"[\w.-]+", plain):
        raise CheckpointError(f"{folder}: alpha_pattern {shown(pattern)} is an expression: name the modules instead")
    return name == plain or (not pattern.startswith("^") and name.endswith(f".{plain}"))
