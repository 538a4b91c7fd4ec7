"""Run files of ERNIEKit turned into ours, with a word on every field that does not come along.

Fields and defaults: training reference 4.2. Only what the file states is taken over; what it leaves out gets our defaults, apart from
those that ERNIEKit would fill in differently and that change what is learnt (`_DEFAULTS`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie45.config.run_file import dump_run, parse_run, read_yaml
from ernie45.errors import ConfigError
from ernie45.training.config import RunConfig

_METHODS = {
    "sft": "sft",
    "dpo": "dpo",
    "pt": "pretrain",
    "pretrain": "pretrain",
    "pre-training": "pretrain",
    "kto": "kto",
}
_LONG_ROWS = {"delete": "drop", "left": "left", "right": "right"}
_CURVES = {"half_life": "half_life", "1-sqrt": "1-sqrt"}

# What ERNIEKit does where its file says nothing, if it is not what we do.
_DEFAULTS: dict[str, Any] = {
    "stage": "SFT",
    "fine_tuning": "LoRA",
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
    "adam_beta2": 0.999,
    "compute_type": "bf16",
}


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A run file of ours, and what became of the other one's fields."""

    config: RunConfig
    report: tuple[str, ...]


def convert_erniekit(path: str | Path) -> Converted:
    """Read a run file of ERNIEKit (YAML or JSON).

    Raises: NotFoundError; ConfigError for a stage that there is no method for, or a value that ours cannot hold.
    """
    stated = read_yaml(path)
    if not isinstance(stated, dict) or not all(isinstance(key, str) for key in stated):
        raise ConfigError(f"{path}: expected fields with values, as in `learning_rate: 1e-5`")
    return _convert(stated, str(path))


def _convert(stated: dict[str, Any], origin: str) -> Converted:
    fields = _DEFAULTS | {key: _number(value) for key, value in stated.items()}
    ours: dict[str, Any] = {}
    report: list[str] = []
    for key, value in fields.items():
        said = key in stated
        if key in _READ_BELOW:
            continue
        if key in _PLAIN:
            _put(ours, _PLAIN[key], value)
        elif key in _TURNED:
            _turn(ours, report, key, value)
        elif said:
            report.append(_left_out(key, value))
    _put(ours, "optimizer.betas", [fields.get("adam_beta1", 0.9), fields["adam_beta2"]])
    _length(ours, fields, report)
    _method(ours, fields, origin)
    report += _unread_sections(ours)
    _sources(ours, fields, report, origin)
    _adapters(ours, fields)
    config = parse_run(dump_run(ours), RunConfig, origin=origin)
    return Converted(config=config, report=tuple(report))


def _turn(ours: dict[str, Any], report: list[str], key: str, value: Any) -> None:
    path, turn = _TURNED[key]
    turned = turn(value)
    if turned is None:
        report.append(f"{key}: {value} was left out: {path} has no such value")
    else:
        _put(ours, path, turned)


def _method(ours: dict[str, Any], fields: Mapping[str, Any], origin: str) -> None:
    stage = str(fields["stage"]).lower()
    if stage not in _METHODS:
        raise ConfigError(
            f"{origin}: stage is {fields['stage']!r}, expected one of {', '.join(sorted(_METHODS))} (any case)"
        )
    ours["method"] = _METHODS[stage]


def _length(ours: dict[str, Any], fields: Mapping[str, Any], report: list[str]) -> None:
    """There, steps count if they are above 0, else epochs, of which one is the default."""
    steps, epochs = fields.get("max_steps", -1), fields.get("num_train_epochs")
    if steps is None or (isinstance(steps, int | float) and steps <= 0):
        _put(ours, "train.epochs", 1 if epochs is None else epochs)
        return
    _put(ours, "train.steps", steps)
    if epochs is not None:
        report.append(f"num_train_epochs: {epochs} was left out: max_steps says how long the run is")


def _unread_sections(ours: dict[str, Any]) -> list[str]:
    """Take out what the method does not read; ERNIEKit's files often carry the fields of all stages."""
    unread = {"dpo": ("loss",), "kto": ("loss", "preference")}.get(ours["method"], ("preference", "reference"))
    return [
        f"{section}: {name} was left out: {ours['method']} does not read it"
        for section in unread
        for name in ours.pop(section, {})
    ]


def _sources(ours: dict[str, Any], fields: Mapping[str, Any], report: list[str], origin: str) -> None:
    for part, ending in (("train", "train_dataset"), ("valid", "eval_dataset")):
        paths = [path.strip() for path in str(fields.get(f"{ending}_path") or "").split(",") if path.strip()]
        shares = [float(share) for share in str(fields.get(f"{ending}_prob") or "1.0").split(",")]
        if part == "train" and not paths:
            raise ConfigError(f"{origin}: train_dataset_path is missing: name the file or files to learn from")
        if part == "valid":
            shares = []  # every held-out row counts once
        if shares and len(shares) != len(paths):
            raise ConfigError(
                f"{origin}: {len(paths)} paths in {ending}_path, but {len(shares)} shares in {ending}_prob"
            )
        sources: list[dict[str, Any]] = [{"path": path} for path in paths]
        if len(shares) > 1:
            sources = [{"path": path, "weight": share} for path, share in zip(paths, shares, strict=True)]
        if sources:
            _put(ours, f"data.{part}", sources)
    if fields.get("train_dataset_type"):
        report.append(
            f"train_dataset_type: {fields['train_dataset_type']} is not needed: the form of each row is told from its keys"
        )


