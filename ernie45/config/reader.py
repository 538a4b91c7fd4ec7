"""Read and write `config.json` in the published spellings.

Three families exist: the original files beside -PT and -Paddle weights (flat, vision fields mixed in), the files that
transformers >= 5 writes for text models (rope inside `rope_parameters`), and its vision-language files (`text_config`
and `vision_config`). Source: architecture reference 1.2 to 1.5 and its list of what a reader should accept.

A key that is not known here is an error if it might change the network: a mistyped `moe_kk` must not silently build
another model. Keys that only steer training or speed are listed in `_INERT`; unknown keys whose value is null, false,
zero or empty switch nothing on and pass.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from ernie45.config.model import ModelConfig, MoeConfig, VisionConfig
from ernie45.config.nearest import nearest
from ernie45.errors import ConfigError, NotFoundError

_MAX_BYTES = 4 << 20

# Keys whose value is fixed by the architecture; null means "not stated".
_FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "use_rmsnorm": (True,),
    "compression_ratio": (1.0,),
    "moe_gate_act": ("softmax",),
    "scoring_func": ("softmax",),
    "moe_norm_gate_logits": (True,),
    "moe_group_experts": (False,),
    "rope_3d": (True, False),
    "use_temporal_conv": (True,),
    "mm_vocab_size": (0,),
    "moe_use_hard_gate": (True, False),
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
}
_VISION_FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("quick_gelu",),
    "rope_parameters": ({"rope_type": "axial", "rope_theta": 10000.0}, {"rope_type": "default", "rope_theta": 10000.0}),
    "rope_theta": (10000.0,),
}
# Keys that steer training, kernels, input handling or bookkeeping, but not what the network computes.
_INERT = re.compile(
    r"""architectures|model_type|auto_map|_name_or_path|transformers_version|paddleformers_version|torch_dtype|dtype|is_quantized
    |quantization_config|use_cache|cachekv_quant|_attn_implementation\w*|attn_implementation|output_\w+|return_dict|chunk_size\w*
    |task_specific_params|problem_type|id2label|label2id|pruned_heads|tokenizer_class|sep_token_id|decoder_start_token_id|cls_token_id
    |fuse_\w+|fp8_\w+|use_fp8\w*|use_flash\w*|use_sparse\w*|use_var_len\w*|use_fused\w*|use_recompute\w*|recompute\w*|refined_recompute
    |skip_recompute_ops|tensor_parallel\w*|pipeline_parallel\w*|sequence_parallel\w*|virtual_pp_degree|pp_\w+|sep_\w+|context_parallel\w*
    |tensor_model_parallel\w*|\w*dropout\w*|router_aux_loss_coef|moe_\w+_lambda|moe_capacity|moe_gate|moe_gate_detach|moe_gate_scale
    |moe_group|moe_dispatch\w*|moe_reverse_token_drop|moe_dense_experts_token_type_id|moe_multimodal_\w+|moe_group_orthogonal_loss
    |moe_use_token_type_bias|moe_z_loss\w*|sinkhorn_\w+|global_aux_loss|enable_\w+|num_acc_steps|dpo_config|multi_token_pred_lambda
    |token_balance\w*|loss_subbatch\w*|ignored_index|micro_batch_size|max_sequence_length|weight_share_add_bias|disable_ffn_model_parallel
    |modality_detach|max_text_id|token_type\w*|vision_model_name\w*|image_\w*pixels|video_\w*pixels|use_ep_comm_overlap|using_precision_check
    |use_fast_ln|use_mem_eff_attn|scale_qk_coeff|offload_\w+|use_async_a2a|use_combine_before_a2a|use_quant_before_a2a|generation_config""",
    re.VERBOSE,
)
_TEXT_MODEL_TYPES = ("ernie4_5", "ernie4_5_moe", "ernie")
_VL_MODEL_TYPES = ("ernie4_5_moe_vl", "ernie4_5_vl_moe", "ernie4_5_vl")


class _Fields:
    """A JSON object that remembers which of its keys were understood."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.data, self.where, self.known = data, where, set[str]()

    def has(self, *names: str) -> bool:
        return any(self.data.get(name) is not None for name in names)

    def take(self, *names: str) -> Any:
        """The first stated value among spellings of one field; contradicting spellings are an error."""
        self.known.update(names)
        stated = {name: self.data[name] for name in names if self.data.get(name) is not None}
        values = list(stated.values())
        if any(value != values[0] for value in values[1:]):
            raise ConfigError(f"{self.where}: spellings of one field contradict each other: {stated}")
        return values[0] if values else None

    def integer(self, *names: str, default: int | None = None) -> int:
        value = self.take(*names)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{self.where}: {names[0]} is {value!r}, expected an integer")
        return value

    def number(self, *names: str, default: float) -> float:
        value = self.take(*names)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{self.where}: {names[0]} is {value!r}, expected a number")
        return float(value)

    def boolean(self, *names: str, default: bool) -> bool:
        value = self.take(*names)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {names[0]} is {value!r}, expected true or false")
        return value

    def pair(self, name: str, default: int) -> tuple[int, int]:
        """A field that is one integer, or a list with one integer for text experts and one for vision experts."""
        value = self.take(name)
        values = [default] if value is None else value if isinstance(value, list) else [value]
        if len(values) not in (1, 2) or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            raise ConfigError(f"{self.where}: {name} is {value!r}, expected an integer or a list of two integers")
        return values[0], values[-1]

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A field that is one token id, a list of them, or nothing."""
        value = self.take(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ConfigError(f"{self.where}: {name} is {value!r}, expected a token id or a list of them")
        return tuple(ids)

    def sub(self, name: str) -> _Fields:
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{self.where}: {name} is {value!r}, expected an object")
        return _Fields(value or {}, f"{self.where}, {name}")

    def check_fixed(self, fixed: dict[str, tuple[object, ...]]) -> None:
        for name, allowed in fixed.items():
            value = self.take(name)
            if value is not None and value not in allowed:
                raise ConfigError(
                    f"{self.where}: {name} is {value!r}, but ERNIE 4.5 has {' or '.join(map(repr, allowed))}"
                )

    def check_unknown(self, ignore_keys: tuple[str, ...]) -> None:
        for name, value in self.data.items():
            harmless = name in self.known or name in ignore_keys or not value or _INERT.fullmatch(name)
            if not harmless:
                raise ConfigError(
                    f"{self.where}: unknown key {name!r} = {str(value)[:80]!r} might change the network; the "
                    f"nearest known key is {nearest(name, self.known)!r}. Correct it, remove it, or, if it is inert, "
                    "name it in ignore_keys"
                )


def read_config(path: str | Path, *, ignore_keys: tuple[str, ...] = ()) -> ModelConfig:
    """Read `config.json` from a folder or file; see `ModelConfig.from_pretrained`."""
    return parse_config(*load_config_json(path), ignore_keys=ignore_keys)


def load_config_json(path: str | Path) -> tuple[dict[str, Any], str]:
    """The parsed JSON object of a checkpoint's config file, and the file's name for messages.

    Raises: NotFoundError without such a file; ConfigError if it is no JSON object or larger than 4 MiB.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    if not file.is_file():
        raise NotFoundError(f"{file} does not exist: a checkpoint folder holds a config.json beside its weights")
    if file.stat().st_size > _MAX_BYTES:
        raise ConfigError(f"{file} has {file.stat().st_size} bytes; a config.json is smaller than {_MAX_BYTES}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file} holds a {type(data).__name__}, expected a JSON object")
    return data, str(file)


