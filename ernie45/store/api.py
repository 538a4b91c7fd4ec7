"""The loading and saving calls of the public interface: they take a name from the store as well as a path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ernie45.checkpoint import load
from ernie45.checkpoint.gguf import read_gguf
from ernie45.checkpoint.gguf_config import config_from_gguf
from ernie45.checkpoint.load import Progress
from ernie45.checkpoint.source import ModuleSource
from ernie45.checkpoint.write import DEFAULT_SHARD_BYTES, FolderLayout, write_folder
from ernie45.config.model import ModelConfig
from ernie45.config.reader import read_config
from ernie45.errors import NotFoundError, UsageError
from ernie45.models.build import parse_dtype
from ernie45.models.text import CausalLM
from ernie45.processing import tokenizer as tokenizers
from ernie45.processing.gguf_vocab import tokenizer_files_from_gguf
from ernie45.processing.tokenizer import Tokenizer
from ernie45.store.convert import companions_of_folder
from ernie45.store.location import resolve, weights_path


def load_model(
    folder: str | Path,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    *,
    progress: Progress | None = None,
) -> CausalLM:
    """Load a network for inference from any format that can be read; see `ernie45.checkpoint.load.load_model`.

    Args: folder: a -PT or -Paddle folder, a .gguf file, or the name of a model in the store. dtype: `float32`,
            `bfloat16`, `float16`, or `auto` for what the file holds. device: a torch device that this machine has.
    Raises: UsageError for a device that is not there, and what loading raises.
    """
    return load.load_model(resolve(folder), dtype, _present(device), progress=progress)


def load_config(folder: str | Path) -> ModelConfig:
    """What a model is, without its weights: of a checkpoint folder, a .gguf file or a model in the store.

    Raises: NotFoundError, ConfigError, CheckpointError.
    """
    path = weights_path(resolve(folder))
    return config_from_gguf(read_gguf(path))[0] if path.suffix == ".gguf" else read_config(path)


def load_tokenizer(folder: str | Path, *, chat_format: str | None = None) -> Tokenizer:
    """Load the tokenizer and chat template of a checkpoint folder, a .gguf file or a model in the store.

    Args: chat_format: one of the built-in formats, instead of the checkpoint's own template.
    Raises: NotFoundError if there is no tokenizer; CheckpointError if its files are damaged.
    """
    path = weights_path(resolve(folder))
    if path.suffix != ".gguf":
        return tokenizers.load_tokenizer(path, chat_format=chat_format)
    metadata = read_gguf(path).metadata
    if "tokenizer.ggml.tokens" not in metadata:
        raise NotFoundError(f"{path} holds no vocabulary: it can be run with token ids only")
    with TemporaryDirectory() as scratch:
        for name, content in tokenizer_files_from_gguf(metadata).items():
            Path(scratch, name).write_bytes(content)
        return tokenizers.load_tokenizer(scratch, chat_format=chat_format)


def save_model(
    model: CausalLM,
    folder: str | Path,
    *,
    layout: FolderLayout = "pt",
    dtype: str | None = None,
    tokenizer: Tokenizer | None = None,
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a network from memory as a checkpoint that this package and transformers load.

    Args: dtype: None keeps the dtypes of the parameters; routers and correction bias stay float32. tokenizer: its files are
            written beside the weights. tokenizer_from: a folder whose tokenizer, template, generation config and licence are
            written instead, byte for byte.
    Raises: CheckpointError if the folder exists and `overwrite` is false, or the network has an adapter in place or packed
        weights; CapacityError when the disk is full.
    """
    files = dict(extra_files or {})
    if tokenizer_from is not None:
        files = companions_of_folder(Path(tokenizer_from)) | files
    if tokenizer is not None:
        with TemporaryDirectory() as scratch:
            tokenizer.save(scratch)
            files = {path.name: path.read_bytes() for path in Path(scratch).iterdir()} | files
    write_folder(
        ModuleSource(model, model.config),
        folder,
        layout=layout,
        dtype=None if dtype is None else parse_dtype(dtype),
        max_shard_bytes=max_shard_bytes,
        extra_files=files,
        overwrite=overwrite,
    )


def _present(device: str | torch.device) -> torch.device:
    """The device, if a tensor can be put there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's own words for a device it lacks
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {str(device)!r} cannot be used here ({reason[:160]}): use 'cpu'") from error
    return torch.device(device)
