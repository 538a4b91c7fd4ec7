"""Leaves that compute with packed weights, and the one function that puts them into a network.

Activations are float32; the kernels round them to 8 or 16 bits per token and 64 columns. The matrices are plain attributes,
not parameters: they are views of a mapped file that no `to()` or `state_dict()` may touch.

Shape letters: T tokens, N rows, K columns, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from ernie45.errors import CheckpointError
from ernie45.kernels import packed
from ernie45.kernels.packed import ROWS, PackedFfn, PackedMatrix, PackedPool
from ernie45.kernels.router import Routing
from ernie45.layers.ffn import SwiGLU
from ernie45.layers.moe import Experts, MoeBlock
from ernie45.models.text import LmHead

Matrices = tuple[PackedMatrix, ...]
"""The matrix of a parameter, or those of all experts."""


class PackedLinear(nn.Module):
    """`x W^T + bias` with a packed W."""

    def __init__(self, matrix: PackedMatrix, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.matrix, self.bias = matrix, bias

    def forward(self, x_TK: Tensor, residual_TH: Tensor | None = None) -> Tensor:
        """(T, K) -> (T, N), plus `residual_TH` (T, N)."""
        return packed.linear(x_TK.contiguous(), self.matrix, self.bias, residual_TH)


class PackedSwiGLU(nn.Module):
    """A dense feed-forward layer in one call."""

    def __init__(self, unit: PackedFfn) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x_TH: Tensor, residual_TH: Tensor | None = None) -> Tensor:
        """(T, H) -> (T, H), plus `residual_TH`."""
        return packed.ffn(x_TH.contiguous(), (self.unit,), (-1,), residual_TH=residual_TH)


class _Bias(nn.Module):
    """What is left of a linear layer whose matrix is packed elsewhere."""

    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias = bias


class BiasedSwiGLU(nn.Module):
    """A feed-forward layer with bias vectors, which the whole-layer kernel does not know: two products."""

    def __init__(self, unit: PackedFfn, up_gate_bias: nn.Parameter, down_bias: nn.Parameter) -> None:
        super().__init__()
        self.unit = unit
        # Same names as in SwiGLU, so that loading fills them.
        self.up_gate_proj, self.down_proj = _Bias(up_gate_bias), _Bias(down_bias)

    def forward(self, x_TH: Tensor, residual_TH: Tensor | None = None) -> Tensor:
        """(T, H) -> (T, H), plus `residual_TH`."""
        bias = packed.interleave_gate_up(self.up_gate_proj.bias)
        both = packed.linear(x_TH.contiguous(), self.unit.gate_up, bias).unflatten(1, (-1, 2, ROWS))
        inner = (F.silu(both[:, :, 0]) * both[:, :, 1]).flatten(1)[:, : self.unit.down.columns]
        return packed.linear(inner.contiguous(), self.unit.down, self.down_proj.bias, residual_TH)


class PackedExperts(nn.Module):
    """All routed experts of a pool in one call, shared experts alongside."""

    def __init__(self, units: Sequence[PackedFfn], shared: PackedFfn | None = None) -> None:
        super().__init__()
        self.pool = PackedPool(units=tuple(units), shared=shared)

    def forward(self, x_TH: Tensor, routing: Routing, residual_TH: Tensor | None = None) -> Tensor:
        """`residual_TH`, plus the shared experts' output, plus the weighted sum of the chosen experts' in the order of
        their ids; (T, H).
        """
        return packed.ffn_pool(
            x_TH.contiguous(), self.pool, routing.counts_E, routing.tokens, routing.token_weights, residual_TH
        )


class PackedEmbedding(nn.Module):
    """Rows of a packed table. `weight` is what a tied head computes with."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.weight = matrix

    def forward(self, ids: Tensor) -> Tensor:
        """int64 (...,) -> (..., H)."""
        return packed.rows(self.weight, ids.flatten()).unflatten(0, ids.shape)


