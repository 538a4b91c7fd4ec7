"""Check a checkpoint before trusting it: every tensor accounted for, every value finite, the config consistent;
optionally the logits against an independent implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ernie45.checkpoint.load import Progress, load_model
from ernie45.checkpoint.source import SafetensorsSource, open_source
from ernie45.config.count import count_parameters
from ernie45.errors import CapacityError, NotFoundError, UsageError

_PROBE_TOKENS = 48
_TOLERANCE = 1e-3
"""Largest difference of float32 logits that still counts as agreement; measured differences are below 1e-4."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The outcome; `ok` is what counts, the rest says why."""

    path: str
    format: str
    tensors: int
    values: int
    left_out: Mapping[str, str]
    not_finite: tuple[str, ...]
    """Tensors that hold NaN or infinity."""
    all_zero: tuple[str, ...]
    """Matrices whose every value is zero: legal, but seldom meant."""
    against: str | None = None
    max_logit_difference: float | None = None
    same_best_token: float | None = None
    """Share of positions at which both implementations prefer the same next token."""

    @property
    def ok(self) -> bool:
        """Whether the checkpoint can be trusted as far as it was looked at."""
        agrees = self.max_logit_difference is None or self.max_logit_difference <= _TOLERANCE
        return not self.not_finite and agrees


def verify(
    path: str | Path, *, against: Literal["transformers"] | None = None, progress: Progress | None = None
) -> Verification:
    """Read every tensor of a checkpoint once and report.

    Args: against: `transformers` also loads the folder there and compares float32 logits of a fixed random prompt;
            needs the package, and memory for both networks at once.
    Raises: CheckpointError, ConfigError, NotFoundError as loading does; UsageError for a comparison that cannot be
    made.
    """
    source = open_source(path)
    not_finite, all_zero, values = [], [], 0
    expected = sum(torch.Size(stored.shape).numel() for stored in source.layout)
    for stored in source.layout:
        tensor = source.read(stored)
        values += tensor.numel()
        if not torch.isfinite(tensor).all():
            not_finite.append(stored.name)
        elif tensor.ndim > 1 and not stored.name.endswith("bias") and not tensor.any():
            all_zero.append(stored.name)
        if progress is not None:
            progress(values, expected)
    counted = count_parameters(source.config).total_with_mtp
    assert source.format == "gguf" or values == counted, f"{values} values read, the config promises {counted}"
    comparison: dict[str, Any] = {}
    if against is not None:
        if against != "transformers":
            raise UsageError(f"cannot compare with {against!r}, expected 'transformers'")
        if not isinstance(source, SafetensorsSource) or source.format != "pt":
            raise UsageError(f"transformers reads -PT folders only, {path} is {source.format}: convert it first")
        comparison = _compare_with_transformers(Path(source.where), source.config.vocab_size)
    return Verification(
        path=str(path),
        format=source.format,
        tensors=len(source.account.loaded),
        values=values,
        left_out=source.account.left_out,
        not_finite=tuple(not_finite),
        all_zero=tuple(all_zero),
        **comparison,
    )


@torch.inference_mode()
def _compare_with_transformers(folder: Path, vocab_size: int) -> dict[str, Any]:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise NotFoundError(f"transformers is not installed ({error}): pip install 'transformers>=5.16'") from error
    ids = torch.randint(vocab_size, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    try:
        ours = load_model(folder)(ids)[0]
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0]
    except MemoryError as error:
        raise CapacityError(f"{folder}: two float32 copies of the network do not fit into memory") from error
    return {
        "against": "transformers",
        "max_logit_difference": float((ours - theirs).abs().max()),
        "same_best_token": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    }
