"""Losses and log-probabilities from hidden states without ever holding T x V logits.

The head runs over labelled rows alone, a few hundred at a time. The sum of losses, whose gradient is known up to a factor, makes
the gradients of hidden states and matrix at once and throws the logits away; log-probabilities, whose gradients come from
outside, compute their logits again in the backward pass. Softmax and sums are float32 whatever the weights are.

Shape letters: T tokens, R labelled rows (C of them at a time), H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ernie45.errors import ConfigError, ShapeError
from ernie45.training.batch import IGNORED
from ernie45.training.leaves.embedding import TrainingEmbedding
from ernie45.training.leaves.precision import sum_dtype
from ernie45.training.leaves.scratch import scratch, take

if TYPE_CHECKING:
    from ernie45.training.network import TrainingNetwork

CHUNK_ROWS = 512
"""Rows whose logits exist together. The gradient of the matrix is read and written once per chunk: with fewer rows that
takes longer than the products (at 200 GFLOP/s and 35 GB/s as long for 8 rows), with more the logits take memory."""


def lm_loss_sum(
    net: TrainingNetwork, hidden_TH: Tensor, labels_T: Tensor, *, mtp: bool = False, chunk_rows: int = CHUNK_ROWS
) -> Tensor:
    """Sum of the cross-entropy over positions with a label, float32 scalar.

    Args: hidden_TH: residual stream before the final norm, which is applied here. labels_T: int64, `IGNORED` where
        nothing is learnt. mtp: whether `hidden_TH` comes from a multi-token prediction block. chunk_rows: C.
    The gradient can be asked for once, as it is made in the forward pass and used up. Raises: ShapeError, ConfigError.
    """
    normed_RH, labels_R, _ = _labelled(net, hidden_TH, labels_T, mtp)
    weight, bias = _matrix(net)
    learns = torch.is_grad_enabled()
    return _LossSum.apply(normed_RH, weight, bias, labels_R, _checked(chunk_rows), learns)  # type: ignore[no-untyped-call]


def label_logprobs(
    net: TrainingNetwork, hidden_TH: Tensor, labels_T: Tensor, *, chunk_rows: int = CHUNK_ROWS
) -> Tensor:
    """Log-probability of every label, float32 (T,), 0 where it is `IGNORED`; arguments as for `lm_loss_sum`."""
    return _logprobs(net, hidden_TH, labels_T, chunk_rows, wants_entropy=False)[0]


def label_logprobs_and_entropy(
    net: TrainingNetwork, hidden_TH: Tensor, labels_T: Tensor, *, chunk_rows: int = CHUNK_ROWS
) -> tuple[Tensor, Tensor]:
    """The same, and the entropy in nats of the distribution that each label was drawn from, float32 (T,), 0 where `IGNORED`."""
    return _logprobs(net, hidden_TH, labels_T, chunk_rows, wants_entropy=True)


def _logprobs(
    net: TrainingNetwork, hidden_TH: Tensor, labels_T: Tensor, chunk_rows: int, *, wants_entropy: bool
) -> tuple[Tensor, Tensor]:
    normed_RH, labels_R, rows_R = _labelled(net, hidden_TH, labels_T, mtp=False)
    found = _LabelLogprobs.apply(normed_RH, *_matrix(net), labels_R, _checked(chunk_rows), wants_entropy)  # type: ignore[no-untyped-call]
    nothing_T = torch.zeros(labels_T.shape, device=hidden_TH.device)
    logprobs_T, entropy_T = (nothing_T.to(values.dtype).index_copy(0, rows_R, values) for values in found)
    return logprobs_T, entropy_T


def _labelled(net: TrainingNetwork, hidden_TH: Tensor, labels_T: Tensor, mtp: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Normed hidden states and labels of the rows that have one, and which rows these are."""
    if hidden_TH.ndim != 2 or labels_T.shape != hidden_TH.shape[:1] or labels_T.dtype != torch.int64:
        raise ShapeError(
            f"hidden states {tuple(hidden_TH.shape)} with labels {tuple(labels_T.shape)} of {labels_T.dtype}, "
            "expected (T, H) and int64 (T,)"
        )
    rows_R = (labels_T != IGNORED).nonzero().flatten()
    labels_R = labels_T[rows_R]
    size = net.model.config.vocab_size
    if len(rows_R) and not 0 <= int(labels_R.min()) <= int(labels_R.max()) < size:
        raise ShapeError(
            f"labels run from {int(labels_R.min())} to {int(labels_R.max())}, the vocabulary has {size} tokens"
        )
    hidden_RH = hidden_TH if len(rows_R) == len(labels_T) else hidden_TH.index_select(0, rows_R)
    normed_RH = net.final_norm(hidden_RH, mtp=mtp)
    return normed_RH.to(net.product_dtype), labels_R, rows_R


