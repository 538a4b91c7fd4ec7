"""Convert a checkpoint with all that belongs to it: weights, config, tokenizer, template, licence."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ernie45.checkpoint.gguf import GGUFValue, ValueType, array
from ernie45.checkpoint.load import Progress
from ernie45.checkpoint.source import GgufSource, Source, open_source
from ernie45.checkpoint.write import DEFAULT_SHARD_BYTES, write_folder, write_gguf
from ernie45.errors import NotFoundError, UsageError
from ernie45.models.build import parse_dtype
from ernie45.processing.gguf_vocab import tokenizer_files_from_gguf
from ernie45.processing.tokenizer import load_tokenizer
from ernie45.store.location import resolve

Format = Literal["pt", "paddle", "gguf"]

# Small files that travel with the weights.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "*preprocessor_config.json",
    "provenance.json",
    "LICENSE*",
    "NOTICE*",
)
_UNUSED_TOKEN_TYPE = 5
_MAX_COMPANION_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion did."""

    source: str
    target: str
    from_format: str
    to_format: str
    notes: tuple[str, ...] = field(default=())
    """What could not be taken along, in words."""


def convert(
    src: str | Path,
    dst: str | Path,
    to: Format,
    *,
    dtype: str = "auto",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    extra_files: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write the checkpoint at `src` to `dst` in another format; -PT and -Paddle are bit-exact both ways.

    Args: src: a checkpoint folder, a GGUF file, or a model in the store. dst: a folder, or a .gguf file for `gguf`. to:
            `pt`, `paddle` or `gguf`. dtype: `auto` keeps every tensor as it is; otherwise `float32`, `bfloat16` or
            `float16` for all but router weights and correction bias. max_shard_bytes: largest weight file. overwrite:
            replace `dst`. extra_files: further files by name.
    Raises: UsageError, NotFoundError, ConfigError, CheckpointError, CapacityError. `dst` is written whole or not at
    all.
    """
    if to not in get_args(Format):
        raise UsageError(f"cannot convert to {to!r}, expected one of {', '.join(get_args(Format))}")
    if to == "gguf" and Path(dst).suffix != ".gguf":
        raise UsageError(f"{dst} is no name for a GGUF file: it must end in .gguf, or no program will read it")
    source = open_source(resolve(src))
    torch_dtype = None if dtype == "auto" else parse_dtype(dtype)
    notes = [source.account.left_out["model.mtp_*"]] if source.mtp_dropped else []
    if to == "gguf":
        name = str(source.file.metadata.get("general.name", "")) if isinstance(source, GgufSource) else ""
        vocabulary, missing = gguf_vocabulary(source)
        notes += missing + write_gguf(
            source,
            dst,
            name=name or Path(src).stem,
            dtype=torch_dtype,
            vocabulary=vocabulary,
            overwrite=overwrite,
            progress=progress,
        )
    else:
        write_folder(
            source,
            dst,
            layout=to,
            dtype=torch_dtype,
            max_shard_bytes=max_shard_bytes,
            extra_files=companions(source) | dict(extra_files or {}),
            overwrite=overwrite,
            progress=progress,
        )
    return Conversion(source=str(src), target=str(dst), from_format=source.format, to_format=to, notes=tuple(notes))


def companions(source: Source) -> dict[str, bytes]:
    """Small files that travel with the weights, by name: tokenizer, template, licence."""
    if isinstance(source, GgufSource):
        if "tokenizer.ggml.tokens" not in source.file.metadata:
            return {}
        return dict(tokenizer_files_from_gguf(source.file.metadata))
    return companions_of_folder(Path(source.where))


def companions_of_folder(folder: Path) -> dict[str, bytes]:
    """The same of a folder, whether it holds weights or not."""
    files = [path for path in folder.iterdir() if path.is_file() and path.stat().st_size < _MAX_COMPANION_BYTES]
    return {
        path.name: path.read_bytes()
        for path in files
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in _COMPANIONS)
    }


def gguf_vocabulary(source: Source) -> tuple[dict[str, GGUFValue], list[str]]:
    """The tokenizer as metadata of a GGUF file, and what is missing of it, in words."""
    if isinstance(source, GgufSource):
        metadata = {key: value for key, value in source.file.metadata.items() if key.startswith("tokenizer.")}
        return {key: _typed(value) for key, value in metadata.items()}, []
    try:
        metadata = dict(load_tokenizer(source.where).gguf_metadata())
    except NotFoundError:
        return {}, ["tokenizer: the folder has none, so llama.cpp can use the file for token ids only"]
    _pad_vocabulary(metadata, source.config.vocab_size)
    return {key: _typed(value) for key, value in metadata.items()}, []


def _pad_vocabulary(metadata: dict[str, Any], vocab_size: int) -> None:
    """llama.cpp wants one token per embedding row; published ERNIE tables have padding rows behind the last token."""
    missing = range(len(metadata["tokenizer.ggml.tokens"]), vocab_size)
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], *(f"<unused_row_{i}>" for i in missing)]
    metadata["tokenizer.ggml.token_type"] = [
        *metadata["tokenizer.ggml.token_type"],
        *(_UNUSED_TOKEN_TYPE for _ in missing),
    ]
    if "tokenizer.ggml.scores" in metadata:
        metadata["tokenizer.ggml.scores"] = [*metadata["tokenizer.ggml.scores"], *(0.0 for _ in missing)]


def _typed(value: Any) -> GGUFValue:
    if not isinstance(value, list | tuple):
        return value
    kinds = {bool: ValueType.BOOL, str: ValueType.STRING, float: ValueType.FLOAT32, int: ValueType.INT32}
    return array(kinds[type(value[0])] if value else ValueType.STRING, value)
