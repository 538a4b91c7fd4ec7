"""The head in chunks against whole logits, and the memory that it never takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ernie45.config.model import ModelConfig, MoeConfig
from ernie45.errors import ConfigError, ShapeError
from ernie45.models.build import build_model
from ernie45.models.init import initialize
from ernie45.models.text import CausalLM, MtpVariant
from ernie45.training.batch import IGNORED
from ernie45.training.head import label_logprobs, label_logprobs_and_entropy, lm_loss_sum
from ernie45.training.leaves.scratch import release
from ernie45.training.memory import LiveMemory
from ernie45.training.network import TrainingNetwork

TOKENS, VOCAB = 37, 101
HEADS = ["tied", "untied", "bias"]


def _network(kind: str = "tied", dtype: torch.dtype = torch.float32, **options: Any) -> TrainingNetwork:
    moe = MoeConfig(moe_num_experts=2, moe_k=1, moe_intermediate_size=4)
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=kind == "tied",
        use_bias=kind == "bias",
        moe=moe if kind == "bias" else None,
    )
    model = build_model(config, dtype=dtype)
    initialize(model, std=0.3, seed=1)
    if model.lm_head.bias is not None:
        model.lm_head.bias.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(2))
    return TrainingNetwork(model, **options)


def _batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, 24, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    labels[torch.arange(0, TOKENS, 4)] = IGNORED
    return hidden, labels


def _gradients(value: Tensor, net: TrainingNetwork, hidden: Tensor) -> list[Tensor]:
    head = net.model.lm_head
    matrix = net.model.model.embed_tokens.weight if head.weight is None else head.weight
    wanted = [hidden, matrix, net.model.model.norm.weight, *([] if head.bias is None else [head.bias])]
    return list(torch.autograd.grad(value, wanted))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk_rows", [1, 7, 256])
def test_loss_sum_equals_cross_entropy(kind: str, chunk_rows: int) -> None:
    """Loss and gradients, divided as a training step divides them."""
    net = _network(kind)
    hidden, labels = _batch()
    whole = F.cross_entropy(net.model.logits(hidden), labels, ignore_index=IGNORED, reduction="sum")
    chunked = lm_loss_sum(net, hidden, labels, chunk_rows=chunk_rows)
    assert chunked.dtype == torch.float32
    torch.testing.assert_close(chunked, whole, atol=1e-4, rtol=1e-6)
    for found, expected in zip(_gradients(chunked / 28, net, hidden), _gradients(whole / 28, net, hidden), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_loss_sum_by_hand() -> None:
    """Equal logits cost ln(V) per label."""
    net = _network()
    net.model.model.embed_tokens.weight.data.zero_()
    hidden, labels = _batch()
    expected = int((labels != IGNORED).sum()) * torch.tensor(float(VOCAB)).log()
    torch.testing.assert_close(lm_loss_sum(net, hidden, labels), expected)


def test_nothing_learnt_costs_nothing() -> None:
    net = _network("bias")
    hidden, labels = _batch()
    loss = lm_loss_sum(net, hidden, torch.full_like(labels, IGNORED))
    assert loss.item() == 0
    assert all(gradient.abs().sum() == 0 for gradient in _gradients(loss, net, hidden))
    assert label_logprobs(net, hidden, torch.full_like(labels, IGNORED)).tolist() == [0.0] * TOKENS


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk_rows", [5, 256])
def test_logprobs_and_entropy_equal_whole_ones(kind: str, chunk_rows: int) -> None:
    """With any gradient from outside, here different ones for every token and both results."""
    net = _network(kind)
    hidden, labels = _batch()
    whole = net.model.logits(hidden).log_softmax(-1)
    expected = whole.gather(1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(labels == IGNORED, 0)
    entropy = -(whole.exp() * whole).sum(-1).masked_fill(labels == IGNORED, 0)
    found = label_logprobs_and_entropy(net, hidden, labels, chunk_rows=chunk_rows)
    torch.testing.assert_close(found, (expected, entropy), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        label_logprobs(net, hidden, labels, chunk_rows=chunk_rows), expected, atol=1e-5, rtol=1e-5
    )
    pulls = torch.randn(2, TOKENS, generator=torch.Generator().manual_seed(4))
    totals = [(pulls[0] * logprobs).sum() + (pulls[1] * h).sum() for logprobs, h in (found, (expected, entropy))]
    for one, other in zip(*(_gradients(total, net, hidden) for total in totals), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    alone = label_logprobs(net, hidden, labels, chunk_rows=chunk_rows)
    expected = net.model.logits(hidden).log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    expected = expected.masked_fill(labels == IGNORED, 0)
    totals = [(pulls[0] * logprobs).sum() for logprobs in (alone, expected)]
    for one, other in zip(*(_gradients(total, net, hidden) for total in totals), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_logprobs_against_finite_differences() -> None:
    net = _network("untied", torch.float64)
    hidden, labels = _batch(torch.float64)
    hidden = hidden[:6].detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda hidden: label_logprobs_and_entropy(net, hidden, labels[:6], chunk_rows=4), (hidden,)
    )


def test_loss_sum_against_a_finite_difference() -> None:
    net = _network("untied", torch.float64)
    hidden, labels = _batch(torch.float64)
    (gradient,) = torch.autograd.grad(lm_loss_sum(net, hidden, labels, chunk_rows=8), hidden)
    step = 1e-6 * torch.randn(hidden.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        difference = lm_loss_sum(net, hidden + step, labels) - lm_loss_sum(net, hidden - step, labels)
    torch.testing.assert_close(2 * (gradient * step).sum(), difference, rtol=1e-6, atol=0)


@pytest.mark.parametrize("run", [lm_loss_sum, label_logprobs], ids=["loss", "logprobs"])
def test_no_piece_of_memory_is_as_large_as_the_logits(run: Callable[..., Tensor]) -> None:
    """The largest are a chunk's logits and the matrix's gradient, in both directions."""
    net = _network()
    tokens, chunk_rows = 4096, 32
    hidden = torch.randn(tokens, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(1))
    with LiveMemory() as memory:
        run(net, hidden, labels, chunk_rows=chunk_rows).sum().backward()
    assert memory.largest_bytes == 4 * 24 * tokens  # a copy of the hidden states
    assert memory.largest_bytes < 4 * tokens * VOCAB / 4
    with LiveMemory() as memory:
        F.cross_entropy(net.model.logits(hidden), labels)
    assert memory.largest_bytes == 4 * tokens * VOCAB, "the meter sees logits where there are some"


def test_larger_chunks_take_more_memory() -> None:
    net = _network()
    hidden, labels = _batch()
    largest = []
    for chunk_rows in (8, 27):
        release()  # the slab that holds a chunk's logits from the second call on
        with LiveMemory() as memory:
            lm_loss_sum(net, hidden.detach(), labels, chunk_rows=chunk_rows)
        largest.append(memory.largest_bytes)
    assert largest == [4 * VOCAB * 24, 4 * VOCAB * 27]


def test_only_labelled_rows_are_projected() -> None:
    net = _network()
    hidden, labels = _batch()
    rows: list[int] = []
    net.model.model.norm.register_forward_hook(lambda module, inputs, out: rows.append(len(out)))
    lm_loss_sum(net, hidden, labels)
    assert rows == [int((labels != IGNORED).sum())]


def test_narrow_weights_sum_in_float32() -> None:
    """bfloat16 gradients of a matrix, added up over many chunks, stay near those of one chunk."""
    net = _network("untied", torch.bfloat16)
    hidden, labels = _batch(torch.bfloat16)
    losses = [lm_loss_sum(net, hidden, labels, chunk_rows=chunk_rows) for chunk_rows in (1, 256)]
    torch.testing.assert_close(*losses, atol=1e-3, rtol=1e-3)
    assert losses[0].dtype == torch.float32
    one, other = (_gradients(loss, net, hidden)[1] for loss in losses)
    assert one.dtype == torch.bfloat16
    torch.testing.assert_close(one, other, atol=4e-3, rtol=0.02)


def test_products_follow_the_dtype_of_the_network() -> None:
    hidden, labels = _batch()
    wide, narrow = (lm_loss_sum(_network("untied", dtype=torch.float32), hidden, labels) for _ in range(2))
    assert wide.item() == narrow.item()
    narrow = lm_loss_sum(_with_products("bfloat16"), hidden, labels)
    assert narrow.dtype == torch.float32
    assert 0 < abs(narrow.item() / wide.item() - 1) < 0.01
    net = _with_products("bfloat16")
    gradients = _gradients(lm_loss_sum(net, hidden, labels), net, hidden)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def _with_products(dtype: str) -> TrainingNetwork:
    return TrainingNetwork(_network("untied").model, dtype=dtype)


def test_the_gradient_is_used_up() -> None:
    net = _network()
    hidden, labels = _batch()
    loss = lm_loss_sum(net, hidden, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


def test_a_frozen_head_passes_gradients_on() -> None:
    net = _network("untied")
    net.model.requires_grad_(False)
    hidden, labels = _batch()
    lm_loss_sum(net, hidden, labels).backward()
    assert hidden.grad is not None
    assert net.model.lm_head.weight is not None
    assert net.model.lm_head.weight.grad is None


def test_without_gradients_only_logits_are_computed() -> None:
    net = _network()
    hidden, labels = _batch()
    with torch.no_grad(), LiveMemory() as memory:
        loss = lm_loss_sum(net, hidden, labels, chunk_rows=4)
    assert not loss.requires_grad
    assert memory.largest_bytes == 4 * 24 * len(labels[labels != IGNORED])


def test_a_prediction_block_without_final_norm() -> None:
    """One of the two wirings in use leaves the norm out."""
    hidden, labels = _batch()
    net = _network(mtp_variant=MtpVariant(final_norm_on_output=False))
    bare = F.cross_entropy(
        hidden @ net.model.model.embed_tokens.weight.T, labels, ignore_index=IGNORED, reduction="sum"
    )
    torch.testing.assert_close(lm_loss_sum(net, hidden, labels, mtp=True), bare, atol=1e-4, rtol=1e-6)
    assert lm_loss_sum(net, hidden, labels).item() != pytest.approx(bare.item(), rel=1e-3)


def test_wrong_labels_are_refused() -> None:
    net = _network()
    hidden, labels = _batch()
    with pytest.raises(ShapeError, match="the vocabulary has 101"):
        lm_loss_sum(net, hidden, torch.full_like(labels, VOCAB))
    with pytest.raises(ShapeError, match="expected"):
        lm_loss_sum(net, hidden, labels[1:])
    with pytest.raises(ConfigError, match="chunk_rows is 0"):
        lm_loss_sum(net, hidden, labels, chunk_rows=0)


def test_a_packed_head_is_refused(small_model: Callable[..., CausalLM]) -> None:
    net = TrainingNetwork(small_model())
    net.model.model.embed_tokens = torch.nn.Identity()  # as a leaf without a matrix
    with pytest.raises(ConfigError, match="unquantized"):
        lm_loss_sum(net, torch.zeros(1, 48), torch.zeros(1, dtype=torch.int64))
