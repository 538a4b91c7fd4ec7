"""How much a quantized model lost: perplexity on a text, divergence of the predictions, agreement of the first choice.

Shape letters: C chunks, T tokens per chunk, V vocabulary.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ernie45.checkpoint.atomic import atomic_write_bytes, atomic_write_text
from ernie45.errors import RequestError, ShapeError
from ernie45.models.text import CausalLM
from ernie45.quant.calibration import CHUNK_TOKENS

_BINS = 60


class Encoder(Protocol):
    """What turns text into token ids."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Predictions of a model against those of the one it was made from, on plain chunks of a text.

    Every chunk starts without context; its first token is given, every further one is predicted.
    """

    tokens: int
    """Predicted tokens."""
    chunk_tokens: int
    perplexity_reference: float
    perplexity: float
    perplexity_change: float
    """Relative: 0.01 is one per cent worse."""
    kl_mean: float
    """Divergence of the model's predictions from the reference's, nats per token."""
    kl_99: float
    """99th percentile over tokens."""
    same_best_token: float
    """Share of positions at which both prefer the same next token."""
    kl_by_position: tuple[float, ...]
    """Mean over chunks, by position in the chunk."""

    def save_json(self, path: str | Path) -> None:
        """Write the figures."""
        atomic_write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    def save_plot(self, path: str | Path) -> bool:
        """Draw the divergence by position as PNG; False if matplotlib is not installed."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return False
        from io import BytesIO

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="tokens before it in the chunk", ylabel="KL divergence (nats per token)")
        width = max(1, len(self.kl_by_position) // _BINS)
        parts = torch.tensor(self.kl_by_position).split(width)
        middles = [1 + i * width + (len(part) - 1) / 2 for i, part in enumerate(parts)]
        label = f"mean of {width} positions" if width > 1 else "each position"
        axes.plot(middles, [float(part.mean()) for part in parts], label=label)
        axes.axhline(self.kl_mean, color="#9b2226", linestyle="--", label=f"mean of all {self.kl_mean:.3g}")
        axes.set_title(
            f"perplexity {self.perplexity_reference:.3f} → {self.perplexity:.3f} ({self.perplexity_change:+.2%})\n"
            f"same first choice {self.same_best_token:.1%}, {self.tokens:,} tokens",
            fontsize=10,
        )
        axes.legend()
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        image = BytesIO()
        figure.savefig(image, format="png", dpi=120)
        atomic_write_bytes(path, image.getvalue())
        return True


def chunks_of(tokenizer: Encoder, text: str, *, tokens: int = CHUNK_TOKENS, limit: int | None = None) -> Tensor:
    """A text as chunks of equal length, int64 (C, T); the rest is dropped, `limit` is the largest C.

    Raises: RequestError if the text does not fill one chunk.
    """
    ids = tokenizer.encode(text)
    num_chunks = min(len(ids) // tokens, limit or len(ids))
    if not num_chunks:
        raise RequestError(f"the text has {len(ids)} tokens, one chunk has {tokens}: use a longer text")
    return torch.tensor(ids[: num_chunks * tokens], dtype=torch.int64).view(num_chunks, tokens)


@torch.inference_mode()
def compare(reference: CausalLM, model: CausalLM, chunks_CT: Tensor) -> Quality:
    """Measure a model against the one it was made from on chunks of a text, int64 (C, T) with T from 2 on.

    Raises: ShapeError for other chunks, or models with different vocabularies.
    """
    if reference.config.vocab_size != model.config.vocab_size:
        raise ShapeError(f"vocabularies of {reference.config.vocab_size} and {model.config.vocab_size} tokens differ")
    if chunks_CT.ndim != 2 or chunks_CT.shape[1] < 2 or not len(chunks_CT):
        raise ShapeError(f"chunks have shape {tuple(chunks_CT.shape)}, expected (C, T) with T from 2 on")
    kl, nll_reference, nll, same = [], 0.0, 0.0, 0
    for chunk in chunks_CT:
        targets = chunk[1:, None]
        log_p, log_q = (m(chunk[None])[0, :-1].float().log_softmax(-1) for m in (reference, model))
        nll_reference -= float(log_p.gather(1, targets).double().sum())
        nll -= float(log_q.gather(1, targets).double().sum())
        same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
    kl_CT = torch.stack(kl)
    tokens = kl_CT.numel()
    perplexities = math.exp(nll_reference / tokens), math.exp(nll / tokens)
    return Quality(
        tokens=tokens,
        chunk_tokens=chunks_CT.shape[1],
        perplexity_reference=perplexities[0],
        perplexity=perplexities[1],
        perplexity_change=perplexities[1] / perplexities[0] - 1,
        kl_mean=float(kl_CT.mean()),
        kl_99=float(kl_CT.flatten().kthvalue(max(1, int(0.99 * tokens))).values),
        same_best_token=same / tokens,
        kl_by_position=tuple(kl_CT.mean(0).tolist()),
    )
