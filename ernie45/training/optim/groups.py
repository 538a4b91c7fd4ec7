"""What a parameter is, told from its name: whether it decays, how fast it learns, which matrices it holds.

Names are those of our networks (`model.layers.3.mlp.experts.up_gate_proj`), with any prefix. Source: training reference 1.5 (the
published matcher named the gate of layer 0 alone, which has none; here every router counts), 1.6 (decay), 3.6 (layer rates, LoRA+).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Size

from ernie45.errors import ConfigError
from ernie45.training.optim.config import OptimizerConfig

_ROUTER = re.compile(r"(?:^|\.)(?:vision_)?gate\.weight$")
_TEXT_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_BEFORE_LAYERS = re.compile(r"(?:^|\.)(?:embed_tokens|vision_model|resampler_model)\.")
_MTP = re.compile(r"(?:^|\.)mtp_\w+\.\d+\.")
_HIDDEN_MATRIX = re.compile(r"(?:^|\.)(?:layers|blocks|mtp_block|mtp_linear_proj)\.\d+\.")
_LORA = re.compile(r"lora_", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """Equal matrices one below the other in a parameter."""

    start_row: int
    count: int
    rows: int
    columns: int


@dataclass(frozen=True, kw_only=True)
class Role:
    """How the optimizer treats a parameter."""

    lr_ratio: float
    """Multiplies the learning rate of the step."""
    weight_decay: float
    matrices: tuple[Matrices, ...]
    """What Muon makes orthogonal, empty for AdamW's parameters."""


def is_router(name: str) -> bool:
    """Whether the parameter is the gate of a mixture, of text or of vision."""
    return _ROUTER.search(name) is not None


def is_lora_b(name: str) -> bool:
    """Whether the parameter is the second factor of an adapter."""
    return name.endswith(("lora_B", "lora_B.weight"))


def is_hidden_matrix(name: str, shape: Size) -> bool:
    """Whether Muon moves the parameter: a matrix, or one per expert, inside the layers.

    Embedding, heads, norms, routers and the factors of adapters are AdamW's.
    """
    if len(shape) not in (2, 3) or not _decays(name, shape) or is_router(name) or _LORA.search(name):
        return False
    return _HIDDEN_MATRIX.search(name) is not None


def role(
    name: str, shape: Size, config: OptimizerConfig, *, num_layers: int, qkv_rows: tuple[int, int, int] | None
) -> Role:
    """The treatment of one parameter. Raises: ConfigError if queries, keys and values shall be split and cannot be."""
    ratio = 1.0
    if is_router(name):
        ratio *= config.gate_lr_ratio
    if is_lora_b(name):
        ratio *= config.lora_plus_scale
    bound = config.layerwise_lr_decay_bound
    ratio *= bound + _depth(name, num_layers) / (num_layers + 2) * (1 - bound)
    is_muon = config.name == "muon" and is_hidden_matrix(name, shape)
    return Role(
        lr_ratio=ratio,
        weight_decay=config.weight_decay if _decays(name, shape) else 0.0,
        matrices=_matrices(name, shape, config, qkv_rows) if is_muon else (),
    )


def check_effect(names: Sequence[str], config: OptimizerConfig) -> None:
    """Raises: ConfigError if an option is set that no parameter of the run answers to."""
    if config.gate_lr_ratio != 1 and not any(map(is_router, names)):
        raise ConfigError(f"gate_lr_ratio is {config.gate_lr_ratio}, but no router is trained: leave it at 1")
    if config.lora_plus_scale != 1 and not any(map(is_lora_b, names)):
        raise ConfigError(f"lora_plus_scale is {config.lora_plus_scale}, but no lora_B is trained: leave it at 1")


def _decays(name: str, shape: Size) -> bool:
    # vectors as well, because some norms of the vision encoder are called `ln` and `3`
    return "bias" not in name and "norm" not in name and len(shape) > 1


def _depth(name: str, num_layers: int) -> int:
    """0 for what comes before the layers, the index inside them, `num_layers` for MTP blocks, two more for what comes after."""
    if _BEFORE_LAYERS.search(name):
        return 0
    layer = _TEXT_LAYER.search(name)
    if layer:
        return int(layer[1])
    return num_layers if _MTP.search(name) else num_layers + 2


def _matrices(
    name: str, shape: Size, config: OptimizerConfig, qkv_rows: tuple[int, int, int] | None
) -> tuple[Matrices, ...]:
    batch, (rows, columns) = (1 if len(shape) == 2 else shape[0]), shape[-2:]
    if "up_gate_proj" in name and config.muon.split_up_gate:
        batch, rows = 2 * batch, rows // 2
    if config.muon.split_qkv and "qkv" in name:
        parts = (
            (rows // 3,) * 3 if "qkv_proj" not in name else qkv_rows
        )  # the vision encoder has as many keys as queries
        if parts is None or sum(parts) != rows:
            raise ConfigError(
                f"{name} has {rows} rows and qkv_rows is {parts}: give the rows of queries, keys and values, "
                "or set muon.split_qkv to false"
            )
        starts = (0, parts[0], parts[0] + parts[1])
        return tuple(
            Matrices(start_row=start, count=1, rows=part, columns=columns)
            for start, part in zip(starts, parts, strict=True)
        )
    return (Matrices(start_row=0, count=batch, rows=rows, columns=columns),)
