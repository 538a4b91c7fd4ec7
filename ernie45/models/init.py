"""Random weights: for training from nothing, for tests and for speed figures on full-size shapes."""

from __future__ import annotations

import torch
from torch import nn

from ernie45.layers.moe import Experts, Router
from ernie45.layers.norm import RMSNorm
from ernie45.models.text import LmHead


@torch.no_grad()
def initialize(model: nn.Module, *, std: float, seed: int = 0, correction_bias_std: float = 0.0) -> None:
    """Fill every parameter in place: matrices normal with `std`, norms one, bias vectors and correction bias zero.

    Args: correction_bias_std: spread of the routers' correction bias; training starts at 0, tests and speed figures use
        a spread so that the bias matters.
    Random numbers are drawn in module order on the CPU, so that equal seeds give equal weights on every device.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, spread: float) -> None:
        drawn = torch.empty(tensor.shape, dtype=torch.float32).normal_(0.0, spread, generator=generator)
        tensor.copy_(drawn)

    for module in model.modules():
        if isinstance(module, Router):
            normal(module.weight, std)
            if module.e_score_correction_bias is not None:
                normal(module.e_score_correction_bias, correction_bias_std)
        elif isinstance(module, Experts):
            normal(module.up_gate_proj, std)
            normal(module.down_proj, std)
        elif isinstance(module, LmHead):
            if module.weight is not None:
                normal(module.weight, std)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Linear):
            normal(module.weight, std)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            normal(module.weight, std)
        elif isinstance(module, RMSNorm | nn.LayerNorm):
            module.weight.fill_(1.0)
            if isinstance(module, nn.LayerNorm) and module.bias is not None:
                module.bias.zero_()