def _adapters(ours: dict[str, Any], fields: Mapping[str, Any]) -> None:
    if not (fields.get("lora") or str(fields["fine_tuning"]).lower() == "lora"):
        return
    plus = bool(fields.get("rslora_plus"))
    stated = {
        "rank": fields.get("lora_rank"),
        "alpha": fields.get("lora_alpha", 4 if plus else None),
        "rslora": fields.get("rslora", plus or None),
        "lora_plus_scale": fields.get("lora_plus_scale", 4 if plus else None),
    }
    ours["lora"] = {name: value for name, value in stated.items() if value is not None}


def _left_out(key: str, value: Any) -> str:
    for words, reason in _REASONS:
        if any(word in key for word in words):
            return f"{key}: {value} was left out: {reason}"
    return f"{key}: {value} was left out: no field of ours does this"


def _put(ours: dict[str, Any], path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for section in sections:
        ours = ours.setdefault(section, {})
    ours[name] = value


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` as a word."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


_READ_BELOW = (
    *("stage", "fine_tuning", "adam_beta1", "adam_beta2", "max_steps", "num_train_epochs"),
    *("lora", "lora_rank", "lora_alpha", "rslora", "rslora_plus", "lora_plus_scale"),
    *("train_dataset_path", "train_dataset_prob", "train_dataset_type"),
    *("eval_dataset_path", "eval_dataset_prob", "eval_dataset_type"),
)
"""Fields that functions of their own read."""

_PLAIN = {
    "model_name_or_path": "model.start",
    "max_seq_len": "data.max_seq_len",
    "max_prompt_len": "data.max_prompt_len",
    "mask_out_eos_token": "data.mask_out_eos",
    "random_shuffle": "data.shuffle",
    "batch_size": "train.rows_per_pass",
    "per_device_train_batch_size": "train.rows_per_pass",
    "gradient_accumulation_steps": "train.accumulation",
    "seed": "train.seed",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "max_grad_norm": "optimizer.clip",
    "layerwise_lr_decay_bound": "optimizer.layerwise_lr_decay_bound",
    "moe_gate_lr_ratio": "optimizer.gate_lr_ratio",
    "min_lr": "schedule.min_lr",
    "warmup_steps": "schedule.warmup_steps",
    "lr_scheduler_type": "schedule.kind",
    "lr_scheduler": "schedule.kind",
    "multi_token_pred_lambda": "loss.mtp_weight",
    "token_balance_loss": "loss.token_balance",
    "moe_aux_loss_lambda": "loss.router.balance",
    "moe_z_loss_lambda": "loss.router.z",
    "moe_orthogonal_loss_lambda": "loss.router.orthogonal",
    "moe_use_aux_free_update_coef": "balance.bias_rate",
    "beta": "preference.beta",
    "loss_type": "preference.loss_type",
    "pref_loss_ratio": "preference.pref_loss_ratio",
    "sft_loss_ratio": "preference.sft_loss_ratio",
    "normalize_logps": "preference.normalize_logps",
    "label_smoothing": "preference.label_smoothing",
    "simpo_gamma": "preference.simpo_gamma",
    "dpop_lambda": "preference.dpop_lambda",
    "offset_alpha": "preference.offset_alpha",
    "reference_free": "preference.reference_free",
}
"""Fields that mean the same under another name."""

_TURNED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "compute_type": ("model.dtype", lambda value: {"bf16": "bfloat16", "fp32": "float32"}.get(str(value))),
    "ref_model_update_steps": ("reference.refresh_steps", lambda value: max(0, int(value))),  # -1: never
    "decay_function": ("schedule.decay", lambda value: _CURVES.get(str(value))),
    "truncation_strategy": ("data.long_rows", lambda value: _LONG_ROWS.get(str(value))),
    "packing": ("data.packing", lambda value: "best_fit" if value else "none"),
    "in_tokens_batching": ("data.packing", lambda value: "best_fit" if value else "none"),
    "recompute": ("recompute.policy", lambda value: "full" if value else "none"),
}
"""Fields whose values are written in another way."""

_REASONS = (
    (("parallel", "pp_", "tp_", "sharding", "sep_", "nnodes", "master_"), "this run is on one process"),
    (("fuse_", "flash", "use_fused", "use_sparse"), "the fastest leaves are chosen without being asked"),
    (
        ("unified_checkpoint", "ckpt_quant", "zcc_", "convert_from_hf", "save_to_hf"),
        "checkpoints are whole, exact and -PT always",
    ),
    (("dispatch", "moe_group", "moe_gate", "capacity"), "experts are computed without dropping a token"),
    (("offload", "release_grads"), "there is one memory here"),
    (("logging_dir", "report_to", "output_dir", "overwrite"), "name the folder with --run; metrics are in it"),
    (("dataset", "buffer_size", "num_samples"), "the order of the data follows from the section data alone"),
)
