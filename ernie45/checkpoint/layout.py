"""Which tensor of a checkpoint file lies where in the network: the name maps, as data, for every layout.

A `Stored` describes one tensor of a file: its name, shape and orientation, and the box (a range per leading dimension)
that it fills in a parameter or buffer of the network. The same list serves both directions: loading copies stored
tensors into boxes, writing cuts boxes out. Sources: architecture reference 4.2 (-PT), 4.3 (-Paddle), 4.4
(vision-language), 4.6 (GGUF).

The network fuses q/k/v and gate/up and stacks experts, so -PT tensors are row ranges of our parameters, and the fused
tensors of -Paddle are our parameters transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ernie45.config.model import ModelConfig, MoeConfig

Box = tuple[tuple[int, int], ...]
"""Start and end per leading dimension of a target; further dimensions are taken whole."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A range of rows of a stored tensor and the box of the network's tensor that it fills."""

    target: str
    """Name in the network's `state_dict`."""
    box: Box = ()
    rows: tuple[int, int] | None = None
    """Rows of the stored tensor (after transposition); None = all."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of a checkpoint file."""

    name: str
    shape: tuple[int, ...]
    """As stored; of a quantized tensor, as it is once dequantized."""
    parts: tuple[Part, ...]
    transposed: bool = False
    """Stored as [in, out] while the network holds [out, in]."""
    keep_float32: bool = False
    """Router weights and correction bias stay float32 whatever the checkpoint's dtype is."""
    half_split_heads: int = 0
    """Rows belong to this many heads whose rotary halves are stored one after the other ("NeoX"); the network
    interleaves.
    """

    @property
    def is_mtp(self) -> bool:
        """Whether the tensor belongs to the multi-token prediction block."""
        return ".mtp_" in self.name


def pt_layout(config: ModelConfig) -> list[Stored]:
    """Tensors of a -PT checkpoint, text or vision-language, in network order."""
    return list(_pt_layout(config))


def paddle_layout(config: ModelConfig) -> list[Stored]:
    """Tensors of a -Paddle checkpoint: q/k/v and gate/up fused, every linear weight transposed."""
    return [_to_paddle(stored) for stored in _fused_layout(config)]


def gguf_layout(config: ModelConfig, architecture: str) -> list[Stored]:
    """Tensors of a GGUF file, dimensions in torch order, without the multi-token prediction block (llama.cpp has none).

    Args: architecture: `general.architecture` of the file. `qwen2` stores half-split heads and only the q/k/v bias
        vectors; `llama` and ERNIE's own architectures store interleaved heads, as the network does.
    """
    return list(_gguf_layout(config, architecture))


def _whole(name: str, shape: tuple[int, ...], target: str | None = None, **changes: bool) -> Stored:
    return Stored(name=name, shape=shape, parts=(Part(target=target or name),), **changes)


def _pt_layout(config: ModelConfig) -> Iterator[Stored]:
    """-PT names; each fused parameter of the network falls apart into row ranges."""
    for stored in _fused_layout(config):
        prefix, _, leaf = stored.name.rpartition(".")
        parent, _, module = prefix.rpartition(".")
        if module == "qkv_proj":
            yield from _split_rows(stored, parent, leaf, _qkv_widths(config))
        elif module == "up_gate_proj":
            half = stored.shape[0] // 2
            yield from _split_rows(stored, parent, leaf, {"gate_proj": half, "up_proj": half})
        else:
            yield stored


def _split_rows(stored: Stored, parent: str, leaf: str, widths: dict[str, int]) -> Iterator[Stored]:
    (part,) = stored.parts
    start = 0
    for name, width in widths.items():
        box = (*part.box, (start, start + width))
        yield replace(
            stored,
            name=f"{parent}.{name}.{leaf}",
            shape=(width, *stored.shape[1:]),
            parts=(replace(part, box=box),),
        )
        start += width


def _qkv_widths(config: ModelConfig) -> dict[str, int]:
    kv = config.num_key_value_heads * config.head_dim
    return {"q_proj": config.num_attention_heads * config.head_dim, "k_proj": kv, "v_proj": kv}


