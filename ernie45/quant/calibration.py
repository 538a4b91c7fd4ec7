"""Steering the rounding by a text: what every matrix sees of it, layer by layer, behind layers that are rounded already.

Two copies of the text run through each decoder layer side by side: one with the weights as they are, one with rounded
weights. Every matrix is rounded when the text reaches it, with the second moments of what the rounded network feeds it and
the shift from there to what the network as it was would feed it; then the rounded copy goes on with the rounded matrix.
Experts are rounded for the tokens that are routed to them in the rounded network; one that sees fewer than its matrix has
columns takes the statistics of all experts of its layer. The peak is one layer in float32, the statistics of one matrix
(inputs squared, a few times), and the hidden states.

Shape letters: C chunks, T tokens (packed), H hidden, K columns, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernie45.errors import ShapeError
from ernie45.kernels.router import Routing, order_by_expert
from ernie45.layers.attention import AttentionCore
from ernie45.layers.cache import AttentionView
from ernie45.layers.ffn import SwiGLU
from ernie45.layers.linear import add_residual
from ernie45.layers.moe import Experts
from ernie45.layers.rope import rotary_rotation
from ernie45.models.text import DecoderLayer
from ernie45.quant.weights import Weights

CHUNK_TOKENS = 512
_NORM_CHUNKS = 16  # enough for one figure per column
_ROWS = 4096  # tokens of a feed-forward layer at once: its width is several times that of the hidden states


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Text to take statistics from."""

    chunks_CT: Tensor
    """Token ids, int64, at least one chunk."""
    origin: Mapping[str, Any]
    """Where the text came from, as the checkpoint will state it."""

    def __post_init__(self) -> None:
        if self.chunks_CT.ndim != 2 or not self.chunks_CT.numel() or self.chunks_CT.dtype != torch.int64:
            raise ShapeError(
                f"calibration has {self.chunks_CT.dtype} {tuple(self.chunks_CT.shape)}, expected int64 (C, T)"
            )


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a matrix sees of the text."""

    moments_KK: Tensor
    """Sum of x x^T, x the inputs in the rounded network."""
    shift_KK: Tensor | None
    """Sum of (x' - x) x^T, x' the inputs in the network as it was; None for routed experts: too few tokens to fit it."""
    tokens: int
    of_layer: bool = False
    """Too few tokens: the moments are those of all experts of the layer."""


class Rounder(Protocol):
    """Rounds the matrices that the text reaches."""

    def rounded(self, name: str, inputs: Iterator[Inputs]) -> Iterator[Tensor] | None:
        """The rounded matrices of a parameter, float32 (N, K), one after the other; None if it keeps its values.

        Args: inputs: of each of them, made when asked for.
        """
        ...


@torch.no_grad()
def calibrate(weights: Weights, calibration: Calibration, rounder: Rounder, num_layers: int) -> None:
    """Give the rounder every matrix of the first `num_layers` decoder layers that text passes through, in order."""
    num_chunks, chunk_tokens = _check(weights, calibration).shape
    config = weights.config
    view = AttentionView(lengths=(chunk_tokens,) * (2 * num_chunks))
    rotation_TJ = rotary_rotation(torch.arange(chunk_tokens), config.head_dim, config.rope_theta)
    rotation_TJ = rotation_TJ.repeat(2 * num_chunks, 1)
    hidden_TH = _embed(weights, calibration.chunks_CT).flatten(0, 1).repeat(2, 1)
    for idx in range(num_layers):
        # No name for the layer: the next one is loaded when it is gone.
        hidden_TH = _rounding_layer(weights, idx, rounder)(hidden_TH, rotation_TJ, view)


@torch.no_grad()
def norm_outputs(weights: Weights, calibration: Calibration) -> dict[str, Tensor]:
    """Sum of squares of every column behind every norm of the decoder layers, by the norm's name; nothing is rounded."""
    chunks_CT = _check(weights, calibration)[:_NORM_CHUNKS]
    config, num_tokens = weights.config, chunks_CT.shape[1]
    found: dict[str, Tensor] = {}
    view = AttentionView(lengths=(num_tokens,))
    rotation_TJ = rotary_rotation(torch.arange(num_tokens), config.head_dim, config.rope_theta)
    hidden = list(_embed(weights, chunks_CT))
    for idx in range(config.num_hidden_layers):
        layer = _load_layer(weights, idx)
        for name in ("input_layernorm", "post_attention_layernorm"):
            key = f"model.layers.{idx}.{name}.weight"
            found[key] = torch.zeros(config.hidden_size)
            layer.get_submodule(name).register_forward_hook(_norm_hook(found[key]))
        hidden = [layer(chunk_TH, rotation_TJ, view) for chunk_TH in hidden]
    return found


def _check(weights: Weights, calibration: Calibration) -> Tensor:
    chunks_CT, vocab_size = calibration.chunks_CT, weights.config.vocab_size
    if int(chunks_CT.max()) >= vocab_size or int(chunks_CT.min()) < 0:
        raise ShapeError(f"calibration has token ids up to {int(chunks_CT.max())}, the model knows {vocab_size}")
    return chunks_CT


def _embed(weights: Weights, chunks_CT: Tensor) -> Tensor:
    table = torch.empty(weights.config.vocab_size, weights.config.hidden_size)
    weights.fill(table, "model.embed_tokens.weight", ())
    return F.embedding(chunks_CT, table)


def _load_layer(weights: Weights, idx: int) -> DecoderLayer:
    with torch.device("meta"):
        layer = DecoderLayer(weights.config, idx, torch.float32)
    layer.to_empty(device="cpu")
    for name, tensor in layer.state_dict().items():
        weights.fill(tensor, f"model.layers.{idx}.{name}", ())
    return layer.requires_grad_(False).eval()


def _norm_hook(squares_K: Tensor) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output_TK: Tensor) -> None:
        squares_K.add_(output_TK.float().square().sum(0))

    return hook


