"""Packed networks as a frozen base: every product restores its matrix, and gradients flow through it to the input.

The packed leaves that serve know no gradient. `restore_leaves` brings a packed network into a form that trains: norms, routers
and attention in plain PyTorch, embedding and head restored (they take as much memory as in a float32 model), and every other
matrix packed as before. Such a matrix is restored for each product and forgotten again, also for the gradient, so a layer
never costs more than one matrix in float32. Activations are not rounded as the serving kernels round them.

Shape letters: T tokens, N rows (outputs), K columns (inputs), H hidden, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ernie45.kernels.packed import PackedFfn, PackedMatrix, dequantize
from ernie45.layers.attention import AttentionCore
from ernie45.layers.ffn import SwiGLU
from ernie45.layers.linear import Linear, add_residual
from ernie45.layers.moe import Experts, MoeBlock, Router
from ernie45.layers.native import KernelAttentionCore, KernelRMSNorm, KernelRouter
from ernie45.layers.norm import RMSNorm
from ernie45.models.text import CausalLM, LmHead
from ernie45.quant.layers import BiasedSwiGLU, PackedEmbedding, PackedExperts, PackedLinear, PackedLmHead, PackedSwiGLU
from ernie45.quant.plan import deinterleave_gate_up
from ernie45.training.lora.experts import AdaptedExperts
from ernie45.training.lora.linear import LoraLinear
from ernie45.training.lora.low_rank import LowRank


class _Product(torch.autograd.Function):
    """`x W^T` with a matrix that is made when it is needed."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, restore: Callable[[], Tensor]) -> Tensor:
        ctx.restore, ctx.dtype = restore, x_TK.dtype
        return x_TK @ restore().T

    @staticmethod
    def backward(ctx: Any, gradient_TN: Tensor) -> tuple[Tensor, None]:
        # Under autocast the gradient is narrower than the matrix.
        return (gradient_TN.float() @ ctx.restore()).to(ctx.dtype), None


class FrozenMatrix:
    """A packed matrix in the network's order of rows."""

    def __init__(self, matrix: PackedMatrix, *, interleaved_rows: int | None = None) -> None:
        """Args: interleaved_rows: of gate and up together, if the matrix holds them in alternating blocks."""
        self._matrix, self._interleaved_rows = matrix, interleaved_rows
        self.rows, self.columns = interleaved_rows or matrix.rows, matrix.columns

    def restore(self) -> Tensor:
        """The matrix in float32, (N, K)."""
        weights = dequantize(self._matrix)
        rows = self._interleaved_rows
        return weights if rows is None else deinterleave_gate_up(weights, rows)

    def product(self, x_TK: Tensor) -> Tensor:
        """`x W^T`, with a gradient for x alone."""
        out: Tensor = _Product.apply(x_TK, self.restore)  # type: ignore[no-untyped-call]  # torch's
        return out


