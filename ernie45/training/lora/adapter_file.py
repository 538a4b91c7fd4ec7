"""The two files of an adapter in PEFT's format, read and checked as far as that is possible without a network.

What an adapter could change beside linear layers and routed experts is refused, never left out in silence.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ernie45.checkpoint.safetensors import parse_json_object, read_header, read_tensor, shown
from ernie45.errors import CheckpointError, NotFoundError
from ernie45.training.lora.names import PREFIX
from ernie45.training.lora.write import CONFIG_NAME, WEIGHTS_NAME

_MAX_CONFIG_BYTES = 1 << 20
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
"""PEFT's names of what a module has."""
_KEY = re.compile(rf"{re.escape(PREFIX)}(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
# Settings that change what the tensors mean, with the value that means what is read here.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "trainable_token_indices": (None, [], {}),
}
# Initialisations that change the base model as well.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """An adapter folder, validated as far as it can be without a network."""

    folder: Path
    stated: Mapping[str, Any]
    """`adapter_config.json`."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """By module (with `.base_layer` where PEFT nests), then `lora_A.weight`, `lora_B.weight`, `lora_magnitude_vector`."""

    @property
    def base(self) -> str | None:
        """Name or path of the network that it belongs to, if the folder says so."""
        base = self.stated.get("base_model_name_or_path")
        return base if isinstance(base, str) and base else None

    @property
    def rslora(self) -> bool:
        """Whether alpha is divided by the root of the rank."""
        return self.stated.get("use_rslora") is True

    def alpha(self, name: str) -> float:
        """Of a module or stacked parameter. Raises: CheckpointError if it is no number above 0."""
        patterns = self.stated.get("alpha_pattern") or {}
        if not isinstance(patterns, Mapping):
            raise CheckpointError(f"{self.folder}: alpha_pattern is {str(patterns)[:40]}, expected an object")
        found = [value for pattern, value in patterns.items() if _fits(pattern, name, self.folder)]
        alpha = found[0] if found else self.stated.get("lora_alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e9:
            raise CheckpointError(
                f"{self.folder}: lora_alpha of {name} is {str(alpha)[:40]}, expected a number above 0"
            )
        return float(alpha)


def read_adapter(folder: str | Path) -> AdapterFile:
    """Read both files of a folder. Raises: NotFoundError; CheckpointError for what cannot be read or would be left out."""
    root = Path(folder)
    config = root / CONFIG_NAME
    if not config.is_file() or not (root / WEIGHTS_NAME).is_file():
        raise NotFoundError(f"{root} is no adapter: expected {CONFIG_NAME} and {WEIGHTS_NAME}")
    if config.stat().st_size > _MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"{config}: {config.stat().st_size} bytes, a configuration has at most {_MAX_CONFIG_BYTES}"
        )
    stated = parse_json_object(config.read_bytes(), config)
    _check_config(stated, config)
    tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, entry in read_header(root / WEIGHTS_NAME).entries.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{root}: tensor {shown(name)} is no part of a linear layer's or expert's adapter")
        tensors[match[1]][match[2]] = read_tensor(entry).float()
    for module, parts in tensors.items():
        _check_parts(module, parts, root, dora=stated.get("use_dora") is True)
    return AdapterFile(folder=root, stated=stated, tensors=dict(tensors))


def _check_config(stated: Mapping[str, Any], where: Path) -> None:
    for name, allowed in _PLAIN.items():
        if stated.get(name, allowed[-1]) not in allowed:
            raise CheckpointError(f"{where}: {name} is {str(stated.get(name))[:60]!r}, only {allowed[0]!r} can be read")
    variants = [name for name, value in stated.items() if name.startswith("use_") and value is True]
    unknown = sorted(set(variants) - {"use_rslora", "use_dora"})
    if unknown:
        raise CheckpointError(f"{where}: {', '.join(unknown)} is set: a kind of adapter that cannot be read")
    start = stated.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{where}: init_lora_weights is {start[:40]!r}, which changed the base model: convert the adapter to plain LoRA "
            "with PEFT (path_initial_model_for_weight_conversion)"
        )


def _check_parts(module: str, parts: Mapping[str, Tensor], root: Path, *, dora: bool) -> None:
    wanted = {A, B, MAGNITUDE} if dora else {A, B}
    if parts.keys() != wanted:
        raise CheckpointError(f"{root}: {shown(module)} has {sorted(parts)}, expected {sorted(wanted)}")
    if parts[A].ndim != 2 or parts[B].ndim != 2 or parts[A].shape[0] != parts[B].shape[1]:
        raise CheckpointError(
            f"{root}: {shown(module)} has A {list(parts[A].shape)} and B {list(parts[B].shape)}, expected [r, in] and [out, r]"
        )
    if not all(bool(tensor.isfinite().all()) for tensor in parts.values()):
        raise CheckpointError(f"{root}: the adapter on {shown(module)} holds values that are not finite")


def _fits(pattern: str, name: str, folder: Path) -> bool:
    """Whether a key of `alpha_pattern` means this module: PEFT takes it as an expression for the end of the name.

    Only names are understood, with the anchors and escapes that PEFT's own files carry: other expressions are refused.
    """
    plain = pattern.removeprefix("^").removeprefix(".*\\.").removesuffix("$").replace("\\", "")
    if not re.fullmatch(r"[\w.-]+", plain):
        raise CheckpointError(f"{folder}: alpha_pattern {shown(pattern)} is an expression: name the modules instead")
    return name == plain or (not pattern.startswith("^") and name.endswith(f".{plain}"))
