"""The ERNIE 4.5 language network: dense and MoE text models, and the trunk of the vision-language models.

A network without MoE layers is the dense model; there is no second class for it. Module names follow the published
checkpoints (q/k/v and gate/up are fused, experts are stacked: `checkpoint/names.py` holds the map).

Shape letters: B sequences, T tokens (packed), H hidden, V vocabulary. Source: architecture reference, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernie45.config.model import ModelConfig
from ernie45.errors import ConfigError, ShapeError
from ernie45.layers.attention import Attention
from ernie45.layers.cache import AttentionView, KVCache
from ernie45.layers.ffn import SwiGLU
from ernie45.layers.moe import MoeBlock
from ernie45.layers.norm import RMSNorm
from ernie45.layers.rope import rotary_rotation


@dataclass(frozen=True, kw_only=True)
class MtpVariant:
    """How the multi-token prediction block is wired; implementations differ (architecture reference 2.6).

    The defaults are the training code's. Any choice gives correct output, because drafts are verified; only their
    acceptance rate changes.
    """

    final_norm_on_input: bool = False
    """Feed the main model's hidden state after its final norm (FastDeploy, vLLM) instead of before it (training)."""
    final_norm_on_output: bool = True
    """Apply the main model's final norm before the head (training, FastDeploy); False is vLLM's and SGLang's way."""


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer_idx: int, dtype: torch.dtype, *, dense: bool = False) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer_idx, dtype)
        self.mlp: SwiGLU | MoeBlock
        if config.moe is not None and config.is_moe_layer(layer_idx) and not dense:
            self.mlp = MoeBlock(config, config.moe, dtype)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=config.use_bias, dtype=dtype)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def forward(
        self, hidden_TH: Tensor, rotation_TJ: Tensor, view: AttentionView, vision_mask_T: Tensor | None = None
    ) -> Tensor:
        """(T, H) -> (T, H)."""
        # By name from the dictionary: a look-up as attribute takes nn.Module 0.7 us, and a step of the 0.3B has 130 of them.
        part: dict[str, Any] = self._modules
        x_TH = part["input_layernorm"](hidden_TH)
        hidden_TH = part["self_attn"](x_TH, rotation_TJ, view, residual_TH=hidden_TH)
        x_TH, mlp = part["post_attention_layernorm"](hidden_TH), part["mlp"]
        modality = (vision_mask_T,) if isinstance(mlp, MoeBlock) else ()
        out: Tensor = mlp(x_TH, *modality, residual_TH=hidden_TH)
        return out


