"""Positions of a sequence with images and videos: time, height and width for every token.

Text counts on along all three axes at once, so a text-only sequence has its usual positions; the tokens of an image or
video spread over a grid that starts where the text stopped. Source: architecture reference 3.7.

Shape letters: T tokens, M images and videos.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ernie45.config.model import VisionConfig
from ernie45.errors import ShapeError
from ernie45.models.vision import Grid, read_grids


def mrope_positions(
    ids_T: Tensor, grid_thw: Tensor | None, vision: VisionConfig, *, spatial_advance: bool = False
) -> tuple[Tensor, int]:
    """Positions of one sequence without padding.

    Args: ids_T: int64 (T,); placeholders belong to the rows of `grid_thw` in order, one per feature.
        grid_thw: int64 (M, 3), frames, rows and columns in patches; None without media.
        spatial_advance: how far text moves on behind a video. False: by the longest of the three axes (Paddle, vLLM,
            SGLang). True: by the longer of height and width only, as transformers 5 does; this differs where frame
            pairs outnumber both.
    Returns: positions, int64 (T, 3) in the order time, height, width, on the device of the ids; and the position, the
        same on all axes, of the token that follows: one more than the highest so far.
    Raises: ShapeError if placeholders and grids disagree.
    """
    if ids_T.ndim != 1 or ids_T.is_floating_point():
        raise ShapeError(f"ids have shape {tuple(ids_T.shape)} and dtype {ids_T.dtype}, expected int64 (T,)")
    grids = [] if grid_thw is None else [grid.merged(vision) for grid in read_grids(grid_thw, vision)]
    ids = ids_T.cpu()
    positions = torch.empty(len(ids), 3, dtype=torch.int64)
    token = position = 0
    for start, grid in zip(_item_starts(ids, grids, vision), grids, strict=True):
        _count_text(positions, token, start, position)
        position += start - token
        token = start + grid.size
        axes = torch.meshgrid(*(torch.arange(extent) for extent in grid), indexing="ij")
        positions[start:token] = position + torch.stack(axes, dim=-1).reshape(grid.size, 3)
        position += max(grid.h, grid.w) if spatial_advance else max(grid)
    _count_text(positions, token, len(ids), position)
    next_position = int(positions.max()) + 1 if len(positions) else 0
    return positions.to(ids_T.device), next_position


def _count_text(positions: Tensor, start: int, end: int, first: int) -> None:
    positions[start:end] = torch.arange(first, first + end - start)[:, None]


def _item_starts(ids: Tensor, grids: list[Grid], vision: VisionConfig) -> list[int]:
    """Index of each item's first placeholder. Items may touch, but each must be one run of one placeholder."""
    slots = torch.isin(ids, torch.tensor([vision.im_patch_id, vision.video_patch_id])).nonzero().flatten()
    expected = sum(grid.size for grid in grids)
    if len(slots) != expected:
        raise ShapeError(
            f"{len(slots)} placeholder tokens in the sequence, but its {len(grids)} images and videos need {expected}: "
            f"repeat token {vision.im_patch_id} (or {vision.video_patch_id} for video) once per feature"
        )
    starts, used = [], 0
    for item, grid in enumerate(grids):
        here = slots[used : used + grid.size]
        start = int(here[0])
        if int(here[-1]) - start != grid.size - 1 or bool((ids[here] != ids[start]).any()):
            raise ShapeError(
                f"item {item} needs {grid.size} equal placeholders in a row from token {start} on, but another token "
                "comes between them: are the grids in the order of the sequence?"
            )
        starts.append(start)
        used += grid.size
    return starts