def parse_config(data: dict[str, Any], where: str = "config.json", ignore_keys: tuple[str, ...] = ()) -> ModelConfig:
    """Turn the parsed content of a `config.json` into a `ModelConfig`. Raises: ConfigError."""
    model_type = data.get("model_type")
    if model_type not in _TEXT_MODEL_TYPES + _VL_MODEL_TYPES:
        known = ", ".join(_TEXT_MODEL_TYPES[:2] + _VL_MODEL_TYPES)
        raise ConfigError(f"{where}: model_type is {model_type!r}, expected one of {known}")
    top = _Fields(data, where)
    if model_type in _TEXT_MODEL_TYPES:
        return _read_language(top, None, ignore_keys)
    if not isinstance(data.get("text_config"), dict):
        return _read_language(top, _read_vision(top.sub("vision_config"), top, ignore_keys), ignore_keys)
    vision = _read_vision(top.sub("vision_config"), top, ignore_keys)
    text = top.sub("text_config")
    for shared in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
        value = top.take(shared)
        if value is not None and text.data.get(shared) is None:
            text.data = text.data | {shared: value}
    top.check_unknown(ignore_keys)
    return _read_language(text, vision, ignore_keys)


def _read_language(fields: _Fields, vision: VisionConfig | None, ignore_keys: tuple[str, ...]) -> ModelConfig:
    fields.check_fixed(_FIXED)
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    num_layers = fields.integer("num_hidden_layers")
    config = ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", default=heads),
        head_dim=fields.integer("head_dim", default=hidden // max(heads, 1)),
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-5),
        rope_theta=_read_rope(fields, vision),
        max_position_embeddings=fields.integer("max_position_embeddings", default=131072),
        use_bias=fields.boolean("use_bias", default=False),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=True),
        num_nextn_predict_layers=fields.integer("num_nextn_predict_layers", default=0),
        initializer_range=fields.number("initializer_range", default=0.02),
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_id=fields.token_ids("eos_token_id"),
        pad_token_id=next(iter(fields.token_ids("pad_token_id")), None),
        moe=_read_moe(fields, num_layers),
        vision=vision,
    )
    fields.check_unknown(ignore_keys)
    return config


