"""Rotary embedding: published check values and the formula written out."""

from __future__ import annotations

import math

import pytest
import torch

from ernie45.errors import ShapeError
from ernie45.layers.rope import apply_rotary, rotary_frequencies, rotary_rotation


@pytest.mark.parametrize(
    ("j", "value"),
    [
        (0, 1.0), (1, 0.8146172339), (2, 0.6636012377), (43, 1.482533543e-4), (44, 1.207697374e-4), (63, 2.455140792e-6)
    ],
)  # fmt: skip
def test_frequencies_have_the_published_values(j: int, value: float) -> None:
    assert rotary_frequencies(128, 500000.0)[j].item() == pytest.approx(value, rel=1e-6)


def test_pairs_are_neighbours_and_turn_by_the_formula() -> None:
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 1000])
    turned = apply_rotary(x, rotary_rotation(positions, 8, 10000.0))
    for t, position in enumerate(positions.tolist()):
        for j in range(4):
            angle = position * 10000.0 ** (-2 * j / 8)
            a, b = x[t, :, 2 * j], x[t, :, 2 * j + 1]
            expected_even = a * math.cos(angle) - b * math.sin(angle)
            expected_odd = b * math.cos(angle) + a * math.sin(angle)
            torch.testing.assert_close(turned[t, :, 2 * j], expected_even, atol=1e-4, rtol=0)
            torch.testing.assert_close(turned[t, :, 2 * j + 1], expected_odd, atol=1e-4, rtol=0)
    assert torch.equal(turned[0], x[0])


def test_rotation_is_computed_in_float32() -> None:
    """At position 100003 a bfloat16 angle would be off by hundreds of radians."""
    x = torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(0))
    rotation = rotary_rotation(torch.tensor([100003]), 128, 500000.0)
    narrow = apply_rotary(x.bfloat16(), rotation)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), apply_rotary(x.bfloat16().float(), rotation), atol=0.02, rtol=0.01)


def test_three_positions_divide_the_frequencies() -> None:
    """The last 20 of 64 turn with time; of the others the even ones with height, the odd ones with width."""
    alone = [rotary_rotation(torch.tensor([p]), 128, 500000.0)[0] for p in (3, 5, 7)]
    joint = rotary_rotation(torch.tensor([[3, 5, 7]]), 128, 500000.0, time_frequencies=20)[0]
    for j in range(64):
        expected = alone[0][j] if j >= 44 else alone[1][j] if j % 2 == 0 else alone[2][j]
        assert joint[j] == expected


def test_equal_positions_on_all_axes_are_text_positions() -> None:
    positions = torch.tensor([0, 4, 9])
    joint = rotary_rotation(positions[:, None].expand(3, 3), 128, 500000.0, time_frequencies=20)
    assert torch.equal(joint, rotary_rotation(positions, 128, 500000.0))


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(2, 2\)"):
        rotary_rotation(torch.zeros(2, 2, dtype=torch.int64), 8, 10000.0)


def test_what_generating_has_made_serves_training() -> None:
    """Frequencies are kept; those of an inference step must not be inference tensors."""
    with torch.inference_mode():
        rotary_rotation(torch.arange(3), 32, 12345.0)
    x = torch.randn(3, 2, 32, requires_grad=True)
    apply_rotary(x, rotary_rotation(torch.arange(3), 32, 12345.0)).sum().backward()
    assert x.grad is not None
    assert not rotary_rotation(torch.arange(3), 32, 12345.0).is_inference()