def _matrix(net: TrainingNetwork) -> tuple[Tensor, Tensor | None]:
    """The head's own matrix or the embedding's, and its bias."""
    head = net.model.lm_head
    tied = getattr(head, "weight", None) is None
    embedding = net.model.model.embed_tokens
    weight: Tensor | None
    if not tied:
        weight = head.weight
    else:
        weight = (
            embedding.for_head() if isinstance(embedding, TrainingEmbedding) else getattr(embedding, "weight", None)
        )
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ConfigError(
            f"the head ({type(head).__name__}) has no matrix of a floating-point dtype that losses can be taken through: "
            "load embedding and head unquantized"
        )
    return weight, getattr(head, "bias", None)


def _checked(chunk_rows: int) -> int:
    if chunk_rows < 1:
        raise ConfigError(f"chunk_rows is {chunk_rows}, expected 1 or more")
    return chunk_rows


class _Chunks:
    """Log-probabilities of a chunk of rows after the other, in the same piece of memory: inside a `scratch` block alone."""

    def __init__(self, x_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_R: Tensor, num_rows: int) -> None:
        self.x_RH, self.labels_R, self.num_rows = x_RH, labels_R, max(1, min(num_rows, len(x_RH)))
        self.weight_VH = weight_VH.to(x_RH.dtype)
        self.bias_V = bias_V
        self._logits = take(x_RH, self.num_rows, len(weight_VH))

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Where the chunk stands, log-probabilities (C, V), float32 or wider, to be written to, and labels, (C, 1)."""
        for start in range(0, len(self.x_RH), self.num_rows):
            here = slice(start, min(start + self.num_rows, len(self.x_RH)))
            logits = self._logits[: here.stop - start]
            torch.mm(self.x_RH[here], self.weight_VH.t(), out=logits)
            logits = logits.to(sum_dtype(logits.dtype))
            if self.bias_V is not None:
                logits.add_(self.bias_V)
            torch.log_softmax(logits, -1, out=logits)  # row by row, so it may write where it reads
            yield here, logits, self.labels_R[here, None]


class _Gradients:
    """Gradients of hidden states, matrix and bias, filled by chunks of rows; sums over rows in float32."""

    def __init__(self, chunks: _Chunks, weight_VH: Tensor, bias_V: Tensor | None, needed: tuple[bool, ...]) -> None:
        wide = sum_dtype(weight_VH.dtype)
        self.x_RH = torch.empty_like(chunks.x_RH) if needed[0] else None
        # Empty: the first chunk writes, the others add.
        self.weight_VH = torch.empty_like(weight_VH, dtype=wide) if needed[1] else None
        self.bias_V = torch.zeros_like(bias_V, dtype=wide) if bias_V is not None and needed[2] else None
        if self.weight_VH is not None and not len(chunks.x_RH):
            self.weight_VH.zero_()

    def add(self, chunks: _Chunks, here: slice, d_logits_CV: Tensor) -> None:
        """Take in the gradient of a chunk's logits; chunks come in order."""
        x = chunks.x_RH[here]
        if self.bias_V is not None:
            self.bias_V.add_(d_logits_CV.sum(0))
        d_logits = d_logits_CV.to(x.dtype)
        if self.x_RH is not None:
            torch.mm(d_logits, chunks.weight_VH, out=self.x_RH[here])
        if self.weight_VH is not None:
            self._add_outer(d_logits.t(), x, is_first=here.start == 0)

    def _add_outer(self, d_logits_VC: Tensor, x_CH: Tensor, *, is_first: bool) -> None:
        total = self.weight_VH
        assert total is not None, "asked for where the matrix learns"
        if total.dtype == x_CH.dtype:
            torch.addmm(total, d_logits_VC, x_CH, beta=0 if is_first else 1, out=total)
        elif is_first:
            total.copy_(d_logits_VC @ x_CH)
        else:
            total.add_(d_logits_VC @ x_CH)

    def times(
        self, factor: Tensor, bias_dtype: torch.dtype | None, weight_dtype: torch.dtype
    ) -> tuple[Tensor | None, ...]:
        """The gradients times a scalar, in the dtypes of what they belong to; used up."""
        x = None if self.x_RH is None else self.x_RH.mul_(factor.to(self.x_RH.dtype))
        weight = None if self.weight_VH is None else self.weight_VH.mul_(factor).to(weight_dtype)
        bias = None if self.bias_V is None else self.bias_V.mul_(factor).to(bias_dtype)
        return x, weight, bias


