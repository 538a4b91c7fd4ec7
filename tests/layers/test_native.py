"""Networks with kernel leaves against the same networks in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ernie45.kernels.choice import kernels
from ernie45.kernels.native import status
from ernie45.layers.cache import AttentionView
from ernie45.layers.native import KernelAttentionCore, KernelRMSNorm, KernelRouter, use_kernel_leaves
from ernie45.models.build import build_model

CHOICES = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not status().available, reason=status().reason)),
]


def _twin(model: Any) -> Any:
    twin = build_model(model.config)
    twin.load_state_dict(model.state_dict())
    use_kernel_leaves(twin)
    return twin.requires_grad_(False).eval()


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("moe", [False, True])
def test_logits_are_those_of_the_plain_network(small_model: Any, choice: Any, moe: bool) -> None:
    """Whole rows, packed documents, prefill in chunks, decode of several sequences together."""
    model = small_model(moe=moe, mtp=1).requires_grad_(False)
    twin = _twin(model)
    kinds = {type(module) for module in twin.modules()}
    assert {KernelAttentionCore, KernelRMSNorm} | ({KernelRouter} if moe else set()) <= kinds
    ids = torch.randint(101, (2, 21), generator=torch.Generator().manual_seed(0))
    with kernels(choice), torch.inference_mode():
        assert (twin(ids) - model(ids)).abs().max() <= 2e-5
        packed = AttentionView(lengths=(4, 17))
        assert (twin.hidden(ids[0], packed) - model.hidden(ids[0], packed)).abs().max() <= 2e-5
        for network in (model, twin):
            network.caches = (network.new_cache(1), network.new_cache(1))
        for lengths in ((9, 4), (1, 1), (1, 6), (2, 1)):
            step = torch.randint(101, (sum(lengths),), generator=torch.Generator().manual_seed(sum(lengths)))
            mine = twin.logits(twin.hidden(step, AttentionView(lengths=lengths, caches=twin.caches)))
            plain = model.logits(model.hidden(step, AttentionView(lengths=lengths, caches=model.caches)))
            assert (mine - plain).abs().max() <= 2e-5
        positions, view = torch.arange(20), AttentionView(lengths=(20,))
        hidden = model.hidden(ids[0], AttentionView(lengths=(21,)))[:20]
        z = [network.model.mtp(hidden, ids[0, 1:], positions, view) for network in (model, twin)]
        assert (z[0] - z[1]).abs().max() <= 2e-5
