"""How an engine is set, and what follows from that for one model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ernie45.engine.drafts import MtpSpeculation, NgramSpeculation
from ernie45.errors import CapacityError, ConfigError

_DEFAULT_LENGTH = 8192
_LEAST_SEQUENCES = 8
"""Sequences that the default memory holds: one that runs, and what others left behind."""
_SHARE = 0.5
"""Of the spare memory. The rest is for activations and for whatever else runs."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One run of the engine. Defaults suit a machine that serves a few users."""

    max_model_len: int | None = None
    """Most tokens of prompt and output together; None = the model's context, at most 8192."""
    max_num_seqs: int = 32
    """Sequences that run at a time; others wait."""
    kv_cache_memory: int | None = None
    """Bytes for keys and values; None = `max_num_seqs` sequences of `max_model_len` tokens, and no fewer than 8 so that prefixes
    have room; but at most half of the memory that is left beside the weights (and room for one sequence at least). The memory is
    taken as it fills."""
    kv_dtype: str | None = None
    """`float32`, `bfloat16` or `int8`; None = the model's `kv_dtype`, else float32."""
    page_size: int = 16
    """Tokens per page, 16 to 256 in powers of two. Prefixes are shared in whole pages: with 64, a known prompt of 128 tokens would be
    half computed again, with 16 an eighth. Attention over pages of 16 takes 5 to 10 % longer than over 64 (16 heads, 4096 tokens)."""
    max_step_tokens: int = 512
    """Prompt tokens of a step while nothing decodes."""
    max_step_tokens_beside_decodes: int | None = None
    """Prompt tokens and guesses of a step in which sequences decode; None = as many as make it less than twice as long."""
    prefix_cache: bool = True
    """Keep the pages of ended sequences and share them with prompts that begin alike."""
    speculation: NgramSpeculation | MtpSpeculation | None = None
    """Guess and verify; None = off."""

    def __post_init__(self) -> None:
        limits: dict[str, tuple[int, int | None]] = {
            "max_model_len": (2, None),
            "max_num_seqs": (1, 4096),
            "kv_cache_memory": (1, None),
            "max_step_tokens": (1, 2**20),
            "max_step_tokens_beside_decodes": (1, 2**20),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is None and name in ("max_model_len", "kv_cache_memory", "max_step_tokens_beside_decodes"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= (high or math.inf):
                bounds = f"from {low} to {high}" if high is not None else f"from {low} on"
                raise ConfigError(f"{name} is {value!r}, expected a whole number {bounds}")
        if self.page_size not in (16, 32, 64, 128, 256):
            raise ConfigError(f"page_size is {self.page_size!r}, expected 16, 32, 64, 128 or 256")
        if self.kv_dtype not in (None, "float32", "bfloat16", "int8"):
            raise ConfigError(f"kv_dtype is {self.kv_dtype!r}, expected float32, bfloat16 or int8")


def resolve(config: EngineConfig, *, context: int, kv_dtype: str) -> EngineConfig:
    """The settings with length and dtype filled in.

    Args: context: what the model takes at most. kv_dtype: the model's. Raises: ConfigError if more is asked for.
    """
    length = min(context, _DEFAULT_LENGTH) if config.max_model_len is None else config.max_model_len
    if length > context:
        raise ConfigError(f"max_model_len is {length}, the model's context holds {context}: lower it")
    return replace(config, max_model_len=length, kv_dtype=config.kv_dtype or kv_dtype)


def num_pages(config: EngineConfig, bytes_per_token: int, spare_bytes: int | None = None) -> int:
    """Pages that the settings of `resolve` ask for.

    Args: spare_bytes: memory that is left beside the weights; None = unknown. Raises: CapacityError if a single sequence would
        not fit.
    """
    assert config.max_model_len is not None, "filled in by resolve"
    per_sequence = -(-config.max_model_len // config.page_size)
    page_bytes = config.page_size * bytes_per_token
    if config.kv_cache_memory is None:
        wanted = per_sequence * max(config.max_num_seqs, _LEAST_SEQUENCES)
        return (
            wanted if spare_bytes is None else min(wanted, max(per_sequence, int(spare_bytes * _SHARE) // page_bytes))
        )
    count = config.kv_cache_memory // page_bytes
    if count < per_sequence:
        raise CapacityError(
            f"kv_cache_memory of {config.kv_cache_memory} bytes holds {count * config.page_size} tokens, one sequence of "
            f"max_model_len {config.max_model_len} needs {per_sequence * page_bytes} bytes: raise kv_cache_memory, or lower "
            "max_model_len"
        )
    return count
