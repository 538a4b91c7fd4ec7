"""Whether two networks compute the same: logits of a fixed batch, of the head and of every multi-token prediction block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ernie45.errors import ShapeError
from ernie45.layers.cache import AttentionView
from ernie45.models.text import CausalLM

_LENGTHS = (24, 17, 7)
_SEED = 45
# Largest difference over largest logit. Measured after merging on a dense model of 135 M parameters: 3e-6 in float32, 0.002 in
# float16, 0.007 in bfloat16. A mixture loses more where rounding sends a token to another expert.
_TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 8e-2}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far two networks are apart."""

    max_difference: float
    """Of logits."""
    tolerance: float
    same_best_token: float
    """Share of positions at which both prefer the same next token."""

    @property
    def ok(self) -> bool:
        """Whether they compute the same; not a number never is."""
        return self.max_difference <= self.tolerance


@torch.inference_mode()
def compare_networks(reference: CausalLM, model: CausalLM, dtype: str) -> Comparison:
    """Compare on the same random tokens. `dtype`: that the weights of `model` were stored in, which sets the tolerance.

    A prediction block that `model` lacks is not compared: formats without one say so when they are written.
    Raises: ShapeError if the vocabularies differ.
    """
    if reference.config.vocab_size != model.config.vocab_size:
        raise ShapeError(f"vocabularies of {reference.config.vocab_size} and {model.config.vocab_size} tokens differ")
    depths = min(c.num_nextn_predict_layers for c in (reference.config, model.config))
    generator = torch.Generator().manual_seed(_SEED)
    tokens = torch.randint(reference.config.vocab_size, (sum(_LENGTHS),), generator=generator)
    expected, found = _logits(reference, tokens, depths), _logits(model, tokens, depths)
    largest = float(expected.abs().max())
    return Comparison(
        max_difference=float((expected - found).abs().max()),
        tolerance=_TOLERANCE[dtype] * max(largest, 1e-6),
        same_best_token=float((expected.argmax(-1) == found.argmax(-1)).float().mean()),
    )


def _logits(model: CausalLM, tokens_T: Tensor, depths: int) -> Tensor:
    """float32 (1 + depths, T, V): of the head, and of every prediction block behind it."""
    view = AttentionView(lengths=_LENGTHS)
    hidden_TH = model.hidden(tokens_T, view)
    logits = [model.logits(hidden_TH).float()]
    for depth in range(depths):
        ahead_T = tokens_T.roll(-depth - 1)
        hidden_TH = model.model.mtp(hidden_TH, ahead_T, view.positions(), AttentionView(lengths=_LENGTHS), depth=depth)
        logits.append(model.mtp_logits(hidden_TH).float())
    return torch.stack(logits)