def _read_rope(fields: _Fields, vision: VisionConfig | None) -> float:
    parameters = fields.sub("rope_parameters")
    scaling = fields.sub("rope_scaling")
    top_level = fields.take("rope_theta")
    for rope in (parameters, scaling):
        kind = rope.take("rope_type", "type")
        if kind not in (None, "default", "ernie_3d"):
            raise ConfigError(
                f"{rope.where}: rope type is {kind!r}, ERNIE 4.5 uses unscaled rotary embedding ('default')"
            )
        section = rope.take("mrope_section")
        if section is not None and (vision is None or section[-1:] != [vision.freq_allocation]):
            raise ConfigError(
                f"{rope.where}: mrope_section {section} does not end with freq_allocation="
                f"{vision.freq_allocation if vision else None}"
            )
    inner = parameters.number("rope_theta", default=0.0)
    scaling.check_unknown(())
    parameters.check_unknown(("partial_rotary_factor",) if parameters.data.get("partial_rotary_factor") == 1.0 else ())
    if top_level is not None and inner and float(top_level) != inner:
        raise ConfigError(f"{fields.where}: rope_theta is {top_level}, but rope_parameters say {inner}")
    return inner or fields.number("rope_theta", default=500000.0)


def _read_moe(fields: _Fields, num_layers: int) -> MoeConfig | None:
    experts = fields.pair("moe_num_experts", 0) if not fields.has("num_experts") else fields.pair("num_experts", 0)
    fields.known.update(("moe_num_experts", "num_experts"))
    if experts[0] != experts[1]:
        raise ConfigError(
            f"{fields.where}: text and vision pools differ in size, {experts}; published models have equal pools"
        )
    starts, ends = fields.pair("moe_layer_start_index", 0), fields.pair("moe_layer_end_index", -1)
    widths = fields.take("moe_intermediate_size")
    text_width, vision_width = fields.pair("moe_intermediate_size", 0)
    interval = fields.integer("moe_layer_interval", default=1)
    start = min(starts)
    end = -1 if -1 in ends else max(ends)
    layer_types = fields.take("mlp_layer_types")
    if layer_types is not None:
        start, end, interval = _pattern_of(layer_types, num_layers, fields.where)
    moe_k = fields.take("moe_k", "num_experts_per_tok")
    shared = fields.integer("moe_num_shared_experts", default=0)
    moe_norm_min = fields.number("moe_norm_min", default=1e-12)
    aux_free = fields.boolean("moe_use_aux_free", default=True)
    if not experts[0]:
        return None
    return MoeConfig(
        moe_num_experts=experts[0],
        moe_k=moe_k,
        moe_intermediate_size=text_width,
        moe_num_shared_experts=shared,
        moe_layer_start_index=start,
        moe_layer_end_index=end,
        moe_layer_interval=interval,
        moe_use_aux_free=aux_free,
        moe_norm_min=moe_norm_min,
        moe_vision_intermediate_size=vision_width if isinstance(widths, list) and len(widths) == 2 else 0,
    )


