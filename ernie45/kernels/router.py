"""Router of a mixture of experts: scores, choice, weights, and the tokens ordered by expert.

Shape letters: T tokens, H hidden, E experts, K experts per token. The native twin is in `csrc/kernels/router.cpp`; bytes moved
for a few tokens: those of the gate. Source: architecture reference 2.5; `ernie45.layers.moe.route` is the trainable form.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.kernels.check import check_tensor
from ernie45.kernels.choice import native


class Routing(NamedTuple):
    """Which experts serve which tokens: by token, and by expert as `packed.ffn` takes it."""

    weights_TK: Tensor
    """float32, rows sum to 1."""
    ids_TK: Tensor
    """int32 or int64, best first."""
    counts_E: Tensor
    """int64: tokens of each expert."""
    tokens: Tensor
    """int32 (T K): ordered by expert, then by token."""
    token_weights: Tensor
    """float32 (T K): the weight of each entry of `tokens`."""


def route(x_TH: Tensor, gate_EH: Tensor, bias_E: Tensor | None, num_active: int, norm_min: float) -> Routing:
    """Choose experts for every token; the bias steers the choice but not the weights. Ties go to the lowest id.

    Args: x_TH, gate_EH, bias_E: float32, contiguous, on the CPU. num_active: K, 1 to E. norm_min: lower bound of the sum
        that the chosen probabilities are divided by.
    Raises: ShapeError for other shapes, dtypes, devices or strides.
    """
    extension = native()
    if extension is None:
        _check(x_TH, gate_EH, bias_E, num_active)
        return route_reference(x_TH, gate_EH, bias_E, num_active, norm_min)
    try:
        num_tokens, num_experts = x_TH.shape[0], gate_EH.shape[0]
        routing = Routing(
            weights_TK=torch.empty(num_tokens, num_active),
            ids_TK=torch.empty(num_tokens, num_active, dtype=torch.int32),
            counts_E=torch.empty(num_experts, dtype=torch.int64),
            tokens=torch.empty(num_tokens * num_active, dtype=torch.int32),
            token_weights=torch.empty(num_tokens * num_active),
        )
        extension.route(x_TH, gate_EH, bias_E, norm_min, *routing)
    except (TypeError, ValueError, IndexError) as error:
        _check(x_TH, gate_EH, bias_E, num_active)
        raise ShapeError(str(error)) from error
    return routing


def route_reference(x_TH: Tensor, gate_EH: Tensor, bias_E: Tensor | None, num_active: int, norm_min: float) -> Routing:
    """What `route` computes; differs from the native twin by the order of the sums."""
    probs_TE = (x_TH @ gate_EH.T).softmax(-1)
    scores_TE = probs_TE if bias_E is None else probs_TE + bias_E
    ids_TK = scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :num_active]
    chosen_TK = probs_TE.gather(-1, ids_TK)
    weights_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True).clamp(min=norm_min)
    return order_by_expert(weights_TK, ids_TK.to(torch.int32), len(gate_EH))


def order_by_expert(weights_TK: Tensor, ids_TK: Tensor, num_experts: int) -> Routing:
    """The routing of given choices; differentiable in the weights."""
    order = ids_TK.flatten().argsort(stable=True)
    return Routing(
        weights_TK=weights_TK,
        ids_TK=ids_TK,
        counts_E=torch.bincount(ids_TK.flatten(), minlength=num_experts),
        tokens=(order // ids_TK.shape[1]).to(torch.int32),
        token_weights=weights_TK.flatten()[order],
    )


def expert_groups(counts: Iterable[int]) -> Iterator[tuple[int, slice]]:
    """The experts that have tokens, each with where its entries of `Routing.tokens` lie.

    Args: counts: of every expert, `Routing.counts_E` as numbers.
    """
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _check(x_TH: Tensor, gate_EH: Tensor, bias_E: Tensor | None, num_active: int) -> None:
    if x_TH.ndim != 2 or gate_EH.ndim != 2:
        raise ShapeError(
            f"[route] expected x (T, H) and gate (E, H), got {tuple(x_TH.shape)} and {tuple(gate_EH.shape)}"
        )
    num_experts, hidden = gate_EH.shape
    if not 1 <= num_active <= num_experts:
        raise ShapeError(f"[route] expected 1 to {num_experts} experts per token, got {num_active}")
    check_tensor("route", "x", x_TH, (len(x_TH), hidden))
    check_tensor("route", "gate", gate_EH, (num_experts, hidden))
    if bias_E is not None:
        check_tensor("route", "bias", bias_E, (num_experts,))
