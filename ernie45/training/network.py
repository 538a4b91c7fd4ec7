"""The network as training sees it: the one definition, with leaves that keep little and that remember what the router's losses need.

Shape letters: T tokens, H hidden, E experts, K experts per token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ernie45.config.count import count_parameters
from ernie45.config.model import ModelConfig
from ernie45.errors import ConfigError, ShapeError
from ernie45.layers.moe import Router
from ernie45.models.build import dtype_name, parse_dtype
from ernie45.models.text import CausalLM, MtpVariant
from ernie45.training.batch import Batch
from ernie45.training.leaves import use_training_leaves
from ernie45.training.leaves.layer import TrainingLayer
from ernie45.training.leaves.router import TrainingRouter
from ernie45.training.recompute import RecomputeConfig, RecomputePlan, named_operations, set_recompute


@dataclass(frozen=True, kw_only=True)
class RouterRecord:
    """What one router did in one pass."""

    router: Router
    logits_TE: Tensor
    """float32, with gradient."""
    ids_TK: Tensor
    """int64: the experts that were used, chosen with the correction bias."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What came out of one pass through the network."""

    hidden_TH: Tensor
    """The residual stream before the final norm."""
    mtp_TH: tuple[Tensor, ...]
    """The same of every MTP block that was asked for."""
    routers: tuple[RouterRecord, ...]
    """Of every MoE layer in order, empty for a dense model."""


class TrainingNetwork:
    """A model with training leaves, and the passes that a loss is made of."""

    def __init__(
        self,
        model: CausalLM,
        *,
        recompute: RecomputeConfig | None = None,
        dtype: str | torch.dtype | None = None,
        mtp_variant: MtpVariant | None = None,
    ) -> None:
        """Args: model: changed in place, its state dict keeps its names. dtype: of matrix products: that of the weights (None),
            or bfloat16 over float32 weights (autocast). mtp_variant: how the prediction blocks are wired.
        Raises: ConfigError for other dtypes, and for an operation to compute again that the model has not.
        """
        self.model = model
        self.mtp_variant = mtp_variant or MtpVariant()
        self.recompute = recompute or RecomputeConfig()
        self.plan: RecomputePlan | None = None
        """What policy `auto` has chosen, from its first pass on."""
        self.product_dtype = _product_dtype(dtype, model.dtype)
        """Of matrix products, those with the head included."""
        use_training_leaves(model)
        self._routers = [module for module in model.modules() if isinstance(module, TrainingRouter)]
        if self.recompute.policy != "auto":
            layers = self._layers(len(model.model.mtp_block))
            for layer, operations in zip(layers, named_operations(self.recompute, layers), strict=True):
                set_recompute(layer, operations)

    def run(self, batch: Batch, *, num_mtp: int = 0) -> Pass:
        """Run a batch through the decoder and through the first `num_mtp` prediction blocks.

        Block d reads the token d + 1 places ahead. Where that lies beyond the document it reads token 0: no label stands there, and
        no position that has one sees it. Raises: ShapeError if the batch looks less far ahead; ConfigError for blocks that the
        model has not; CapacityError if policy `auto` cannot keep its budget.
        """
        if num_mtp and num_mtp >= len(batch.labels_DT):
            raise ShapeError(
                f"the batch has labels {len(batch.labels_DT)} places ahead, {num_mtp} prediction blocks learn {num_mtp + 1}: "
                "collate it with num_mtp"
            )
        if self.recompute.budget_bytes is not None and self.plan is None and torch.is_grad_enabled():
            from ernie45.training.recompute_meter import plan_for_budget

            again = partial(self._pass, batch, num_mtp)
            self.plan = plan_for_budget(self._layers(num_mtp), again, self.recompute.budget_bytes)
        return self._pass(batch, num_mtp)

    def final_norm(self, hidden_TH: Tensor, *, mtp: bool = False) -> Tensor:
        """What the head reads, of the residual stream or of a prediction block's."""
        if mtp and not self.mtp_variant.final_norm_on_output:
            return hidden_TH
        return self.model.model.norm(hidden_TH)

    def _pass(self, batch: Batch, num_mtp: int) -> Pass:
        view = batch.view()
        positions = view.positions(batch.tokens_T.device)
        for router in self._routers:
            router.recording = True
        mtp: list[Tensor] = []
        try:
            with self._autocast():
                hidden = self.model.model(batch.tokens_T, positions, view)
                for depth in range(num_mtp):
                    before, ahead_T = (mtp[-1] if mtp else hidden), batch.ahead_DT[depth]
                    mtp.append(
                        self.model.model.mtp(before, ahead_T, positions, view, depth=depth, variant=self.mtp_variant)
                    )
        finally:
            recorded = [(router, router.take()) for router in self._routers]
        records = [RouterRecord(router=r, logits_TE=found[0], ids_TK=found[1]) for r, found in recorded if found]
        return Pass(hidden_TH=hidden, mtp_TH=tuple(mtp), routers=tuple(records))

    def _layers(self, num_mtp: int) -> list[TrainingLayer]:
        text = self.model.model
        return [layer for layer in (*text.layers, *text.mtp_block[:num_mtp]) if isinstance(layer, TrainingLayer)]

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.product_dtype == self.model.dtype:
            return nullcontext()
        return torch.autocast(self.model.device.type, dtype=self.product_dtype)


