"""Write an adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

A fused matrix falls apart into transformers' modules: their B are rows of ours, their A are ours, each a copy. Routed experts are
PEFT's stacked parameters: A (E R, K), and B (N, R E) with the experts innermost, on wrappers nested in a fixed order.

Source: PEFT 0.19, `ParamWrapper` and `LoraConfig`; tests load what is written there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ernie45.checkpoint.atomic import atomic_folder
from ernie45.checkpoint.safetensors import write_tensors
from ernie45.config.model import ModelConfig
from ernie45.errors import CheckpointError
from ernie45.training.lora.adapter import Adapter
from ernie45.training.lora.low_rank import Block, LowRank
from ernie45.training.lora.names import EXPERTS, PREFIX, pieces_of

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


@dataclass(kw_only=True)
class _Content:
    """What the two files will say."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, Block] = field(default_factory=dict)
    """Adapted linear modules."""
    parameters: dict[str, Block] = field(default_factory=dict)
    """Adapted stacked parameters."""


def save_adapter(
    adapter: Adapter,
    config: ModelConfig,
    folder: str | Path,
    *,
    base: str | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Write an adapter in PEFT's format; reading it back gives the same values and the same blocks.

    Args: config: of the network that it belongs to. base: name or path of that network, for whoever loads the adapter.
        extra_files: further files by name.
    Returns: what PEFT will not take from the folder, in words; this package reads all of it.
    Raises: CheckpointError if the folder exists and `overwrite` is false, or if the adapter is empty or cannot be told in one
        configuration; CapacityError when the disk is full.
    """
    if not adapter:
        raise CheckpointError("there is no adapter to write: the network has none")
    content = _content(adapter, config)
    stated = _config_json(adapter, content, config, base)
    with atomic_folder(folder, overwrite=overwrite) as partial:
        write_tensors(partial / WEIGHTS_NAME, content.tensors, metadata={"format": "pt"})
        files = {CONFIG_NAME: (json.dumps(stated, indent=2) + "\n").encode()} | dict(extra_files or {})
        for name, data in files.items():
            (partial / name).write_bytes(data)
    return tuple(_notes(adapter, config))


def _content(adapter: Adapter, config: ModelConfig) -> _Content:
    content, pieces = _Content(), pieces_of(config)
    for target, lora in adapter.items():
        if lora.num_experts is not None:
            _add_experts(content, target, lora, adapter)
            continue
        if target not in pieces:
            raise CheckpointError(f"{target} has an adapter, but the configuration knows no such matrix")
        for piece in pieces[target]:
            block = _block_of(lora, piece.rows)
            if block is not None:
                _add_piece(content, piece.module, lora, block, piece.rows)
    return content


def _block_of(lora: LowRank, rows: tuple[int, int]) -> Block | None:
    """The block that writes these rows; None if none does."""
    return next((b for b in lora.blocks if b.rows[0] <= rows[0] and rows[1] <= b.rows[1]), None)


def _add_piece(content: _Content, module: str, lora: LowRank, block: Block, rows: tuple[int, int]) -> None:
    ranks = slice(*block.ranks)
    name = f"{PREFIX}{module}"
    content.tensors[f"{name}.lora_A.weight"] = lora.lora_A.detach()[ranks]
    content.tensors[f"{name}.lora_B.weight"] = lora.lora_B.detach()[slice(*rows), ranks]
    if lora.magnitude is not None:
        content.tensors[f"{name}.lora_magnitude_vector"] = lora.magnitude.detach()[slice(*rows)]
    content.modules[module] = block


def _add_experts(content: _Content, target: str, lora: LowRank, adapter: Adapter) -> None:
    module, _, parameter = target.rpartition(".")
    # PEFT wraps one parameter after the other: where both have an adapter, the first lies inside the second.
    inner = parameter == "up_gate_proj" and f"{module}.down_proj" in adapter
    name = f"{PREFIX}{module}{'.base_layer' if inner else ''}"
    content.tensors[f"{name}.lora_A.weight"] = lora.lora_A.detach().flatten(0, 1)
    content.tensors[f"{name}.lora_B.weight"] = lora.lora_B.detach().permute(1, 2, 0).flatten(1)
    content.parameters[f"{module}.{EXPERTS[parameter]}"] = lora.blocks[0]


def _config_json(adapter: Adapter, content: _Content, config: ModelConfig, base: str | None) -> dict[str, Any]:
    blocks = content.modules | content.parameters
    kinds = {block.rslora for block in blocks.values()}
    dora = {lora.magnitude is not None for lora in adapter.values()}
    if len(kinds) > 1 or len(dora) > 1:
        raise CheckpointError(
            "parts of the adapter differ in rslora or dora: PEFT's configuration holds one of each for all"
        )
    rank = Counter(block.rank for block in blocks.values()).most_common(1)[0][0]
    alpha = Counter(block.alpha for block in blocks.values()).most_common(1)[0][0]
    modules, weights = _how_to_target(content, config)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "use_rslora": kinds.pop(),
        "use_dora": dora.pop(),
        # PEFT refuses dropout on stacked parameters, and no loaded adapter needs it.
        "lora_dropout": 0.0 if content.parameters else max(lora.dropout for lora in adapter.values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": modules,
        "target_parameters": [*weights, *content.parameters] or None,
        "rank_pattern": {name: b.rank for name, b in blocks.items() if b.rank != rank},
        "alpha_pattern": {name: _number(b.alpha) for name, b in blocks.items() if b.alpha != alpha},
    }


def _how_to_target(content: _Content, config: ModelConfig) -> tuple[list[str], list[str]]:
    """Modules that PEFT shall wrap, and weights of modules.

    In a mixture of experts, PEFT reads gate_proj, up_proj and down_proj among the modules as the routed experts of older
    releases. Dense layers and shared experts are named by their weight instead, which gives the same tensors.
    """
    feed_forward = [name for name in content.modules if config.moe is not None and ".mlp." in name]
    return [name for name in content.modules if name not in feed_forward], [f"{name}.weight" for name in feed_forward]


def _notes(adapter: Adapter, config: ModelConfig) -> Iterator[str]:
    if any(name.startswith("model.mtp_block.") for name in adapter):
        yield "the multi-token prediction block: transformers has none"
    dora = any(lora.magnitude is not None for lora in adapter.values())
    if dora and config.moe is not None and any(".mlp." in name for name in adapter):
        yield "DoRA on the feed-forward layers of a mixture of experts: PEFT refuses to load the adapter"


def _number(value: float) -> float | int:
    """Whole numbers as such: PEFT states alpha as an integer."""
    return int(value) if value == int(value) else value
