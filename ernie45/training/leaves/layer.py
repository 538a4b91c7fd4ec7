"""The decoder layer that computes parts of itself again in the backward pass.

Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ernie45.layers.cache import AttentionView
from ernie45.layers.moe import MoeBlock
from ernie45.models.text import DecoderLayer


class TrainingLayer(DecoderLayer):
    """`models.text.DecoderLayer`; what is computed again gives the same bits, random numbers included."""

    recomputed: frozenset[str] = frozenset()
    """`layer` (all of it), `attention` (from the residual stream to what the output projection reads), `norm` (both norms).
    Experts and feed-forward blocks are told themselves, see `keeps_products`."""

    def forward(
        self, hidden_TH: Tensor, rotation_TJ: Tensor, view: AttentionView, vision_mask_T: Tensor | None = None
    ) -> Tensor:
        """(T, H) -> (T, H)."""
        if not self.recomputed or not torch.is_grad_enabled():
            return super().forward(hidden_TH, rotation_TJ, view, vision_mask_T)
        if "layer" in self.recomputed:
            return checkpoint(super().forward, hidden_TH, rotation_TJ, view, vision_mask_T, use_reentrant=False)
        if "attention" in self.recomputed:
            hidden_TH = checkpoint(self._attend, hidden_TH, rotation_TJ, view, use_reentrant=False)
        else:
            hidden_TH = self._attend(hidden_TH, rotation_TJ, view, "norm" in self.recomputed)
        return self._feed(hidden_TH, vision_mask_T)

    def _attend(
        self, hidden_TH: Tensor, rotation_TJ: Tensor, view: AttentionView, forgets_norm: bool = False
    ) -> Tensor:
        x_TH = self.input_layernorm(hidden_TH)
        with self._forgetting(x_TH, self.input_layernorm, hidden_TH, forgets_norm):
            return self.self_attn(x_TH, rotation_TJ, view, residual_TH=hidden_TH)

    def _feed(self, hidden_TH: Tensor, vision_mask_T: Tensor | None) -> Tensor:
        x_TH = self.post_attention_layernorm(hidden_TH)
        modality = (vision_mask_T,) if isinstance(self.mlp, MoeBlock) else ()
        with self._forgetting(x_TH, self.post_attention_layernorm, hidden_TH, "norm" in self.recomputed):
            return self.mlp(x_TH, *modality, residual_TH=hidden_TH)

    @staticmethod
    def _forgetting(x_TH: Tensor, norm: nn.Module, hidden_TH: Tensor, forgets: bool) -> AbstractContextManager[Any]:
        return _Forgotten(x_TH, partial(norm, hidden_TH.detach())) if forgets else nullcontext()


class _Forgotten(saved_tensors_hooks):
    """Inside, whoever keeps a certain tensor for the backward pass keeps a way to compute it again instead.

    Several operations may keep the tensor: it is computed when the first of them asks and let go with the last.
    """

    def __init__(self, tensor: Tensor, again: Callable[[], Tensor]) -> None:
        super().__init__(self._pack, self._unpack)
        self._tensor: Tensor | None = tensor
        self._again = again
        self._num_kept = self._num_asked = 0
        self._computed: Tensor | None = None

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        # The graph holds the hooks and so this object, which must hold neither what is not kept nor, by its own hooks, itself.
        self._tensor = None
        del self.pack_hook, self.unpack_hook

    def _pack(self, kept: Tensor) -> Tensor | None:
        tensor = self._tensor
        if tensor is None or not _same(kept, tensor):
            return kept.detach()  # an output that held its own node would never be freed
        self._num_kept += 1
        return None

    def _unpack(self, kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        self._num_asked += 1
        with torch.no_grad():
            computed = self._again() if self._computed is None else self._computed
        self._computed = computed if self._num_asked % self._num_kept else None
        return computed


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same values in memory, seen the same way."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