def _pattern_of(layer_types: Any, num_layers: int, where: str) -> tuple[int, int, int]:
    """Start, end and interval that describe a list of "dense" and "sparse"."""
    sparse = [i for i, kind in enumerate(layer_types) if kind == "sparse"] if isinstance(layer_types, list) else []
    if not sparse or len(layer_types) != num_layers or set(layer_types) - {"dense", "sparse"}:
        raise ConfigError(
            f"{where}: mlp_layer_types must name {num_layers} layers 'dense' or 'sparse', some of them sparse"
        )
    interval = sparse[1] - sparse[0] if len(sparse) > 1 else 1
    start, end = sparse[0], sparse[-1]
    if sparse != list(range(start, end + 1, interval)) or (interval > 1 and (start + 1) % interval):
        raise ConfigError(f"{where}: the MoE layers {sparse} follow no start/end/interval rule")
    return start, end, interval


def _read_vision(fields: _Fields, top: _Fields, ignore_keys: tuple[str, ...]) -> VisionConfig:
    fields.check_fixed(_VISION_FIXED)
    default = VisionConfig()
    width = fields.integer("embed_dim", "hidden_size", default=default.hidden_size)
    top_width = top.take("pixel_hidden_size")
    if top_width is not None and top_width != width:
        raise ConfigError(f"{top.where}: pixel_hidden_size is {top_width}, but the vision encoder is {width} wide")
    ratio = fields.number("mlp_ratio", default=4)
    mrope = (top.sub("rope_scaling").data or top.sub("text_config").data.get("rope_parameters") or {}).get(
        "mrope_section"
    )
    vision = VisionConfig(
        depth=fields.integer("depth", "num_hidden_layers", default=default.depth),
        hidden_size=width,
        num_heads=fields.integer("num_heads", "num_attention_heads", default=default.num_heads),
        intermediate_size=fields.integer("intermediate_size", default=int(width * ratio)),
        patch_size=fields.integer("patch_size", default=default.patch_size),
        in_channels=fields.integer("in_channels", "in_chans", default=default.in_channels),
        spatial_merge_size=fields.integer(
            "spatial_merge_size", default=top.integer("spatial_conv_size", default=default.spatial_merge_size)
        ),
        temporal_merge_size=fields.integer(
            "temporal_merge_size", default=top.integer("temporal_conv_size", default=default.temporal_merge_size)
        ),
        layer_norm_eps=fields.number("rms_norm_eps", "layer_norm_eps", default=default.layer_norm_eps),
        freq_allocation=top.integer("freq_allocation", default=mrope[-1] if mrope else default.freq_allocation),
        im_patch_id=top.integer("im_patch_id", "image_token_id", default=default.im_patch_id),
        video_patch_id=top.integer("video_token_id", default=default.video_patch_id),
        image_start_token_id=top.integer("image_start_token_id", default=default.image_start_token_id),
        image_end_token_id=top.integer("image_end_token_id", default=default.image_end_token_id),
        video_start_token_id=top.integer("video_start_token_id", default=default.video_start_token_id),
        video_end_token_id=top.integer("video_end_token_id", default=default.video_end_token_id),
    )
    fields.check_unknown(
        (*ignore_keys, "initializer_range", "vit_first_fwd_bsz", "vit_num_recompute_layers", "variable_resolution")
    )
    return vision