class FrozenPackedLinear(nn.Module):
    """`x W^T + bias` with a packed W."""

    def __init__(self, matrix: FrozenMatrix, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.matrix, self.bias = matrix, bias

    def forward(self, x_TK: Tensor, residual_TH: Tensor | None = None) -> Tensor:
        """(T, K) -> (T, N), plus `residual_TH`."""
        y_TN = self.matrix.product(x_TK)
        return add_residual(y_TN if self.bias is None else y_TN + self.bias, residual_TH)


class PackedLoraLinear(LoraLinear):
    """An adapter beside a packed matrix."""

    def __init__(self, plain: FrozenPackedLinear, lora: LowRank) -> None:
        nn.Module.__init__(self)
        self.bias, self.matrix, self.lora = plain.bias, plain.matrix, lora
        self.enabled = True

    def product(self, x_TK: Tensor) -> Tensor:
        y_TN = self.matrix.product(x_TK)
        return y_TN if self.bias is None else y_TN + self.bias

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A float32 layer: the sum does not fit the packed grid any more."""
        dense = Linear(self.matrix.columns, self.matrix.rows, bias=False)
        dense.weight.copy_(self.lora.merged(self.matrix.restore()))
        dense.register_parameter("bias", self.bias)
        return dense.requires_grad_(False)


class PackedLoraExperts(AdaptedExperts):
    """Experts whose matrices are packed, with adapters or without."""

    def __init__(
        self, matrices: Sequence[tuple[FrozenMatrix, FrozenMatrix]], up_gate: LowRank | None, down: LowRank | None
    ) -> None:
        """Args: matrices: up_gate_proj and down_proj of each expert."""
        super().__init__(up_gate, down)
        self.matrices = tuple(matrices)

    def up_gate_product(self, x_TH: Tensor, expert: int) -> Tensor:
        return self.matrices[expert][0].product(x_TH)

    def down_product(self, inner_TI: Tensor, expert: int) -> Tensor:
        return self.matrices[expert][1].product(inner_TI)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Experts in float32."""
        down = self.matrices[0][1]
        dense = Experts(len(self.matrices), down.rows, down.columns, torch.float32)
        for expert, pair in enumerate(self.matrices):
            for weight_ENK, lora, matrix in (
                (dense.up_gate_proj, self.up_gate_lora, pair[0]),
                (dense.down_proj, self.down_lora, pair[1]),
            ):
                weight_NK = matrix.restore()
                weight_ENK[expert] = weight_NK if lora is None else lora.merged(weight_NK, expert=expert)
        return dense.requires_grad_(False)


def restore_leaves(model: CausalLM) -> None:
    """Put leaves that gradients pass through in place of those that serve; other leaves stay as they are."""
    embedding = model.model.embed_tokens
    for parent in list(model.modules()):
        if isinstance(parent, MoeBlock):
            _part_shared_experts(parent)
        for name, child in list(parent.named_children()):
            leaf = _trainable(model, child)
            if leaf is not None:
                setattr(parent, name, leaf)
    if isinstance(embedding, PackedEmbedding):
        model.model.embed_tokens = nn.Embedding.from_pretrained(dequantize(embedding.weight), freeze=True)


def _trainable(model: CausalLM, leaf: nn.Module) -> nn.Module | None:
    """What takes a leaf's place; None if it stays."""
    make = _MAKERS.get(type(leaf))
    return None if make is None else make(model, leaf)


def _part_shared_experts(block: MoeBlock) -> None:
    """Shared experts ride in the packed call of the routed ones; they get their own leaf back."""
    experts: nn.Module = block.experts
    if isinstance(experts, PackedExperts) and experts.pool.shared is not None:
        block.shared_experts = _swiglu(experts.pool.shared, None, None)


def _matrices(unit: PackedFfn) -> tuple[FrozenMatrix, FrozenMatrix]:
    return FrozenMatrix(unit.gate_up, interleaved_rows=2 * unit.down.columns), FrozenMatrix(unit.down)


def _swiglu(unit: PackedFfn, up_gate_bias: nn.Parameter | None, down_bias: nn.Parameter | None) -> SwiGLU:
    up_gate, down = _matrices(unit)
    with torch.device("meta"):  # its own matrices are never used
        block = SwiGLU(down.rows, down.columns, bias=False, dtype=torch.float32)
    setattr(block, "up_gate_proj", FrozenPackedLinear(up_gate, up_gate_bias))  # noqa: B010  # other type of leaf
    setattr(block, "down_proj", FrozenPackedLinear(down, down_bias))  # noqa: B010
    return block


def _plain_router(model: CausalLM, leaf: KernelRouter) -> Router:
    assert model.config.moe is not None, "only a mixture of experts has routers"
    router = Router(leaf.weight.shape[1], model.config.moe)
    router.weight = leaf.weight
    router.e_score_correction_bias = leaf.e_score_correction_bias
    return router


def _plain_head(model: CausalLM, leaf: PackedLmHead) -> LmHead:
    with torch.device("meta"):
        head = LmHead(model.config, torch.float32)
    if leaf.matrix is not None:
        head.weight = nn.Parameter(dequantize(leaf.matrix), requires_grad=False)
    head.bias = leaf.bias
    return head


def _plain_norm(model: CausalLM, leaf: KernelRMSNorm) -> RMSNorm:
    norm = RMSNorm(1, leaf.eps, torch.float32)
    norm.weight = leaf.weight
    return norm


_MAKERS: dict[type[nn.Module], Callable[[CausalLM, Any], nn.Module]] = {
    KernelRMSNorm: _plain_norm,
    KernelAttentionCore: lambda model, leaf: AttentionCore(model.config, leaf.layer_idx),
    KernelRouter: _plain_router,
    PackedLmHead: _plain_head,
    PackedLinear: lambda _, leaf: FrozenPackedLinear(FrozenMatrix(leaf.matrix), leaf.bias),
    PackedSwiGLU: lambda _, leaf: _swiglu(leaf.unit, None, None),
    BiasedSwiGLU: lambda _, leaf: _swiglu(leaf.unit, leaf.up_gate_proj.bias, leaf.down_proj.bias),
    PackedExperts: lambda _, leaf: PackedLoraExperts([_matrices(unit) for unit in leaf.pool.units], None, None),
}
