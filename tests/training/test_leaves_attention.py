"""Packed attention against each document by itself, and sequences that continue others against the whole text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ernie45.config.model import ModelConfig
from ernie45.errors import ShapeError
from ernie45.layers.attention import AttentionCore
from ernie45.layers.cache import AttentionView
from ernie45.layers.rope import rotary_rotation
from ernie45.models.text import CausalLM
from ernie45.training.leaves import use_training_leaves
from ernie45.training.leaves.attention import BranchedView, TrainingAttentionCore, groups_of
from ernie45.training.memory import LiveMemory
from ernie45.training.network import TrainingNetwork

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM


def _core() -> tuple[AttentionCore, Any]:
    config = ModelConfig(
        hidden_size=48,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
    )
    leaf = nn.Sequential(AttentionCore(config, 0))
    use_training_leaves(leaf)
    assert isinstance(leaf[0], TrainingAttentionCore)
    return AttentionCore(config, 0), leaf[0]


def _qkv(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def _rotation(view: AttentionView) -> Tensor:
    return rotary_rotation(view.positions(), HEAD_DIM, 10000.0)


def _with_gradient(run: Callable[[Tensor], Tensor], qkv: Tensor) -> tuple[Tensor, Tensor]:
    out = run(qkv)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    return out, torch.autograd.grad(out, qkv, pull)[0]


@pytest.mark.parametrize("lengths", [(9,), (5, 5, 5), (4, 1, 7, 4, 1, 4), (3, 8), (150, 70, 150)], ids=str)
def test_packed_documents_equal_each_by_itself(lengths: tuple[int, ...]) -> None:
    plain, leaf = _core()
    view = AttentionView(lengths=lengths)

    def alone(qkv: Tensor) -> Tensor:
        views = [AttentionView(lengths=(length,)) for length in lengths]
        parts = zip(qkv.split(lengths), views, strict=True)
        return torch.cat([plain(part, _rotation(one), one) for part, one in parts])

    expected = _with_gradient(alone, _qkv(sum(lengths)))
    found = _with_gradient(lambda qkv: leaf(qkv, _rotation(view), view), _qkv(sum(lengths)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_narrow_dtypes_rotate_in_float32() -> None:
    plain, leaf = _core()
    view = AttentionView(lengths=(6, 3))
    qkv = _qkv(9, dtype=torch.bfloat16)
    expected = _with_gradient(lambda qkv: plain(qkv, _rotation(view), view), qkv)
    found = _with_gradient(lambda qkv: leaf(qkv, _rotation(view), view), qkv)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)


def test_attention_against_finite_differences() -> None:
    """Through rotation, grouped heads, two lengths and a sequence that continues another."""
    _, leaf = _core()
    view = BranchedView(lengths=(3, 2, 2), parents=(None, 0, None))
    qkv = _qkv(7, dtype=torch.float64)
    rotation = _rotation(view)
    assert torch.autograd.gradcheck(lambda qkv: leaf(qkv, rotation, view), (qkv,), fast_mode=True, atol=1e-5)


def test_attention_keeps_projection_and_output_alone() -> None:
    """No scores, and no repeated keys however many query heads share one."""
    _, leaf = _core()
    view = AttentionView(lengths=(32, 32))
    qkv = _qkv(64)
    rotation = _rotation(view)
    with LiveMemory() as memory:
        out = leaf(qkv, rotation, view)
        assert sum(memory.live_bytes().values()) == 4 * 64 * (WIDTH + HEADS * HEAD_DIM)
    del out


def test_a_view_with_caches_runs_as_ever(small_model: Callable[..., CausalLM]) -> None:
    model = small_model()
    ids = torch.arange(12)
    expected = model(ids[None])[0]
    use_training_leaves(model)
    cache = model.new_cache()
    with torch.no_grad():
        parts = [
            model.logits(model.hidden(part, AttentionView(lengths=(6,), caches=(cache,)))) for part in ids.split(6)
        ]
    torch.testing.assert_close(torch.cat(parts), expected, atol=1e-5, rtol=1e-5)


def test_positions_and_groups_of_branches_by_hand() -> None:
    """A prompt of 3, an answer of 2, another answer of 1, and one of 2 behind the first answer."""
    view = BranchedView(lengths=(3, 2, 1, 2), parents=(None, 0, 0, 1))
    assert view.positions().tolist() == [0, 1, 2, 3, 4, 3, 5, 6]
    assert view.ancestors == ((), (0,), (0,), (0, 1))
    assert [(g.num_documents, g.num_own, g.num_before) for g in groups_of(view.lengths, view.ancestors)] == [
        (1, 3, 0),
        (1, 2, 3),
        (1, 1, 3),
        (1, 2, 5),
    ]


@pytest.mark.parametrize("parents", [(None,), (0, None), (None, 1), (None, -1), (None, 2)], ids=str)
def test_impossible_parents_are_refused(parents: tuple[int | None, ...]) -> None:
    with pytest.raises(ShapeError, match="parents|expected one before it"):
        BranchedView(lengths=(2, 2), parents=parents)


def _whole_texts(sequences: Sequence[Tensor], view: BranchedView) -> list[Tensor]:
    return [torch.cat([sequences[j] for j in (*view.ancestors[i], i)]) for i in range(len(sequences))]


@pytest.mark.parametrize(
    ("lengths", "parents", "moe"),
    [
        ((7, 4, 4, 1, 5, 3), (None, 0, 0, None, 3, 1), False),
        ((7, 4, 4, 1, 5, 3), (None, 0, 0, None, 3, 1), True),
        ((90, 100, 30, 100), (None, 0, 0, 1), False),  # several blocks of queries
    ],
)
def test_shared_prompts_equal_whole_texts(
    small_model: Callable[..., CausalLM], lengths: tuple[int, ...], parents: tuple[int | None, ...], moe: bool
) -> None:
    """Hidden states of every answer, and the gradients of all weights when every answer counts."""
    view = BranchedView(lengths=lengths, parents=parents)
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(101, (length,), generator=generator) for length in lengths]
    answers = [i for i in range(len(lengths)) if parents[i] is not None]
    plain, model = small_model(moe=moe), small_model(moe=moe)
    TrainingNetwork(model)

    hidden = model.hidden(torch.cat(sequences), view).split(lengths)
    found = torch.cat([hidden[i] for i in answers])
    texts = _whole_texts(sequences, view)
    expected = torch.cat(
        [plain.hidden(texts[i], AttentionView(lengths=(len(texts[i]),)))[-lengths[i] :] for i in answers]
    )
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    pull = torch.randn(found.shape, generator=generator)
    found.backward(pull)
    expected.backward(pull)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, atol=2e-4, rtol=1e-4, msg=name)
