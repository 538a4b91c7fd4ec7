"""Exact parameter counts from a configuration alone.

Needs no torch, so that `ernie show` answers at once for a 424B model; the tests hold it against the modules themselves,
built on the meta device, and against the published figures (architecture reference, section 7).
"""

from __future__ import annotations

from dataclasses import dataclass

from ernie45.config.model import ModelConfig, MoeConfig, VisionConfig


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of one network; a tied head counts once, the correction bias is included."""

    total: int
    """All parameters but the MTP block: what the published totals mean."""
    active: int
    """Parameters that take part in one text token: without unused experts and the embedding table, with the head."""
    mtp: int
    """Parameters of the multi-token prediction block."""
    vision: int
    """Parameters of vision encoder and resampler (part of `total`)."""

    @property
    def total_with_mtp(self) -> int:
        """Everything that a checkpoint holds."""
        return self.total + self.mtp


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count parameters without building the network."""
    hidden, moe = config.hidden_size, config.moe
    table = config.vocab_size * hidden
    dense_layer = _attention(config) + 2 * hidden + _swiglu(config, config.intermediate_size)
    moe_layer_all = moe_layer_active = 0
    if moe is not None:
        fixed = _attention(config) + 2 * hidden + _router(config, moe)
        fixed += _swiglu(config, moe.shared_intermediate_size) if moe.moe_num_shared_experts else 0
        expert = _expert(config, moe.moe_intermediate_size)
        moe_layer_active = fixed + moe.moe_k * expert
        moe_layer_all = fixed + moe.moe_num_experts * expert
        if moe.has_vision_pool:
            moe_layer_all += _router(config, moe) + moe.moe_num_experts * _expert(
                config, moe.moe_vision_intermediate_size
            )
    num_moe = config.num_moe_layers
    dense_part = (config.num_hidden_layers - num_moe) * dense_layer + hidden  # + final norm
    head_bias = config.vocab_size if config.has_head_bias else 0
    head = head_bias + (0 if config.tie_word_embeddings else table)
    vision = _vision(config.vision, hidden) if config.vision is not None else 0
    mtp_block = 2 * hidden + 2 * hidden * hidden + (hidden if config.use_bias else 0) + dense_layer
    return ParameterCount(
        total=table + head + dense_part + num_moe * moe_layer_all + vision,
        active=table + head_bias + dense_part + num_moe * moe_layer_active,
        mtp=config.num_nextn_predict_layers * mtp_block,
        vision=vision,
    )


def _linear(config: ModelConfig, width_in: int, width_out: int) -> int:
    return width_in * width_out + (width_out if config.use_bias else 0)


def _attention(config: ModelConfig) -> int:
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    return _linear(config, config.hidden_size, heads + 2 * kv_heads) + _linear(config, heads, config.hidden_size)


def _swiglu(config: ModelConfig, width: int) -> int:
    return _linear(config, config.hidden_size, 2 * width) + _linear(config, width, config.hidden_size)


def _expert(config: ModelConfig, width: int) -> int:
    """A routed expert: a SwiGLU that never has bias vectors."""
    return 3 * config.hidden_size * width


def _router(config: ModelConfig, moe: MoeConfig) -> int:
    return moe.moe_num_experts * config.hidden_size + (moe.moe_num_experts if moe.moe_use_aux_free else 0)


def _vision(vision: VisionConfig, hidden: int) -> int:
    width, ffn = vision.hidden_size, vision.intermediate_size
    block = 4 * width + (3 * width * width + 3 * width) + (width * width + width) + (2 * width * ffn + ffn + width)
    encoder = vision.patch_width * width + vision.depth * block + 2 * width
    window = width * vision.spatial_merge_size**2
    square = window * window + window
    spatial = 2 * square + 2 * window
    temporal = (vision.temporal_merge_size * window * window + window) + square + 2 * window
    return encoder + spatial + temporal + (window * hidden + hidden) + hidden