def count_flops_per_token(config: ModelConfig, seq_len: int, *, num_mtp: int = 0) -> int:
    """Floating-point operations of forward and backward per token of documents of `seq_len` tokens, nothing computed twice.

    `6 * active + 6 * layers * heads * head_dim * (seq_len + 1)`: every active parameter (head included, embedding table not, 6
    because a multiply-add counts two and backward takes two products for one) and causal attention (queries by keys and weights by
    values, over (seq_len + 1) / 2 tokens on average). Prediction blocks add theirs, and the head again.
    """
    count = count_parameters(config)
    head = config.vocab_size * (config.hidden_size + config.has_head_bias)
    blocks = config.num_nextn_predict_layers
    if not 0 <= num_mtp <= blocks:
        raise ConfigError(f"{num_mtp} prediction blocks asked for, the model has {blocks}")
    parameters = count.active + (num_mtp * (count.mtp // blocks + head) if num_mtp else 0)
    layers = config.num_hidden_layers + num_mtp
    attention = layers * config.num_attention_heads * config.head_dim * (seq_len + 1)
    return 6 * parameters + 6 * attention


def slow_dtype_warning(dtype: str | torch.dtype) -> str | None:
    """Why training in `dtype` is slow on this processor, measured on small products; None where it is not.

    Processors without instructions for bfloat16 emulate it, some layouts a hundred times slower than float32.
    """
    dtype = parse_dtype(dtype)
    if dtype == torch.float32:
        return None
    narrow, wide = _product_rate(dtype), _product_rate(torch.float32)
    if narrow >= wide / 2:
        return None
    return (
        f"matrix products run at {narrow / 1e9:.1f} GFLOP/s in {dtype_name(dtype)} and at {wide / 1e9:.1f} in float32 here: this "
        "processor emulates the narrow dtype; train in float32"
    )


def _product_rate(dtype: torch.dtype, size: int = 256) -> float:
    """FLOP/s of the slower of the two layouts that a backward pass needs."""
    x, y = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    calls: list[Callable[[], Tensor]] = [lambda: x @ y, lambda: x.t() @ y]
    for call in calls:
        call()
    seconds = []
    for call in calls:
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / max(seconds)


def _product_dtype(wanted: str | torch.dtype | None, weights: torch.dtype) -> torch.dtype:
    dtype = weights if wanted is None else parse_dtype(wanted)
    if dtype == torch.float16:
        raise ConfigError(
            "training in float16 needs scaled losses, which this package does not do: use bfloat16 or float32"
        )
    if dtype != weights and (dtype, weights) != (torch.bfloat16, torch.float32):
        raise ConfigError(
            f"products in {dtype_name(dtype)} over weights in {dtype_name(weights)} are not possible: load the weights in float32"
        )
    return dtype