def config_to_json(config: ModelConfig, *, dtype: str, layout: Literal["pt", "paddle"] = "pt") -> dict[str, Any]:
    """The `config.json` content of a checkpoint that we write, in the original spelling.

    transformers >= 5 and FastDeploy read it as it stands. Args: dtype: published name of the weights' dtype, such as
    `bfloat16`. layout: the -Paddle files name their architecture with one more underscore.
    """
    data: dict[str, Any] = {
        "architectures": [_architecture(config, layout)],
        "model_type": "ernie4_5_moe_vl" if config.vision else "ernie4_5_moe" if config.moe else "ernie4_5",
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "use_bias": config.use_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id[0] if len(config.eos_token_id) == 1 else list(config.eos_token_id),
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
    }
    if config.num_nextn_predict_layers:
        data["num_nextn_predict_layers"] = config.num_nextn_predict_layers
    if config.moe is not None:
        data |= _moe_to_json(config, config.moe)
    if config.vision is not None:
        data |= _vision_to_json(config, config.vision)
    return data


def _architecture(config: ModelConfig, layout: str) -> str:
    if config.vision is not None:
        return "Ernie4_5_VLMoeForConditionalGeneration"
    if config.moe is not None:
        return "Ernie4_5_MoeForCausalLM"
    return "Ernie4_5_ForCausalLM" if layout == "paddle" else "Ernie4_5ForCausalLM"


def _moe_to_json(config: ModelConfig, moe: MoeConfig) -> dict[str, Any]:
    # -1 is written out: readers that compare the index literally would otherwise find no MoE layer at all.
    end = config.num_hidden_layers - 1 if moe.moe_layer_end_index == -1 else moe.moe_layer_end_index
    pools = 2 if moe.has_vision_pool else 1

    def per_pool(value: int) -> int | list[int]:
        return [value] * pools if pools > 1 else value

    return {
        "moe_num_experts": per_pool(moe.moe_num_experts),
        "moe_k": moe.moe_k,
        "moe_intermediate_size": [moe.moe_intermediate_size, moe.moe_vision_intermediate_size]
        if pools > 1
        else moe.moe_intermediate_size,
        "moe_num_shared_experts": moe.moe_num_shared_experts,
        "moe_layer_start_index": per_pool(moe.moe_layer_start_index),
        "moe_layer_end_index": per_pool(end),
        "moe_layer_interval": moe.moe_layer_interval,
        "moe_use_aux_free": moe.moe_use_aux_free,
        "moe_norm_min": moe.moe_norm_min,
        "moe_gate": "topk",
    }


def _vision_to_json(config: ModelConfig, vision: VisionConfig) -> dict[str, Any]:
    spatial = config.head_dim // 2 - vision.freq_allocation
    return {
        "rope_3d": True,
        "freq_allocation": vision.freq_allocation,
        "rope_scaling": {
            "type": "default",
            "mrope_section": [spatial - spatial // 2, spatial // 2, vision.freq_allocation],
        },
        "spatial_conv_size": vision.spatial_merge_size,
        "temporal_conv_size": vision.temporal_merge_size,
        "use_temporal_conv": True,
        "pixel_hidden_size": vision.hidden_size,
        "moe_use_hard_gate": True,
        "im_patch_id": vision.im_patch_id,
        "video_token_id": vision.video_patch_id,
        "image_start_token_id": vision.image_start_token_id,
        "image_end_token_id": vision.image_end_token_id,
        "video_start_token_id": vision.video_start_token_id,
        "video_end_token_id": vision.video_end_token_id,
        "vision_config": {
            "model_type": "DFNRope_vision_transformer",
            "depth": vision.depth,
            "embed_dim": vision.hidden_size,
            "hidden_size": vision.hidden_size,
            "hidden_act": "quick_gelu",
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "num_heads": vision.num_heads,
            "in_channels": vision.in_channels,
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
            "layer_norm_eps": vision.layer_norm_eps,
        },
    }
