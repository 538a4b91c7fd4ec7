"""The leaves that training puts into a network: the same functions and parameters, with less kept for the backward pass.

A leaf is put in place by changing the class of a module, so that parameters, buffers, names in the state dict, hooks and copies
stay what they were. Leaves that others have replaced already (adapters, narrow formats) are left alone.
"""

from __future__ import annotations

from torch import nn

from ernie45.layers.attention import AttentionCore
from ernie45.layers.ffn import SwiGLU
from ernie45.layers.moe import Experts, Router
from ernie45.layers.norm import RMSNorm
from ernie45.models.text import DecoderLayer
from ernie45.training.leaves.attention import TrainingAttentionCore
from ernie45.training.leaves.embedding import TrainingEmbedding
from ernie45.training.leaves.experts import TrainingExperts
from ernie45.training.leaves.layer import TrainingLayer
from ernie45.training.leaves.norm import TrainingRMSNorm
from ernie45.training.leaves.router import TrainingRouter
from ernie45.training.leaves.swiglu import TrainingSwiGLU

_LEAVES: dict[type[nn.Module], type[nn.Module]] = {
    AttentionCore: TrainingAttentionCore,
    DecoderLayer: TrainingLayer,
    Experts: TrainingExperts,
    RMSNorm: TrainingRMSNorm,
    Router: TrainingRouter,
    SwiGLU: TrainingSwiGLU,
}


def use_training_leaves(model: nn.Module) -> None:
    """Put the training leaves into a network, in place; again changes nothing."""
    for module in model.modules():
        leaf = _LEAVES.get(type(module))
        if leaf is not None:
            module.__class__ = leaf
    embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
    if type(embedding) is nn.Embedding and getattr(getattr(model, "lm_head", None), "weight", None) is None:
        embedding.__class__ = TrainingEmbedding
