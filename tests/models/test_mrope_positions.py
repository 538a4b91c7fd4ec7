"""Positions against the reference's worked example, a literal transcription of its pseudo-code, and transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeModel

from ernie45.config.model import VisionConfig
from ernie45.errors import ShapeError
from ernie45.models.mrope_positions import mrope_positions

IMAGE, VIDEO, TEXT = 90, 91, 7
VISION = VisionConfig(im_patch_id=IMAGE, video_patch_id=VIDEO)


def num_tokens(t: int, h: int, w: int) -> int:
    return (1 if t == 1 else t // 2) * (h // 2) * (w // 2)


def sequence(parts: list[int | tuple[int, int, int]]) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Ids and grids of a sequence; a number stands for that many text tokens, a triple for an image or video."""
    ids: list[int] = []
    grids = []
    for part in parts:
        if isinstance(part, int):
            ids += [TEXT] * part
        else:
            ids += [IMAGE if part[0] == 1 else VIDEO] * num_tokens(*part)
            grids.append(part)
    return ids, grids


def by_pseudo_code(parts: list[int | tuple[int, int, int]], *, spatial: bool) -> list[tuple[int, int, int]]:
    """Architecture reference 3.7, step by step."""
    out, p = [], 0
    for part in parts:
        if isinstance(part, int):
            for _ in range(part):
                out.append((p, p, p))
                p += 1
            continue
        t, h, w = 1 if part[0] == 1 else part[0] // 2, part[1] // 2, part[2] // 2
        out += [(p + ti, p + hi, p + wi) for ti in range(t) for hi in range(h) for wi in range(w)]
        p += max(h, w) if spatial else max(t, h, w)
    return out


def test_worked_example_of_the_reference() -> None:
    ids, grids = sequence([3, (1, 4, 6), 2])
    positions, following = mrope_positions(torch.tensor(ids), torch.tensor(grids), VISION)
    time, height, width = positions.T.tolist()
    assert time == [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7]
    assert height == [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7]
    assert width == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7]
    assert following == 8
    assert following - len(ids) == -3  # the published "delta"
    assert positions.dtype == torch.int64


GRIDS = st.one_of(
    st.tuples(st.just(1), st.sampled_from([2, 4, 6, 10]), st.sampled_from([2, 4, 8])),
    st.tuples(st.sampled_from([2, 4, 12]), st.sampled_from([2, 4, 6]), st.sampled_from([2, 4])),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(st.integers(1, 5), GRIDS), min_size=1, max_size=7), st.booleans())
def test_equals_the_pseudo_code(parts: list[int | tuple[int, int, int]], spatial: bool) -> None:
    ids, grids = sequence(parts)
    positions, following = mrope_positions(
        torch.tensor(ids), torch.tensor(grids) if grids else None, VISION, spatial_advance=spatial
    )
    expected = by_pseudo_code(parts, spatial=spatial)
    assert [tuple(row) for row in positions.tolist()] == expected
    assert following == 1 + max(max(row) for row in expected)


@pytest.fixture(scope="module")
def transformers_model() -> Any:
    text = {
        "vocab_size": 100,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [3, 3, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 1, "intermediate_size": 16}
    return Ernie4_5_VLMoeModel(Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision))


@pytest.mark.parametrize(
    ("parts", "same_without_option"),
    [
        ([3, (1, 4, 6), 2, (1, 8, 2), 1, (1, 2, 2), 4], True),
        ([2, (4, 4, 8), 3, (1, 6, 4), 2], True),
        ([2, (12, 4, 2), 3], False),
        ([2, (12, 2, 2), 1, (1, 4, 4), 1, (8, 2, 4)], False),
    ],
)
def test_equals_transformers(
    transformers_model: Any, parts: list[int | tuple[int, int, int]], same_without_option: bool
) -> None:
    ids, grids = sequence(parts)
    ids_T = torch.tensor(ids)
    kinds = (ids_T == IMAGE).int() + 2 * (ids_T == VIDEO).int()
    images, videos = [g for g in grids if g[0] == 1], [g for g in grids if g[0] > 1]
    expected, delta = transformers_model.get_rope_index(
        ids_T[None],
        kinds[None],
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
    )
    theirs, following = mrope_positions(ids_T, torch.tensor(grids), VISION, spatial_advance=True)
    assert torch.equal(theirs.T, expected[:, 0])
    assert following - len(ids) == delta.item()
    ours, _ = mrope_positions(ids_T, torch.tensor(grids), VISION)
    assert torch.equal(ours, theirs) == same_without_option


def test_text_alone_and_nothing_at_all() -> None:
    positions, following = mrope_positions(torch.tensor([5, 6, 7]), None, VISION)
    assert positions.tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    assert following == 3
    positions, following = mrope_positions(torch.empty(0, dtype=torch.int64), None, VISION)
    assert positions.shape == (0, 3)
    assert following == 0


def test_videos_of_the_original_format_use_the_image_placeholder() -> None:
    grid = torch.tensor([[4, 4, 2]])
    original, _ = mrope_positions(torch.tensor([TEXT, *[IMAGE] * 4, TEXT]), grid, VISION)
    native, _ = mrope_positions(torch.tensor([TEXT, *[VIDEO] * 4, TEXT]), grid, VISION)
    assert torch.equal(original, native)


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([TEXT, IMAGE, TEXT], [[1, 4, 4]], "1 placeholder tokens .* need 4"),
        ([IMAGE] * 5, [[1, 4, 4]], "5 placeholder tokens .* need 4"),
        ([TEXT, IMAGE], None, "1 placeholder tokens .* need 0"),
        ([IMAGE, TEXT, IMAGE], [[1, 2, 4]], "item 0 needs 2 equal placeholders in a row from token 0"),
        ([IMAGE, VIDEO, VIDEO], [[1, 2, 2], [1, 2, 4]], ""),
        ([IMAGE, VIDEO, VIDEO], [[1, 2, 4], [1, 2, 2]], "item 0 needs 2 equal placeholders"),
        ([IMAGE] * 2, [[1, 3, 4]], "1 x 3 x 4 .* multiples of 2"),
        ([IMAGE] * 2, [[3, 2, 2]], "3 frames"),
    ],
)
def test_disagreement_is_an_error(ids: list[int], grids: list[list[int]] | None, message: str) -> None:
    grid_thw = None if grids is None else torch.tensor(grids)
    if not message:
        assert mrope_positions(torch.tensor(ids), grid_thw, VISION)[1] == 3
        return
    with pytest.raises(ShapeError, match=message):
        mrope_positions(torch.tensor(ids), grid_thw, VISION)


def test_ids_must_be_one_sequence() -> None:
    with pytest.raises(ShapeError, match=r"\(1, 3\)"):
        mrope_positions(torch.tensor([[1, 2, 3]]), None, VISION)
    with pytest.raises(ShapeError, match="float32"):
        mrope_positions(torch.zeros(3), None, VISION)
