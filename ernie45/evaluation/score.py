"""Log-probabilities of given tokens: what perplexity and choice tasks are made of.

Sequences are packed behind each other; logits exist for the rows that are scored, a block at a time.
Shape letters: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ernie45.errors import ContextLengthError, RequestError
from ernie45.layers.cache import AttentionView
from ernie45.models.text import CausalLM

BATCH_TOKENS = 2048
"""Tokens of a forward pass, unless one sequence is longer."""
_LOGIT_VALUES = 1 << 24  # 64 MiB of float32 logits at a time


@dataclass(frozen=True, kw_only=True)
class Target:
    """A sequence, and how many of its last tokens are scored."""

    ids: tuple[int, ...]
    num_scored: int

    def __post_init__(self) -> None:
        if not 0 < self.num_scored < len(self.ids):
            raise RequestError(
                f"{self.num_scored} of {len(self.ids)} tokens cannot be scored: at least one is, and one stands before it"
            )


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a model makes of a target."""

    logprobs: Tensor
    """float32, natural logarithm, of every scored token."""
    is_greedy: bool
    """Whether every scored token is the most probable one."""

    @property
    def total(self) -> float:
        """Log-probability of all scored tokens together, summed in float64."""
        return float(self.logprobs.double().sum())


@torch.inference_mode()
def score(model: CausalLM, targets: Sequence[Target]) -> list[Score]:
    """Score targets in their order. Raises: ContextLengthError for one that is longer than the model's context."""
    limit = model.config.max_position_embeddings
    for target in targets:
        if len(target.ids) - 1 > limit:
            raise ContextLengthError(
                f"a sequence of {len(target.ids)} tokens is scored, the model's context holds {limit}"
            )
    return [found for batch in _batches(targets) for found in _score_batch(model, batch)]


def _batches(targets: Sequence[Target]) -> Iterator[list[Target]]:
    batch: list[Target] = []
    size = 0
    for target in targets:
        if batch and size + len(target.ids) - 1 > BATCH_TOKENS:
            yield batch
            batch, size = [], 0
        batch.append(target)
        size += len(target.ids) - 1
    if batch:
        yield batch


def _score_batch(model: CausalLM, batch: list[Target]) -> list[Score]:
    lengths = tuple(len(target.ids) - 1 for target in batch)
    ids = torch.tensor([i for target in batch for i in target.ids[:-1]], device=model.device)
    hidden_TH = model.hidden(ids, AttentionView(lengths=lengths))
    # Behind the last token that is read stands the last one that is scored.
    ends = accumulate(lengths)
    rows = [row for target, end in zip(batch, ends, strict=True) for row in range(end - target.num_scored, end)]
    labels_T = torch.tensor([i for target in batch for i in target.ids[-target.num_scored :]], device=model.device)
    logprobs_T, best_T = _label_logprobs(model, hidden_TH[torch.tensor(rows, device=model.device)], labels_T)
    sizes = [target.num_scored for target in batch]
    parts = zip(logprobs_T.split(sizes), best_T.split(sizes), strict=True)
    return [Score(logprobs=logprobs, is_greedy=bool(best.all())) for logprobs, best in parts]


def _label_logprobs(model: CausalLM, hidden_TH: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each label, float32 (T,), and whether it is the most probable token, bool (T,)."""
    logprobs, best = [], []
    block = max(1, _LOGIT_VALUES // model.config.vocab_size)
    for hidden, labels in zip(hidden_TH.split(block), labels_T.split(block), strict=True):
        logits_TV = model.logits(hidden).float()
        chosen_T = logits_TV.gather(1, labels[:, None])[:, 0]
        logprobs.append((chosen_T - logits_TV.logsumexp(-1)).cpu())
        best.append((chosen_T == logits_TV.amax(-1)).cpu())
    return torch.cat(logprobs), torch.cat(best)
