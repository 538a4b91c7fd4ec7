"""GGUF metadata to `ModelConfig` and back.

Read: `ernie4_5` and `ernie4_5-moe`, and `llama` and `qwen2` files of networks that are an ERNIE 4.5 dense network after
renaming. Keys of the architecture that are not known here stop the reading: they might change the network. Source:
architecture reference 4.6.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from ernie45.checkpoint.gguf import GGUFFile, GGUFValue
from ernie45.config.model import ModelConfig, MoeConfig
from ernie45.config.nearest import nearest
from ernie45.errors import CheckpointError, ConfigError

ARCHITECTURES = ("ernie4_5", "ernie4_5-moe", "llama", "qwen2")

# Keys below the architecture's name that say nothing about the network, or nothing that is not checked elsewhere.
_INERT_KEYS = {
    "vocab_size",
    "rope.dimension_count",
    "attention.value_length",
    "expert_shared_count",
    "expert_gating_func",
}


class _Metadata:
    """The keys of one architecture; remembers which were asked for."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file, self.prefix = file, f"{architecture}."
        self.known = set(_INERT_KEYS)

    def get(self, key: str, default: Any = None) -> Any:
        self.known.add(key)
        return self.file.metadata.get(self.prefix + key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{self.file.path}: metadata {self.prefix}{key} is {value!r}, expected an integer")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointError(f"{self.file.path}: metadata {self.prefix}{key} is {value!r}, expected a number")
        return _shortest_decimal(float(value))

    def check_unknown(self) -> None:
        for key, value in self.file.metadata.items():
            name = key.removeprefix(self.prefix)
            if key.startswith(self.prefix) and name not in self.known and value not in (0, False, "none", "", []):
                raise CheckpointError(
                    f"{self.file.path}: metadata {key} = {str(value)[:60]} might change the network and is not known "
                    f"here; the nearest known key is {nearest(name, self.known)}"
                )


def config_from_gguf(file: GGUFFile) -> tuple[ModelConfig, str]:
    """The network that a GGUF file describes, and its `general.architecture`.

    Raises: CheckpointError for an architecture that is no ERNIE 4.5 network after renaming, or metadata that cannot be
    honoured.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: architecture is {architecture!r}, expected one of {', '.join(ARCHITECTURES)}"
        )
    metadata = _Metadata(file, architecture)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing")
    hidden, heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    try:
        config = ModelConfig(
            vocab_size=embedding.shape[0],
            hidden_size=hidden,
            intermediate_size=metadata.integer("feed_forward_length"),
            num_hidden_layers=metadata.integer("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=metadata.integer("attention.head_count_kv", heads),
            head_dim=metadata.integer("attention.key_length", hidden // max(heads, 1)),
            rms_norm_eps=metadata.number("attention.layer_norm_rms_epsilon", 1e-5),
            rope_theta=metadata.number("rope.freq_base", 10000.0),
            max_position_embeddings=metadata.integer("context_length", 131072),
            use_bias=_has_bias(file, architecture),
            tie_word_embeddings="output.weight" not in file.tensors,
            bos_token_id=_token(file, "bos"),
            eos_token_id=tuple(t for t in (_token(file, "eos"),) if t is not None),
            pad_token_id=_token(file, "padding"),
            moe=_read_moe(metadata) if architecture == "ernie4_5-moe" else None,
        )
    except ConfigError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    if metadata.file.metadata.get(f"{architecture}.rope.dimension_count", config.head_dim) != config.head_dim:
        raise CheckpointError(f"{file.path}: only a part of each head is rotated, which ERNIE 4.5 does not do")
    metadata.check_unknown()
    return config, architecture


def config_to_gguf(config: ModelConfig, *, name: str) -> dict[str, GGUFValue]:
    """Metadata of a GGUF file for llama.cpp, without the vocabulary.

    Raises: CheckpointError for what that format cannot hold: vision, MoE layers that end before the last layer.
    """
    if config.vision is not None:
        raise CheckpointError("GGUF has no ERNIE 4.5 vision-language architecture: convert to pt or paddle")
    architecture = "ernie4_5-moe" if config.moe is not None else "ernie4_5"
    values: dict[str, GGUFValue] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
    }
    if config.moe is not None:
        values |= _moe_to_gguf(config, config.moe)
    header: dict[str, GGUFValue] = {"general.architecture": architecture, "general.type": "model", "general.name": name}
    return header | {f"{architecture}.{key}": value for key, value in values.items()}


def _read_moe(metadata: _Metadata) -> MoeConfig:
    width = metadata.integer("expert_feed_forward_length")
    shared = metadata.integer("expert_shared_feed_forward_length", 0)
    # Converted files are known to state a wrong shared width; the tensors themselves are right.
    for tensor in metadata.file.tensors.values():
        if tensor.name.endswith("ffn_gate_shexp.weight"):
            shared = tensor.shape[0]
            break
    else:
        shared = 0 if shared else shared
    if shared % max(width, 1):
        raise CheckpointError(
            f"{metadata.file.path}: shared expert width {shared} is no multiple of the expert width {width}"
        )
    return MoeConfig(
        moe_num_experts=metadata.integer("expert_count"),
        moe_k=metadata.integer("expert_used_count"),
        moe_intermediate_size=width,
        moe_num_shared_experts=shared // width if width else 0,
        moe_layer_start_index=metadata.integer("leading_dense_block_count", 0),
        moe_layer_interval=metadata.integer("interleave_moe_layer_step", 1),
        moe_use_aux_free=any(name.endswith("exp_probs_b.bias") for name in metadata.file.tensors),
    )


def _moe_to_gguf(config: ModelConfig, moe: MoeConfig) -> Mapping[str, GGUFValue]:
    if not config.is_moe_layer(config.num_hidden_layers - 1) and moe.moe_layer_interval == 1:
        raise CheckpointError("GGUF cannot say that MoE layers end before the last layer: convert to pt or paddle")
    values: dict[str, GGUFValue] = {
        "expert_count": moe.moe_num_experts,
        "expert_used_count": moe.moe_k,
        "expert_feed_forward_length": moe.moe_intermediate_size,
        "leading_dense_block_count": moe.moe_layer_start_index,
        "interleave_moe_layer_step": moe.moe_layer_interval,
    }
    if moe.moe_num_shared_experts:
        values["expert_shared_count"] = moe.moe_num_shared_experts
        values["expert_shared_feed_forward_length"] = moe.shared_intermediate_size
    return values


def _has_bias(file: GGUFFile, architecture: str) -> bool:
    return architecture == "qwen2" or any(
        name.startswith("blk.") and name.endswith("attn_q.bias") and architecture.startswith("ernie")
        for name in file.tensors
    )


def _token(file: GGUFFile, kind: str) -> int | None:
    value = file.metadata.get(f"tokenizer.ggml.{kind}_token_id")
    return value if isinstance(value, int) else None


def _shortest_decimal(value: float) -> float:
    """The decimal that somebody wrote before it was stored as float32: 9.99999974e-06 -> 1e-05."""
    short = float(f"{value:.6g}")
    return short if struct.pack("<f", short) == struct.pack("<f", value) else value
