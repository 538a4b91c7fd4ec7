"""What a model is, in numbers: for `ernie show` and `ernie models`. Needs no torch for a published name."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ernie45.config.count import count_parameters
from ernie45.config.model import ModelConfig
from ernie45.config.presets import presets

_CACHED_TOKENS = 4096
# The front matter of a hub repository's model card.
_CARD_LICENCE = re.compile(r"^license:[ \t]*([\w.-]+)", re.MULTILINE)
_SPELLINGS = {"apache-2.0": "Apache-2.0", "mit": "MIT"}


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """The facts that somebody wants before loading a model."""

    name: str
    path: str | None
    """None for a published model that is not here."""
    kind: str
    """`dense text`, `MoE text` or `MoE vision-language`."""
    format: str | None
    dtype: str | None
    parameters: int
    active_parameters: int
    mtp_parameters: int
    context_tokens: int
    layers: int
    experts: str
    size_bytes: int | None
    """Of the weight files."""
    kv_bytes_per_token: int
    """At 16 bits per value."""
    memory_bytes: int
    """Weights at the file's width (16 bits for a model that is not here) and the cache of `memory_tokens`."""
    memory_tokens: int
    """4096, or the context if that is shorter."""
    licence: str


def describe_config(name: str, config: ModelConfig, *, bytes_per_weight: int = 2) -> ModelDescription:
    """Describe a network that is not on this machine."""
    count = count_parameters(config)
    tokens = min(_CACHED_TOKENS, config.max_position_embeddings)
    moe = config.moe
    return ModelDescription(
        name=name,
        path=None,
        kind="MoE vision-language" if config.vision else "MoE text" if moe else "dense text",
        format=None,
        dtype=None,
        parameters=count.total,
        active_parameters=count.active,
        mtp_parameters=count.mtp,
        context_tokens=config.max_position_embeddings,
        layers=config.num_hidden_layers,
        experts=f"{moe.moe_num_experts} routed, {moe.moe_k} active, {moe.moe_num_shared_experts} shared"
        if moe
        else "none",
        size_bytes=None,
        kv_bytes_per_token=config.kv_bytes_per_token(),
        memory_bytes=count.total_with_mtp * bytes_per_weight + tokens * config.kv_bytes_per_token(bytes_per_weight),
        memory_tokens=tokens,
        licence="Apache-2.0" if name in presets() else "not stated",
    )


def describe(name: str, path: Path) -> ModelDescription:
    """Describe a checkpoint folder or GGUF file. Raises: NotFoundError, ConfigError, CheckpointError."""
    from dataclasses import replace

    from ernie45.checkpoint.load import file_dtype
    from ernie45.checkpoint.source import GgufSource, PrequantizedSource, open_source
    from ernie45.models.build import dtype_name
    from ernie45.quant.folder import PackedSource

    source = open_source(path)
    dtype = file_dtype(source)
    size = source.file.path.stat().st_size if isinstance(source, GgufSource) else source.index.total_bytes
    described = describe_config(name, source.config, bytes_per_weight=dtype.itemsize)
    shown = "quantized" if isinstance(source, GgufSource) and _is_quantized(source) else dtype_name(dtype)
    if isinstance(source, PrequantizedSource):
        shown = source.weight_formats
    if isinstance(source, PackedSource):
        # Packed weights are used as they lie in the file; only the cache is float32.
        shown = source.statement.scheme.name
        cache = described.memory_tokens * source.config.kv_bytes_per_token(4)
        described = replace(described, memory_bytes=size + cache)
    return replace(
        described, path=str(path), format=source.format, dtype=shown, size_bytes=size, licence=_licence(path)
    )


def _is_quantized(source: object) -> bool:
    tensors = source.file.tensors.values()  # type: ignore[attr-defined]  # a GgufSource
    return any(tensor.type.torch_dtype is None for tensor in tensors)


def _licence(path: Path) -> str:
    """What the files beside the weights state, the most explicit one first."""
    folder = path if path.is_dir() else path.parent
    provenance = folder / "provenance.json"
    if provenance.is_file():
        return _stated_licence(provenance.read_bytes())
    for file in sorted(folder.glob("LICENSE*")):
        head = _head(file)
        return "Apache-2.0" if "Apache License" in head else f"see {file.name}"
    card = folder / "README.md"
    if card.is_file() and (match := _CARD_LICENCE.search(_head(card))):
        return _SPELLINGS.get(match[1].lower(), match[1])
    return "not stated"


def _stated_licence(provenance: bytes) -> str:
    try:
        stated = json.loads(provenance)
    except ValueError:
        return "not stated (provenance.json is damaged)"
    licence = stated.get("license") if isinstance(stated, dict) else None
    return str(licence or "not stated")


def _head(file: Path) -> str:
    with file.open(encoding="utf-8", errors="replace") as stream:
        return stream.read(2000)
