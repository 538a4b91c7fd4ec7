"""What a model is: frozen dataclasses with the published field names.

`ModelConfig` holds the language network; `moe` is None for a dense network; `vision` is None for a text model. Reading
the many spellings of `config.json` is the business of `reader.py`, the ten published models are in `presets.py`, exact
parameter counts in `count.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ernie45.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Routed experts of a network. In a vision-language model every MoE layer holds a text pool and a vision pool."""

    moe_num_experts: int
    """Routed experts per pool."""
    moe_k: int
    """Experts per token, 1 to `moe_num_experts`; the same for both pools."""
    moe_intermediate_size: int
    """Width of one (text) expert."""
    moe_num_shared_experts: int = 0
    """Shared experts, fused into one SwiGLU of their added width; 0 = none."""
    moe_layer_start_index: int = 0
    """First layer that may hold experts."""
    moe_layer_end_index: int = -1
    """Last layer that may hold experts; -1 or anything beyond the last layer means the last layer."""
    moe_layer_interval: int = 1
    """Layer l holds experts only if (l + 1) is a multiple of this."""
    moe_use_aux_free: bool = True
    """Whether every MoE layer has a correction bias that steers the choice of experts."""
    moe_norm_min: float = 1e-12
    """Lower bound of the sum that the chosen probabilities are divided by."""
    moe_vision_intermediate_size: int = 0
    """Width of one vision expert; 0 = no vision pool."""

    def __post_init__(self) -> None:
        _require_positive(self, "moe_num_experts", "moe_k", "moe_intermediate_size", "moe_layer_interval")
        if self.moe_k > self.moe_num_experts:
            raise ConfigError(
                f"moe_k is {self.moe_k}, but there are only moe_num_experts={self.moe_num_experts} to choose from"
            )
        for name in ("moe_num_shared_experts", "moe_layer_start_index", "moe_vision_intermediate_size"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if self.moe_layer_end_index < -1:
            raise ConfigError(f"moe_layer_end_index is {self.moe_layer_end_index}, expected -1 (last layer) or more")
        if not self.moe_norm_min > 0:
            raise ConfigError(f"moe_norm_min is {self.moe_norm_min}, expected a positive number")

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the fused shared expert; 0 when there is none."""
        return self.moe_intermediate_size * self.moe_num_shared_experts

    @property
    def has_vision_pool(self) -> bool:
        """Whether MoE layers hold a second pool for vision tokens."""
        return self.moe_vision_intermediate_size > 0


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Vision encoder, resampler and the token ids that tie them to the language network."""

    depth: int = 32
    """Encoder blocks."""
    hidden_size: int = 1280
    """Encoder width; the published name in the original files is `embed_dim`."""
    num_heads: int = 16
    intermediate_size: int = 5120
    """Feed-forward width of an encoder block; published as `mlp_ratio * hidden_size`."""
    patch_size: int = 14
    in_channels: int = 3
    spatial_merge_size: int = 2
    """Patches per side of a window that the resampler joins; published as `spatial_conv_size`."""
    temporal_merge_size: int = 2
    """Frames that the resampler joins; published as `temporal_conv_size`."""
    layer_norm_eps: float = 1e-6
    freq_allocation: int = 20
    """How many of the decoder's rotary frequencies (the lowest ones) turn with time; the rest alternate height, width.
    """
    im_patch_id: int = 100295
    """Placeholder token of one image (and, in the original format, video) feature."""
    video_patch_id: int = 103367
    """Placeholder of a video feature in the format of transformers >= 5."""
    image_start_token_id: int = 101304
    image_end_token_id: int = 101305
    video_start_token_id: int = 101306
    video_end_token_id: int = 101307

    def __post_init__(self) -> None:
        _require_positive(
            self,
            "depth",
            "hidden_size",
            "num_heads",
            "intermediate_size",
            "patch_size",
            "in_channels",
            "spatial_merge_size",
            "temporal_merge_size",
            "freq_allocation",
        )
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 4:
            raise ConfigError(
                f"vision width {self.hidden_size} over {self.num_heads} heads must give a head size divisible by 4, "
                "(half of it turns with the row, half with the column, in pairs)"
            )

    @property
    def patch_width(self) -> int:
        """Values of one patch row: channels x patch x patch."""
        return self.in_channels * self.patch_size**2


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One ERNIE 4.5 network, dense or MoE, with or without vision."""

    vocab_size: int = 103424
    hidden_size: int
    intermediate_size: int
    """Width of dense feed-forward layers."""
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    """Size of one attention head; never inferred where the file states it (0.3B: 128, not hidden/heads)."""
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    max_position_embeddings: int = 131072
    use_bias: bool = False
    """Whether every linear layer of the language network (not routed experts, not router) has a bias vector."""
    tie_word_embeddings: bool = True
    num_nextn_predict_layers: int = 0
    """Multi-token prediction blocks: 0 or 1 in every published model."""
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: tuple[int, ...] = (2,)
    pad_token_id: int | None = 0
    moe: MoeConfig | None = None
    vision: VisionConfig | None = None

    def __post_init__(self) -> None:
        _require_positive(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}, rotary embedding needs an even number")
        if not (self.rms_norm_eps > 0 and self.rope_theta > 0):
            raise ConfigError(
                f"rms_norm_eps {self.rms_norm_eps} and rope_theta {self.rope_theta} must be positive numbers"
            )
        if self.num_nextn_predict_layers < 0:
            raise ConfigError(f"num_nextn_predict_layers is {self.num_nextn_predict_layers}, expected 0 or more")
        if self.moe is not None:
            self._check_moe(self.moe)
        elif self.vision is not None:
            raise ConfigError("a vision-language model needs MoE layers with a vision pool; this config has no experts")
        if self.vision is not None and self.vision.freq_allocation >= self.head_dim // 2:
            raise ConfigError(
                f"freq_allocation {self.vision.freq_allocation} leaves no rotary frequency for height and width: "
                f"head_dim {self.head_dim} has {self.head_dim // 2}"
            )

    def _check_moe(self, moe: MoeConfig) -> None:
        if moe.moe_layer_start_index >= self.num_hidden_layers:
            raise ConfigError(
                f"moe_layer_start_index {moe.moe_layer_start_index} lies beyond the last layer "
                f"{self.num_hidden_layers - 1}: the model would have no MoE layer"
            )
        if moe.has_vision_pool != (self.vision is not None):
            raise ConfigError("vision experts and a vision encoder come together: one of the two is missing")

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` holds experts. Source: architecture reference 1.3."""
        moe = self.moe
        if moe is None:
            return False
        last = self.num_hidden_layers - 1
        end = last if moe.moe_layer_end_index == -1 else min(moe.moe_layer_end_index, last)
        return (layer_idx + 1) % moe.moe_layer_interval == 0 and moe.moe_layer_start_index <= layer_idx <= end

    @property
    def has_head_bias(self) -> bool:
        """Whether the head has a bias vector: in transformers, MoE models with `use_bias` do, dense do not."""
        return self.use_bias and self.moe is not None

    @property
    def num_moe_layers(self) -> int:
        """How many of the layers hold experts."""
        return sum(self.is_moe_layer(layer) for layer in range(self.num_hidden_layers))

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes that one token occupies in the key/value cache of all layers (without the MTP block)."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * bytes_per_value

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, ignore_keys: tuple[str, ...] = ()) -> ModelConfig:
        """Read `config.json` of a checkpoint folder, in any published spelling.

        Args: folder: the checkpoint folder, or the file itself. ignore_keys: unknown keys that the caller knows not to
            change the network.
        Raises: NotFoundError if there is no config.json; ConfigError if it is malformed, contradicts itself or holds an
            unknown key that might change the network.
        """
        from ernie45.config.reader import read_config

        return read_config(folder, ignore_keys=ignore_keys)


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{name} is {value!r}, expected a positive integer")
