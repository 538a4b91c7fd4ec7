"""What the inputs of every matrix look like on a text: second moments, collected layer by layer for GPTQ.

The floating-point network runs one decoder layer at a time over all chunks; between layers only the hidden states are
kept. The peak is one layer in float32, its statistics (inputs squared per matrix, twice that per expert) and the hidden
states. Experts see the tokens that are routed to them; one that sees fewer than its matrix has columns takes the
statistics of all experts of its layer.

Shape letters: C chunks, T tokens per chunk, H hidden, K columns, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernie45.errors import ShapeError
from ernie45.kernels.router import Routing
from ernie45.layers.cache import AttentionView
from ernie45.layers.moe import Experts
from ernie45.layers.rope import rotary_rotation
from ernie45.models.text import DecoderLayer
from ernie45.quant.plan import PackedParameter
from ernie45.quant.weights import Weights

CHUNK_TOKENS = 512
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+?)(?:\.weight)?")


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


@dataclass
class _Moments:
    """Sum of x x^T, per expert where there are experts."""

    sums_EKK: Tensor
    tokens: list[int] = field(default_factory=list)

    def add(self, x_TK: Tensor, expert: int = 0) -> None:
        x_TK = x_TK.float()
        self.sums_EKK[expert].addmm_(x_TK.T, x_TK)
        self.tokens[expert] += len(x_TK)


class Calibrator:
    """Gives the statistics of any matrix of a decoder layer; goes through the layers once, in order."""

    def __init__(self, weights: Weights, calibration: Calibration) -> None:
        self._weights, self._config = weights, weights.config
        chunks = calibration.chunks_CT
        if int(chunks.max()) >= self._config.vocab_size or int(chunks.min()) < 0:
            raise ShapeError(
                f"calibration has token ids up to {int(chunks.max())}, the model knows {self._config.vocab_size}"
            )
        self._chunks = chunks
        self._hidden: list[Tensor] | None = None
        self._next_layer = 0
        self._moments: dict[str, _Moments] = {}

    def hessian(self, parameter: PackedParameter, expert: int = 0) -> Tensor | None:
        """Sum of x x^T over the inputs of a matrix, (K, K); None for what no text token passes through in a decoder
        layer: embedding, head, multi-token prediction, vision experts.
        """
        moments = self._moments_of(parameter)
        if moments is None:
            return None
        if self._falls_back(parameter, moments, expert):
            return moments.sums_EKK.sum(0)
        return moments.sums_EKK[expert]

    def coverage(self, parameter: PackedParameter) -> dict[str, int]:
        """Tokens of the least used matrix, and how many experts fall back to their layer's statistics."""
        moments = self._moments_of(parameter)
        if moments is None:
            return {}
        fallbacks = [e for e in range(parameter.num_matrices) if self._falls_back(parameter, moments, e)]
        return {"least_tokens": min(moments.tokens), "experts_on_layer_statistics": len(fallbacks)}

    def _falls_back(self, parameter: PackedParameter, moments: _Moments, expert: int) -> bool:
        return parameter.experts is not None and moments.tokens[expert] < parameter.columns

    def _moments_of(self, parameter: PackedParameter) -> _Moments | None:
        match = _LAYER.fullmatch(parameter.name)
        if match is None:
            return None
        layer = int(match[1])
        assert layer >= self._next_layer - 1, f"layer {layer} was asked for after layer {self._next_layer - 1}"
        while self._next_layer <= layer:
            self._moments = {}
            self._run_layer(self._watch_matrices if self._next_layer == layer else None)
        moments = self._moments.get(match[2])
        return moments if moments is not None and any(moments.tokens) else None

    @torch.no_grad()
    def norm_outputs(self) -> dict[str, Tensor]:
        """Sum of squares of every column behind every norm of the decoder layers, by the norm's name."""
        found: dict[str, Tensor] = {}

        def watch(layer: DecoderLayer) -> None:
            for name in ("input_layernorm", "post_attention_layernorm"):
                key = f"model.layers.{self._next_layer}.{name}.weight"
                found[key] = torch.zeros(self._config.hidden_size)
                layer.get_submodule(name).register_forward_hook(_norm_hook(found[key]))

        while self._next_layer < self._config.num_hidden_layers:
            self._run_layer(watch)
        return found

    def _watch_matrices(self, layer: DecoderLayer) -> None:
        self._moments = _watch(layer)

    @torch.no_grad()
    def _run_layer(self, watch: Callable[[DecoderLayer], None] | None) -> None:
        layer = self._load_layer(self._next_layer)
        hidden = self._hidden if self._hidden is not None else self._embed()
        if watch is not None:
            watch(layer)
        num_tokens = self._chunks.shape[1]
        view = AttentionView(lengths=(num_tokens,))
        rotation = rotary_rotation(torch.arange(num_tokens), self._config.head_dim, self._config.rope_theta)
        self._hidden = [layer(chunk_TH, rotation, view) for chunk_TH in hidden]
        self._next_layer += 1

    def _load_layer(self, idx: int) -> DecoderLayer:
        with torch.device("meta"):
            layer = DecoderLayer(self._config, idx, torch.float32)
        layer.to_empty(device="cpu")
        for name, tensor in layer.state_dict().items():
            self._weights.fill(tensor, f"model.layers.{idx}.{name}", ())
        return layer.requires_grad_(False).eval()

    def _embed(self) -> list[Tensor]:
        table = torch.empty(self._config.vocab_size, self._config.hidden_size)
        self._weights.fill(table, "model.embed_tokens.weight", ())
        return [F.embedding(chunk_T, table) for chunk_T in self._chunks]


def _watch(layer: DecoderLayer) -> dict[str, _Moments]:
    """Make every matrix of a layer add up its inputs; returns the sums by name, filled while the layer runs."""
    found: dict[str, _Moments] = {}
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = _empty(1, module.in_features)
            module.register_forward_pre_hook(_linear_hook(found[name]))
        elif isinstance(module, Experts):
            num_experts, _, hidden = module.up_gate_proj.shape
            found[f"{name}.up_gate_proj"] = _empty(num_experts, hidden)
            found[f"{name}.down_proj"] = _empty(num_experts, module.down_proj.shape[2])
            hook = _experts_hook(found[f"{name}.up_gate_proj"], found[f"{name}.down_proj"])
            module.register_forward_pre_hook(hook)
    return found


def _empty(num: int, columns: int) -> _Moments:
    return _Moments(sums_EKK=torch.zeros(num, columns, columns), tokens=[0] * num)


def _linear_hook(moments: _Moments) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moments.add(inputs[0])

    return hook


def _norm_hook(squares_K: Tensor) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output_TK: Tensor) -> None:
        squares_K.add_(output_TK.float().square().sum(0))

    return hook


def _experts_hook(up_gate: _Moments, down: _Moments) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, Routing]) -> None:
        assert isinstance(module, Experts), "registered on experts alone"
        x_TH, routing = inputs
        start = 0
        for expert, count in enumerate(routing.counts_E.tolist()):
            if count == 0:
                continue
            x = x_TH[routing.tokens[start : start + count].long()]
            start += count
            up_gate.add(x, expert)
            gate, up = F.linear(x, module.up_gate_proj[expert]).chunk(2, dim=-1)
            down.add(F.silu(gate) * up, expert)

    return hook