class PackedLmHead(nn.Module):
    """Logits from a packed matrix: its own, or the embedding's."""

    def __init__(self, matrix: PackedMatrix | None, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.matrix, self.bias = matrix, bias

    def forward(self, normed_TH: Tensor, embedding: PackedMatrix) -> Tensor:
        """(T, H) -> (T, V)."""
        return packed.linear(normed_TH.contiguous(), self.matrix or embedding, self.bias)

    def top(self, normed_TH: Tensor, embedding: PackedMatrix, count: int) -> tuple[Tensor, Tensor]:
        """`LmHead.top` in one pass over the matrix."""
        return packed.top(normed_TH.contiguous(), self.matrix or embedding, count, self.bias)


def swap_leaves(model: nn.Module, tensors: Mapping[str, Matrices]) -> None:
    """Replace every leaf whose weights are given, in place; norms, routers and bias vectors stay as they are.

    Shared experts move into the call of the routed ones: `MoeBlock` then has `shared_experts` None.

    Args: model: a network, usually on the meta device. tensors: packed matrices by parameter name.
    Raises: CheckpointError if a leaf has only some of its weights, or a name fits no leaf.
    """
    swap = _Swap(tensors)
    swap.children(model, "")
    if swap.unused:
        raise CheckpointError(f"packed weights {sorted(swap.unused)[:6]} belong to no leaf of this network")


class _Swap:
    """One walk over a network; keeps the account of what was used."""

    def __init__(self, tensors: Mapping[str, Matrices]) -> None:
        self.tensors, self.unused = tensors, set(tensors)

    def children(self, parent: nn.Module, path: str) -> None:
        for name, child in list(parent.named_children()):
            here = f"{path}{name}"
            leaf = self.leaf(child, here)
            if leaf is None:
                self.children(child, f"{here}.")
            else:
                setattr(parent, name, leaf)
        if isinstance(parent, MoeBlock):
            _join_shared(parent)

    def leaf(self, module: nn.Module, path: str) -> nn.Module | None:
        """What takes the module's place; None if it stays."""
        if isinstance(module, LmHead):
            head = self.take(f"{path}.weight") if module.weight is not None else None
            if head is None and module.weight is not None:
                return None
            return PackedLmHead(None if head is None else head[0], module.bias)
        if isinstance(module, SwiGLU | Experts):
            return self.feed_forward(module, path)
        if isinstance(module, nn.Linear | nn.Embedding) and (matrices := self.take(f"{path}.weight")):
            bias = module.bias if isinstance(module, nn.Linear) else None
            return PackedLinear(matrices[0], bias) if isinstance(module, nn.Linear) else PackedEmbedding(matrices[0])
        return None

    def feed_forward(self, module: SwiGLU | Experts, path: str) -> nn.Module | None:
        end = "" if isinstance(module, Experts) else ".weight"
        gate_up, down = self.take(f"{path}.up_gate_proj{end}"), self.take(f"{path}.down_proj{end}")
        if gate_up is None and down is None:
            return None
        if gate_up is None or down is None:
            raise CheckpointError(f"{path} has only one of its two matrices packed: its layers compute with both")
        units = [PackedFfn(gate_up=g, down=d) for g, d in zip(gate_up, down, strict=True)]
        if isinstance(module, Experts):
            return PackedExperts(units)
        if module.down_proj.bias is not None:
            return BiasedSwiGLU(units[0], module.up_gate_proj.bias, module.down_proj.bias)
        return PackedSwiGLU(units[0])

    def take(self, name: str) -> Matrices | None:
        self.unused.discard(name)
        return self.tensors.get(name)


def _join_shared(block: MoeBlock) -> None:
    """Let shared experts ride in the call of the routed ones: every token is in exactly one pool."""
    pools = [pool for pool in (block.experts, block.vision_experts) if isinstance(pool, PackedExperts)]
    if isinstance(block.shared_experts, PackedSwiGLU) and pools:
        for pool in pools:
            pool.pool = replace(pool.pool, shared=block.shared_experts.unit)
        block.shared_experts = None
