"""Puts the fp8 leaves into a network: feed-forward layers and experts, of text and of vision, and the MTP block's.

Attention, embedding, head, norms and the vision encoder stay in the network's dtype and routers in float32, as published. Parameters
stay the same objects under the same names, so that optimizers and checkpoints know nothing of fp8; the optimizer's float32
masters are the weights that learn.
"""

from __future__ import annotations

from torch import nn

from ernie45.errors import ConfigError
from ernie45.layers.ffn import SwiGLU
from ernie45.layers.linear import Linear
from ernie45.layers.moe import Experts
from ernie45.training.fp8.config import Backend, Fp8Config
from ernie45.training.fp8.experts import Fp8Experts
from ernie45.training.fp8.linear import Fp8SwiGLU
from ernie45.training.fp8.matmul import resolve_backend


def use_fp8(model: nn.Module, config: Fp8Config | None = None) -> int:
    """Replace the leaves in place, also those that a training network put there before, which then say what is computed again.

    Layers with an adapter, or in another narrow format, are left as they are.
    Returns: how many leaves were replaced. Raises: ConfigError if there are none, or the backend does not run.
    """
    config = config or Fp8Config()
    backend = resolve_backend(config, next(model.parameters()).device)
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            leaf = _fp8_leaf(child, backend, config)
            if leaf is not None:
                setattr(parent, name, leaf.train(child.training))
                count += 1
    if not count:
        raise ConfigError("the network has no feed-forward layer or experts in floating point: fp8 has nothing to do")
    return count


def _fp8_leaf(plain: nn.Module, backend: Backend, config: Fp8Config) -> nn.Module | None:
    keeps = config.keep_up_gate and getattr(plain, "keeps_products", True)
    if isinstance(plain, SwiGLU):
        up_gate, down = plain.up_gate_proj, plain.down_proj
        if {type(up_gate), type(down)} <= {nn.Linear, Linear}:  # neither adapters nor fp8 already
            return Fp8SwiGLU(up_gate, down, backend, keeps_products=keeps)
    names = {name for name, _ in plain.named_parameters()}
    if isinstance(plain, Experts) and not isinstance(plain, Fp8Experts) and names == {"up_gate_proj", "down_proj"}:
        return Fp8Experts(plain.up_gate_proj, plain.down_proj, backend, keeps_products=keeps)
    return None
