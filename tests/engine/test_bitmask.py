"""Masked logits keep what the bits allow and nothing else."""

import math

import pytest
import torch

from ernie45.engine.bitmask import apply_bitmask, new_bitmask
from ernie45.errors import ShapeError


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 100])
def test_bits_decide(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(3, vocab_size, generator=generator)
    allowed = torch.rand(3, vocab_size, generator=generator) < 0.5
    bitmask = torch.zeros_like(new_bitmask(3, vocab_size))
    for row, idx in allowed.nonzero().tolist():
        bit = 1 << (idx % 32)
        bitmask[row, idx // 32] |= bit - (1 << 32) if bit >> 31 else bit
    masked = apply_bitmask(logits, bitmask)
    assert torch.equal(masked, torch.where(allowed, logits, torch.tensor(-math.inf)))


def test_a_new_mask_allows_everything_it_knows() -> None:
    logits = torch.zeros(2, 40)
    assert torch.equal(apply_bitmask(logits, new_bitmask(2, 40)), logits)
    assert apply_bitmask(logits, new_bitmask(2, 32))[0].tolist() == [0.0] * 32 + [-math.inf] * 8


def test_rows_have_to_agree() -> None:
    for bitmask in (new_bitmask(1, 40), new_bitmask(2, 40).long(), new_bitmask(2, 40)[0]):
        with pytest.raises(ShapeError, match="bitmask"):
            apply_bitmask(torch.zeros(2, 40), bitmask)
