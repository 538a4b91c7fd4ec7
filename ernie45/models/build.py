"""Build the network that a configuration describes."""

from __future__ import annotations

import torch

from ernie45.config.model import ModelConfig
from ernie45.errors import ConfigError
from ernie45.models.text import CausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes that the networks run in, by published name."""


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """A torch dtype from its published name. Raises: ConfigError for a dtype that the networks do not run in."""
    dtype = DTYPES.get(name) if isinstance(name, str) else name
    if dtype not in DTYPES.values():
        raise ConfigError(f"dtype is {name!r}, expected one of {', '.join(DTYPES)}")
    return dtype  # type: ignore[return-value]  # None is no value of DTYPES


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bfloat16`, as config files write it."""
    return str(dtype).removeprefix("torch.")


def build_model(
    config: ModelConfig, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> CausalLM:
    """The network with uninitialised weights; `device="meta"` takes no memory. Vision-language models get their eyes
    too.
    """
    with torch.device(device):
        if config.vision is not None:
            from ernie45.models.vision_language import VisionLanguageModel

            return VisionLanguageModel(config, dtype)
        return CausalLM(config, dtype)