class _LossSum(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917  # torch hands inputs over by position
        ctx: Any,
        x_RH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_R: Tensor,
        chunk_rows: int,
        learns: bool,
    ) -> Tensor:
        with scratch():
            chunks = _Chunks(x_RH, weight_VH, bias_V, labels_R, chunk_rows)
            needed = ctx.needs_input_grad[:3] if learns else (False, False, False)
            ctx.gradients = _Gradients(chunks, weight_VH, bias_V, needed)
            ctx.dtypes = (None if bias_V is None else bias_V.dtype, weight_VH.dtype)
            losses = [x_RH.new_zeros((), dtype=sum_dtype(x_RH.dtype))]
            for here, logprobs, labels in chunks:
                losses.append(-logprobs.gather(1, labels).sum())
                if any(needed):
                    probs = logprobs.exp_()
                    ctx.gradients.add(chunks, here, probs.scatter_add_(1, labels, probs.new_full(labels.shape, -1.0)))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of this loss was asked for before, and used up: compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        return (*gradients.times(grads[0], *ctx.dtypes), None, None, None)


class _LabelLogprobs(torch.autograd.Function):
    """Log-probabilities of the labels and entropies, (R,) each; entropies are 0 unless wanted."""

    @staticmethod
    def forward(  # noqa: PLR0917  # torch hands inputs over by position
        ctx: Any,
        x_RH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_R: Tensor,
        chunk_rows: int,
        wants_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        found_R = x_RH.new_zeros(len(x_RH), dtype=sum_dtype(x_RH.dtype))
        entropy_R = torch.zeros_like(found_R)
        with scratch():
            chunks = _Chunks(x_RH, weight_VH, bias_V, labels_R, chunk_rows)
            for here, logprobs, labels in chunks:
                found_R[here] = logprobs.gather(1, labels)[:, 0]
                if wants_entropy:
                    entropy_R[here] = -logprobs.exp().mul_(logprobs).sum(-1)
        ctx.save_for_backward(x_RH, weight_VH, bias_V, labels_R, entropy_R)
        ctx.chunk_rows, ctx.wants_entropy = chunk_rows, wants_entropy
        return found_R, entropy_R

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RH, weight_VH, bias_V, labels_R, entropy_R = ctx.saved_tensors
        with scratch():
            chunks = _Chunks(x_RH, weight_VH, bias_V, labels_R, ctx.chunk_rows)
            gradients = _Gradients(chunks, weight_VH, bias_V, ctx.needs_input_grad[:3])
            for here, logprobs, labels in chunks:
                d_label, d_entropy = grads[0][here, None], grads[1][here, None]
                # d logp[label] / d logit_v = [v = label] - p_v;  d entropy / d logit_v = -p_v (log p_v + entropy)
                if ctx.wants_entropy:
                    probs = logprobs.exp()
                    d_logits = logprobs.add_(entropy_R[here, None]).mul_(-d_entropy).sub_(d_label).mul_(probs)
                else:
                    d_logits = logprobs.exp_().mul_(-d_label)
                gradients.add(chunks, here, d_logits.scatter_add_(1, labels, d_label))
        one = grads[0].new_ones(())
        return (*gradients.times(one, None if bias_V is None else bias_V.dtype, weight_VH.dtype), None, None, None)