class TextModel(nn.Module):
    """Embedding, decoder layers, final norm and the parts of the multi-token prediction block."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        hidden, eps = config.hidden_size, config.rms_norm_eps
        # From an empty table: nn.Embedding's own draws normal numbers, which on the meta device imports torch's compiler (1.4 s).
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, hidden, dtype=dtype), freeze=False
        )
        self.layers = nn.ModuleList(DecoderLayer(config, i, dtype) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(hidden, eps, dtype)
        depths = range(config.num_nextn_predict_layers)
        self.mtp_emb_norm = nn.ModuleList(RMSNorm(hidden, eps, dtype) for _ in depths)
        self.mtp_hidden_norm = nn.ModuleList(RMSNorm(hidden, eps, dtype) for _ in depths)
        self.mtp_linear_proj = nn.ModuleList(
            nn.Linear(2 * hidden, hidden, bias=config.use_bias, dtype=dtype) for _ in depths
        )
        # The block is a decoder layer of its own with a dense FFN and, when generating, a cache of its own: layer index
        # 0.
        self.mtp_block = nn.ModuleList(DecoderLayer(config, 0, dtype, dense=True) for _ in depths)

    def forward(
        self, tokens: Tensor, positions: Tensor, view: AttentionView, vision_mask_T: Tensor | None = None
    ) -> Tensor:
        """Run the decoder layers over packed sequences and commit the step to the view's caches.

        Args: tokens: ids, int64 (T,), or embeddings (T, H). positions: int64 (T,), or (T, 3) for vision-language
            models. view: lengths and caches of the sequences. vision_mask_T: bool, True for tokens of the vision pool.
        Returns: the residual stream before the final norm, (T, H). Raises: ShapeError.
        """
        if tokens.shape[0] != view.num_tokens or positions.shape[0] != view.num_tokens:
            raise ShapeError(
                f"{tokens.shape[0]} tokens and {positions.shape[0]} positions for sequences of {view.num_tokens} tokens"
            )
        hidden_TH = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        rotation = self._rotation(positions)
        for layer in self.layers:
            hidden_TH = layer(hidden_TH, rotation, view, vision_mask_T)
        view.commit()
        return hidden_TH

    def mtp(
        self,
        hidden_TH: Tensor,
        next_tokens: Tensor,
        positions: Tensor,
        view: AttentionView,
        *,
        depth: int = 0,
        variant: MtpVariant | None = None,
    ) -> Tensor:
        """Run a multi-token prediction block: from h_t and token t+1 to the state that predicts token t+2.

        Args: hidden_TH: residual stream of the main model (or of the block before). next_tokens: int64 (T,), the token
            after each. positions: int64 (T,). view: lengths, and caches of one layer that belong to the block alone.
        Returns: (T, H), for `CausalLM.mtp_logits`. Raises: ConfigError if the model has no such block.
        """
        if depth >= len(self.mtp_block):
            raise ConfigError(
                f"multi-token prediction depth {depth} asked for, the model has {len(self.mtp_block)} blocks"
            )
        variant = variant or MtpVariant()
        hidden_TH = self.norm(hidden_TH) if variant.final_norm_on_input else hidden_TH
        embedded = self.mtp_emb_norm[depth](self.embed_tokens(next_tokens))
        joined = torch.cat((embedded, self.mtp_hidden_norm[depth](hidden_TH)), dim=-1)
        out: Tensor = self.mtp_block[depth](self.mtp_linear_proj[depth](joined), self._rotation(positions), view)
        view.commit()
        return out

    def _rotation(self, positions: Tensor) -> Tensor:
        vision = self.config.vision
        return rotary_rotation(
            positions, self.config.head_dim, self.config.rope_theta, vision.freq_allocation if vision else 0
        )


class LmHead(nn.Module):
    """The matrix from hidden states to logits: its own, or the embedding's when the two are tied."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (config.vocab_size, config.hidden_size)
        self.weight = None if config.tie_word_embeddings else nn.Parameter(torch.empty(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size, dtype=dtype)) if config.has_head_bias else None

    def forward(self, normed_TH: Tensor, embedding_VH: Tensor) -> Tensor:
        """(T, H) -> (T, V)."""
        return F.linear(normed_TH, embedding_VH if self.weight is None else self.weight, self.bias)

    def top(self, normed_TH: Tensor, embedding_VH: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` largest logits of each row and their ids, (T, count); of equal ones the lowest id first.

        A call of its own, because a leaf with a kernel finds them without keeping the logits.
        """
        values, ids = self(normed_TH, embedding_VH).sort(dim=-1, descending=True, stable=True)
        return values[:, :count], ids[:, :count]


class CausalLM(nn.Module):
    """A language model: the decoder and its head. The head is a call of its own, so logits exist only where needed."""

    mapped_bytes: int = 0
    """Of weights that lie in a mapped file: they take their memory when they are read, not when the model is loaded."""
    kv_dtype: torch.dtype | None = None
    """Dtype of new caches, float32 or bfloat16 whatever the activations are; None = that of the activations."""
    load_account: Any = None
    """What became of every tensor of the file that the weights came from: a `checkpoint.source.LoadAccount`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.model = TextModel(config, dtype)
        self.lm_head = LmHead(config, dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations and of the cache."""
        return self.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.norm.weight.device

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits of every position of rows without padding: int64 (B, T) -> (B, T, V).

        A convenience for scoring and tests; it holds B x T x V logits. Raises: ShapeError for anything but two
        dimensions.
        """
        if ids_BT.ndim != 2 or ids_BT.is_floating_point() or not ids_BT.numel():
            raise ShapeError(f"ids have shape {tuple(ids_BT.shape)} and dtype {ids_BT.dtype}, expected int64 (B, T)")
        num_rows, num_tokens = ids_BT.shape
        view = AttentionView(lengths=(num_tokens,) * num_rows)
        hidden = self.model(ids_BT.flatten(), view.positions(ids_BT.device), view)
        return self.logits(hidden).unflatten(0, (num_rows, num_tokens))

    def hidden(self, tokens: Tensor, view: AttentionView) -> Tensor:
        """Residual stream of packed text sequences, int64 (T,) -> (T, H), at the positions that follow from `view`."""
        out: Tensor = self.model(tokens, view.positions(tokens.device), view)
        return out

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """Next-token logits from the residual stream, (T, H) -> (T, V)."""
        return self._head(self.model.norm(hidden_TH))

    def mtp_logits(self, mtp_hidden_TH: Tensor, variant: MtpVariant | None = None) -> Tensor:
        """Logits of the token after next from the output of `TextModel.mtp`, (T, H) -> (T, V)."""
        return self._head(self._mtp_normed(mtp_hidden_TH, variant))

    def mtp_best(self, mtp_hidden_TH: Tensor, variant: MtpVariant | None = None) -> Tensor:
        """The ids of the largest `mtp_logits`, int64 (T,): what speculation guesses."""
        normed_TH = self._mtp_normed(mtp_hidden_TH, variant)
        ids: Tensor = self.lm_head.top(normed_TH, self.model.embed_tokens.weight, 1)[1][:, 0]
        return ids

    def new_cache(self, capacity: int = 64) -> KVCache:
        """An empty cache for one sequence, with room for `capacity` tokens before it grows."""
        config = self.config
        return KVCache(
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
            dtype=self.kv_dtype or self.dtype,
            device=self.device,
            capacity=capacity,
        )

    def new_mtp_cache(self, capacity: int = 64) -> KVCache:
        """An empty cache for one sequence of a multi-token prediction block: a single layer."""
        config = self.config
        return KVCache(
            1,
            config.num_key_value_heads,
            config.head_dim,
            dtype=self.kv_dtype or self.dtype,
            device=self.device,
            capacity=capacity,
        )

    def _mtp_normed(self, mtp_hidden_TH: Tensor, variant: MtpVariant | None) -> Tensor:
        out: Tensor = (
            self.model.norm(mtp_hidden_TH) if (variant or MtpVariant()).final_norm_on_output else mtp_hidden_TH
        )
        return out

    def _head(self, normed_TH: Tensor) -> Tensor:
        out: Tensor = self.lm_head(normed_TH, self.model.embed_tokens.weight)
        return out