def _rounding_layer(weights: Weights, idx: int, rounder: Rounder) -> DecoderLayer:
    """A layer whose leaves take both copies of the text, first the one of the network as it was."""
    layer, path = _load_layer(weights, idx), f"model.layers.{idx}"
    leaves: dict[str, nn.Module] = {"self_attn.core": _CoreByChunk(layer.self_attn.core)}
    for name, module in layer.named_modules():
        if name in ("self_attn.qkv_proj", "self_attn.o_proj") and isinstance(module, nn.Linear):
            leaves[name] = _RoundedLinear(module, f"{path}.{name}.weight", rounder)
        elif isinstance(module, SwiGLU):
            leaves[name] = _RoundedSwiGLU(module, f"{path}.{name}", rounder)
        elif isinstance(module, Experts):
            leaves[name] = _RoundedExperts(module, f"{path}.{name}", rounder)
    for name, leaf in leaves.items():
        layer.set_submodule(name, leaf)
    return layer


class _CoreByChunk(nn.Module):
    """An attention core that takes one chunk after the other: rotated copies of all of them would take much memory."""

    def __init__(self, core: AttentionCore) -> None:
        super().__init__()
        self._core = core

    def forward(self, qkv_TX: Tensor, rotation_TJ: Tensor, view: AttentionView) -> Tensor:
        parts = zip(qkv_TX.split(view.lengths), rotation_TJ.split(view.lengths), view.lengths, strict=True)
        return torch.cat([self._core(qkv, rotation, AttentionView(lengths=(n,))) for qkv, rotation, n in parts])


class _RoundedLinear(nn.Module):
    """A matrix that is rounded when the text reaches it."""

    def __init__(self, linear: nn.Linear, name: str, rounder: Rounder) -> None:
        super().__init__()
        self._linear, self._name, self._rounder = linear, name, rounder

    def forward(self, x_TK: Tensor, residual_TH: Tensor | None = None) -> Tensor:
        float_TK, rounded_TK = x_TK.chunk(2)
        float_TN = self._linear(float_TK)
        _replace(self._linear, self._rounder.rounded(self._name, _inputs(x_TK.shape[1], [(float_TK, rounded_TK)])))
        return add_residual(torch.cat((float_TN, self._linear(rounded_TK))), residual_TH)


