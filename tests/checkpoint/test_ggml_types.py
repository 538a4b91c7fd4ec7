"""Decoding of the GGML block formats, against the decoder of the `gguf` package and hand numbers."""

import gguf
import numpy as np
import pytest
import torch

from ernie45.checkpoint import ggml_types
from ernie45.checkpoint.ggml_types import GGMLType, dequantize, type_from_id
from ernie45.errors import CheckpointError


def oracle(raw: np.ndarray, kind: GGMLType) -> np.ndarray:
    with np.errstate(all="ignore"):  # random bytes make infinite and undefined scales
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(int(kind))).astype(np.float32, copy=False)


@pytest.mark.parametrize("kind", GGMLType)
def test_random_bytes_decode_bit_for_bit(kind: GGMLType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml_types, "_CHUNK_VALUES", kind.block_length * 50)
    rows = np.random.default_rng(int(kind)).integers(0, 256, (60, 3 * kind.block_bytes), dtype=np.uint8)
    got = dequantize(torch.from_numpy(rows), kind, (4, 15, 3 * kind.block_length))
    want = oracle(rows, kind).reshape(4, 15, -1)
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    same = (got.numpy().view(np.uint32) == want.view(np.uint32)) | (np.isnan(got.numpy()) & np.isnan(want))
    assert same.all(), f"{(~same).sum()} of {same.size} values differ"
    assert np.isfinite(want).mean() > 0.5


@pytest.mark.parametrize("kind", GGMLType)
def test_layout_equals_the_published_table(kind: GGMLType) -> None:
    reference = gguf.GGMLQuantizationType(int(kind))
    assert reference.name == kind.name
    assert gguf.GGML_QUANT_SIZES[reference] == (kind.block_length, kind.block_bytes)


def test_q4_0_by_hand() -> None:
    half = torch.tensor([0.5], dtype=torch.float16).view(torch.uint8)
    nibbles = torch.tensor([0xF0] + [0x88] * 15, dtype=torch.uint8)
    out = dequantize(torch.cat([half, nibbles]), GGMLType.Q4_0, (32,))
    expected = torch.zeros(32)
    expected[0], expected[16] = (0 - 8) * 0.5, (15 - 8) * 0.5
    assert torch.equal(out, expected)


@pytest.mark.parametrize("kind", GGMLType)
def test_empty(kind: GGMLType) -> None:
    assert dequantize(torch.empty(0, dtype=torch.uint8), kind, (0, kind.block_length)).shape == (0, kind.block_length)


@pytest.mark.parametrize(
    ("count", "dtype", "shape"),
    [(17, torch.uint8, (32,)), (18, torch.int8, (32,)), (18, torch.uint8, (2, 16)), (18, torch.uint8, (31,))],
)
def test_bytes_that_do_not_fit_are_refused(count: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match="whole blocks"):
        dequantize(torch.zeros(count, dtype=dtype), GGMLType.Q4_0, shape)


def test_unreadable_types_are_named() -> None:
    assert type_from_id(12, "x") is GGMLType.Q4_K
    for number, name in ((23, "IQ4_XS"), (34, "TQ1_0"), (9, "Q8_1"), (4_000_000_000, "unknown")):
        with pytest.raises(CheckpointError, match=f"^here has type {name}.*Q4_0, .*BF16"):
            type_from_id(number, "here")


def test_names_of_unreadable_types_equal_the_published_ones() -> None:
    for number, name in ggml_types._OTHER_TYPE_NAMES.items():
        assert gguf.GGMLQuantizationType(number).name == name
