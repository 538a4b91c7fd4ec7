"""PEFT's names for what is adapted: which module, and which rows of the network's fused parameter it stands for.

PEFT adapts the network of transformers, which has q_proj, k_proj, v_proj, gate_proj and up_proj where this one has fused
matrices, and stacks routed experts as this one does. `checkpoint/layout.py` knows the first; the second is here.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from ernie45.checkpoint.layout import pt_layout
from ernie45.config.model import ModelConfig

PREFIX = "base_model.model."
"""Before the name of every module in PEFT's files."""
EXPERTS = {"up_gate_proj": "gate_up_proj", "down_proj": "down_proj"}
"""The stacked parameters of routed experts: their names here and in transformers."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A linear module of transformers' network."""

    module: str
    """`model.layers.0.self_attn.q_proj`."""
    target: str
    """The parameter of this network that holds its weight."""
    rows: tuple[int, int]
    """Where in it."""
    columns: int


def pieces_of(config: ModelConfig) -> dict[str, tuple[Piece, ...]]:
    """The modules in each linear parameter of the decoder layers, in the order of their rows."""
    found: dict[str, list[Piece]] = defaultdict(list)
    for stored in pt_layout(config):
        module, _, leaf = stored.name.rpartition(".")
        is_matrix = leaf == "weight" and len(stored.shape) == 2 and module.endswith("_proj")
        if not is_matrix or ".experts." in module or not module.startswith(("model.layers.", "model.mtp_block.")):
            continue
        (part,) = stored.parts
        rows = part.box[0] if part.box else (0, stored.shape[0])
        found[part.target].append(Piece(module=module, target=part.target, rows=rows, columns=stored.shape[1]))
    return {target: tuple(pieces) for target, pieces in found.items()}


def expert_shapes(config: ModelConfig) -> dict[str, dict[str, tuple[int, int, int]]]:
    """The routed experts: shape (E, N, K) of each stacked parameter, by the name of their module and of the parameter here."""
    moe = config.moe
    if moe is None:
        return {}
    num, width, hidden = moe.moe_num_experts, moe.moe_intermediate_size, config.hidden_size
    shapes = {"up_gate_proj": (num, 2 * width, hidden), "down_proj": (num, hidden, width)}
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
    return {f"model.layers.{layer}.mlp.experts": shapes for layer in layers}