class _RoundedSwiGLU(nn.Module):
    """A feed-forward layer whose matrices are rounded one after the other."""

    def __init__(self, ffn: SwiGLU, path: str, rounder: Rounder) -> None:
        super().__init__()
        self._ffn, self._path, self._rounder = ffn, path, rounder

    def forward(self, x_TH: Tensor, residual_TH: Tensor | None = None) -> Tensor:
        ffn, float_up_gate = self._ffn, deepcopy(self._ffn.up_gate_proj)
        float_TH, rounded_TH = x_TH.chunk(2)
        float_out_TH = _by_rows(ffn, float_TH)
        inputs = _inputs(x_TH.shape[1], zip(float_TH.split(_ROWS), rounded_TH.split(_ROWS), strict=True))
        _replace(ffn.up_gate_proj, self._rounder.rounded(f"{self._path}.up_gate_proj.weight", inputs))
        inputs = _inputs(
            ffn.down_proj.in_features,
            (
                (_gated(float_up_gate(float_rows)), _gated(ffn.up_gate_proj(rows)))
                for float_rows, rows in zip(float_TH.split(_ROWS), rounded_TH.split(_ROWS), strict=True)
            ),
        )
        _replace(ffn.down_proj, self._rounder.rounded(f"{self._path}.down_proj.weight", inputs))
        return add_residual(torch.cat((float_out_TH, _by_rows(ffn, rounded_TH))), residual_TH)


class _RoundedExperts(nn.Module):
    """Experts of which each is rounded for the tokens that the rounded network routes to it."""

    def __init__(self, experts: Experts, path: str, rounder: Rounder) -> None:
        super().__init__()
        self._experts, self._path, self._rounder = experts, path, rounder

    def forward(self, x_TH: Tensor, routing: Routing, residual_TH: Tensor | None = None) -> Tensor:
        experts, (float_TH, rounded_TH) = self._experts, x_TH.chunk(2)
        routings = [
            order_by_expert(weights, ids, len(experts.down_proj))
            for weights, ids in zip(routing.weights_TK.chunk(2), routing.ids_TK.chunk(2), strict=True)
        ]
        float_out_TH = experts(float_TH, routings[0])
        rows = [rows.long() for rows in routings[1].tokens.split(routings[1].counts_E.tolist())]
        for name, inputs_of in (("up_gate_proj", self._up_gate_inputs), ("down_proj", self._down_inputs)):
            inputs = _expert_inputs(experts.get_parameter(name).shape[2], rows, partial(inputs_of, rounded_TH))
            matrices = self._rounder.rounded(f"{self._path}.{name}", inputs)
            for weight_NK, matrix_NK in zip(experts.get_parameter(name), matrices or (), strict=False):
                weight_NK.copy_(matrix_NK)
        return add_residual(torch.cat((float_out_TH, experts(rounded_TH, routings[1]))), residual_TH)

    def _up_gate_inputs(self, x_TH: Tensor, expert: int, rows: Tensor) -> Tensor:
        return x_TH[rows]

    def _down_inputs(self, x_TH: Tensor, expert: int, rows: Tensor) -> Tensor:
        return _gated(F.linear(x_TH[rows], self._experts.up_gate_proj[expert]))


def _inputs(columns: int, pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Inputs]:
    """Of a single matrix, from pieces of its inputs in the network as it was and in the rounded one."""
    moments_KK, shift_KK, tokens = torch.zeros(columns, columns), torch.zeros(columns, columns), 0
    for float_TK, rounded_TK in pairs:
        moments_KK.addmm_(rounded_TK.T, rounded_TK)
        shift_KK.addmm_((float_TK - rounded_TK).T, rounded_TK)
        tokens += len(rounded_TK)
    yield Inputs(moments_KK=moments_KK, shift_KK=shift_KK, tokens=tokens)


def _expert_inputs(columns: int, rows: list[Tensor], inputs_of: Callable[[int, Tensor], Tensor]) -> Iterator[Inputs]:
    """Of one expert after the other. Args: rows: its tokens. inputs_of: what its matrix makes of them."""
    layer_KK = torch.zeros(columns, columns)
    if any(len(r) < columns for r in rows):
        for expert, r in enumerate(rows):
            x = inputs_of(expert, r)
            layer_KK.addmm_(x.T, x)
    for expert, r in enumerate(rows):
        few = len(r) < columns
        x = inputs_of(expert, r)
        yield Inputs(moments_KK=layer_KK if few else x.T @ x, shift_KK=None, tokens=len(r), of_layer=few)


def _gated(up_gate_TI: Tensor) -> Tensor:
    gate, up = up_gate_TI.chunk(2, dim=-1)
    return F.silu(gate) * up


def _by_rows(module: nn.Module, x_TH: Tensor) -> Tensor:
    return torch.cat([module(rows) for rows in x_TH.split(_ROWS)])


def _replace(linear: nn.Linear, matrices: Iterator[Tensor] | None) -> None:
    for matrix_NK in matrices or ():
        linear.weight.copy_(matrix_NK)
