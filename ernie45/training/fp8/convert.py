"""Puts the fp8 leaves into a network: feed-forward layers and experts, of text and of vision, and the MTP block's.

Attention, embedding, head, norms and the vision encoder stay in the network's dtype and routers in float32, as published. Parameters
stay the same objects under the same names, so that optimizers and checkpoints know nothing of fp8; the optimizer's float32
masters are the weights that learn.
"""

from __future__ import annotations

from torch import nn

from ernie45.errors import ConfigError
from ernie45.training.fp8.config import Backend, Fp8Config
from ernie45.training.fp8.experts import Fp8Experts
from ernie45.training.fp8.linear import Fp8SwiGLU
from ernie45.training.fp8.matmul import resolve_backend


def use_fp8(model: nn.Module, config: Fp8Config | None = None) -> int:
    """Replace the leaves in place, also those that a training network put there before.

    Leaves are told by what they hold: two linear layers, or two stacks of matrices, named `up_gate_proj` and `down_proj`.
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
    up_gate, down = (getattr(plain, name, None) for name in ("up_gate_proj", "down_proj"))
    if isinstance(up_gate, nn.Linear) and isinstance(down, nn.Linear):
        return Fp8SwiGLU(up_gate, down, backend)
    if isinstance(up_gate, nn.Parameter) and isinstance(down, nn.Parameter):
        return Fp8Experts(up_gate, down, backend, keep=config.keep_up_gate)
    return None