def _fused_layout(config: ModelConfig) -> Iterator[Stored]:
    """Published names under the -PT prefix with the -Paddle fusions, untransposed: the common ground of both."""
    vocab_table = (config.vocab_size, config.hidden_size)
    yield _whole("model.embed_tokens.weight", vocab_table)
    for layer in range(config.num_hidden_layers):
        yield from _decoder_layer(config, f"model.layers.{layer}", config.moe if config.is_moe_layer(layer) else None)
    yield _whole("model.norm.weight", (config.hidden_size,))
    if not config.tie_word_embeddings:
        yield _whole("lm_head.weight", vocab_table)
    if config.has_head_bias:
        yield _whole("lm_head.bias", (config.vocab_size,))
    for depth in range(config.num_nextn_predict_layers):
        yield _whole(f"model.mtp_emb_norm.{depth}.weight", (config.hidden_size,))
        yield _whole(f"model.mtp_hidden_norm.{depth}.weight", (config.hidden_size,))
        yield from _linear(config, f"model.mtp_linear_proj.{depth}", 2 * config.hidden_size, config.hidden_size)
        yield from _decoder_layer(config, f"model.mtp_block.{depth}", None)
    if config.vision is not None:
        yield from _vision(config)


def _linear(config: ModelConfig, name: str, width_in: int, width_out: int) -> Iterator[Stored]:
    yield _whole(f"{name}.weight", (width_out, width_in))
    if config.use_bias:
        yield _whole(f"{name}.bias", (width_out,))


def _swiglu(config: ModelConfig, name: str, width: int) -> Iterator[Stored]:
    yield from _linear(config, f"{name}.up_gate_proj", config.hidden_size, 2 * width)
    yield from _linear(config, f"{name}.down_proj", width, config.hidden_size)


def _decoder_layer(config: ModelConfig, name: str, moe: MoeConfig | None) -> Iterator[Stored]:
    hidden = config.hidden_size
    yield from _linear(config, f"{name}.self_attn.qkv_proj", hidden, sum(_qkv_widths(config).values()))
    yield from _linear(config, f"{name}.self_attn.o_proj", config.num_attention_heads * config.head_dim, hidden)
    if moe is None:
        yield from _swiglu(config, f"{name}.mlp", config.intermediate_size)
    else:
        yield from _moe_block(config, f"{name}.mlp", moe)
    yield _whole(f"{name}.input_layernorm.weight", (hidden,))
    yield _whole(f"{name}.post_attention_layernorm.weight", (hidden,))


def _moe_block(config: ModelConfig, name: str, moe: MoeConfig) -> Iterator[Stored]:
    hidden, num = config.hidden_size, moe.moe_num_experts
    bias_name, pools = f"{name}.moe_statics.e_score_correction_bias", 1 + moe.has_vision_pool
    gates = (f"{name}.gate", f"{name}.vision_gate")[:pools]
    for stored_name, gate in zip((f"{name}.gate.weight", f"{name}.gate.weight_1"), gates, strict=False):
        # Vision-language files hold their routers as [hidden, experts], in both formats.
        shape = (hidden, num) if moe.has_vision_pool else (num, hidden)
        router = _whole(stored_name, shape, f"{gate}.weight", keep_float32=True)
        yield replace(router, transposed=moe.has_vision_pool)
    if moe.moe_use_aux_free:
        parts = tuple(Part(target=f"{g}.e_score_correction_bias", rows=(i, i + 1)) for i, g in enumerate(gates))
        yield Stored(name=bias_name, shape=(pools, num), parts=parts, keep_float32=True)
    yield from _pool(name, hidden, f"{name}.experts", num=num, width=moe.moe_intermediate_size)
    if moe.has_vision_pool:
        yield from _pool(
            name, hidden, f"{name}.vision_experts", num=num, width=moe.moe_vision_intermediate_size, first=num
        )
    if moe.moe_num_shared_experts:
        yield from _swiglu(config, f"{name}.shared_experts", moe.shared_intermediate_size)


def _pool(name: str, hidden: int, target: str, *, num: int, width: int, first: int = 0) -> Iterator[Stored]:
    for expert in range(num):
        box = ((expert, expert + 1),)
        published = f"{name}.experts.{first + expert}"
        for leaf, shape in (("up_gate_proj", (2 * width, hidden)), ("down_proj", (hidden, width))):
            yield Stored(
                name=f"{published}.{leaf}.weight", shape=shape, parts=(Part(target=f"{target}.{leaf}", box=box),)
            )


def _vision(config: ModelConfig) -> Iterator[Stored]:
    vision = config.vision
    assert vision is not None, "only called for vision-language models"
    width, ffn, hidden = vision.hidden_size, vision.intermediate_size, config.hidden_size
    window = width * vision.spatial_merge_size**2
    shapes: dict[str, tuple[int, ...]] = {"vision_model.patch_embed.proj.weight": (width, vision.patch_width)}
    for block in range(vision.depth):
        name = f"vision_model.blocks.{block}"
        for leaf, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", ffn, width),
            ("mlp.fc2", width, ffn),
        ):
            shapes |= {f"{name}.{leaf}.weight": (rows, columns), f"{name}.{leaf}.bias": (rows,)}
        shapes |= {f"{name}.norm{i}.{leaf}": (width,) for i in (1, 2) for leaf in ("weight", "bias")}
    shapes |= {f"vision_model.ln.{leaf}": (width,) for leaf in ("weight", "bias")}
    resampler = "model.resampler_model"
    for stage, joined in (("spatial_linear", window), ("temporal_linear", vision.temporal_merge_size * window)):
        shapes |= {f"{resampler}.{stage}.0.weight": (window, joined), f"{resampler}.{stage}.0.bias": (window,)}
        shapes |= {f"{resampler}.{stage}.2.weight": (window, window), f"{resampler}.{stage}.2.bias": (window,)}
        shapes |= {f"{resampler}.{stage}.3.{leaf}": (window,) for leaf in ("weight", "bias")}
    shapes |= {f"{resampler}.mlp.weight": (hidden, window), f"{resampler}.mlp.bias": (hidden,)}
    shapes[f"{resampler}.after_norm.weight"] = (hidden,)
    for stored_name, shape in shapes.items():
        yield _whole(stored_name, shape, stored_name.removeprefix("model."))


def _to_paddle(stored: Stored) -> Stored:
    """Rename to the -Paddle prefix and transpose what is transposed there: projections, text routers, untied head."""
    name = "ernie." + stored.name.removeprefix("model.") if stored.name.startswith("model.") else stored.name
    is_matrix = len(stored.shape) == 2 and not name.endswith(("embed_tokens.weight", "e_score_correction_bias"))
    if not is_matrix or stored.transposed:
        return replace(stored, name=name)
    return replace(stored, name=name, shape=stored.shape[::-1], transposed=True)


_GGUF_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.moe_statics.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_GGUF_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "lm_head.bias": "output.bias",
}


def _gguf_layout(config: ModelConfig, architecture: str) -> Iterator[Stored]:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for stored in _pt_layout(config):
        if stored.is_mtp or ".mlp.experts." in stored.name:
            continue
        if stored.name in _GGUF_TOP:
            yield replace(stored, name=_GGUF_TOP[stored.name])
            continue
        layer, _, rest = stored.name.removeprefix("model.layers.").partition(".")
        module, _, leaf = rest.rpartition(".")
        name = _GGUF_LAYER.get(rest) or f"{_GGUF_LAYER[module]}.{leaf}"
        if (
            architecture == "qwen2"
            and leaf == "bias"
            and module not in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        ):
            continue
        if rest.endswith("e_score_correction_bias"):
            parts = tuple(replace(part, rows=None) for part in stored.parts)
            stored = replace(stored, shape=stored.shape[-1:], parts=parts)  # noqa: PLW2901
        half_split = heads.get(name.split(".")[0], 0) if architecture == "qwen2" else 0
        yield replace(stored, name=f"blk.{layer}.{name}", half_split_heads=half_split)
    for layer_idx in range(config.num_hidden_layers):
        if config.moe is not None and config.is_moe_layer(layer_idx):
            yield from _gguf_experts(config, config.moe, layer_idx)


def _gguf_experts(config: ModelConfig, moe: MoeConfig, layer: int) -> Iterator[Stored]:
    num, width, hidden = moe.moe_num_experts, moe.moe_intermediate_size, config.hidden_size
    target = f"model.layers.{layer}.mlp.experts"
    for leaf, shape, parameter, rows in (
        ("ffn_gate_exps", (num, width, hidden), "up_gate_proj", (0, width)),
        ("ffn_up_exps", (num, width, hidden), "up_gate_proj", (width, 2 * width)),
        ("ffn_down_exps", (num, hidden, width), "down_proj", (0, hidden)),
    ):
        part = Part(target=f"{target}.{parameter}", box=((0, num), rows))
        yield Stored(name=f"blk.{layer}.{leaf}.weight", shape=shape, parts=(part,))
