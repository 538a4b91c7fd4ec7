"""Vision encoder and resampler: from the pixels of patches to rows that take the place of placeholder embeddings.

    rows (S, 588) --encoder--> (S, 1280) --resampler--> (S / 4 per image, S / 8 per video; H)

Images and videos follow each other along S, each with a row (t, h, w) in `grid_thw`: t frames (1 = image) of h x w
patches. Rows come window by window: the four patches of a 2 x 2 window are neighbours, because the resampler joins
them. Module names are those of the published files (`vision_model.*`, `model.resampler_model.*`).

Shape letters: S patch rows, M images and videos, C encoder width, N heads, D head size, H hidden size of the decoder.
Source: architecture reference 3.2 (encoder), 3.3 (order of the rows), 3.4 (resampler).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernie45.config.model import ModelConfig, VisionConfig
from ernie45.errors import ConfigError, ShapeError
from ernie45.layers.norm import RMSNorm
from ernie45.layers.rope import rotary_frequencies

_ROTARY_THETA = 10000.0  # the encoder's own, not the decoder's 500000; no published config states it


class Grid(NamedTuple):
    """Extent of one image or video: t frames (1 = image) of h rows and w columns."""

    t: int
    h: int
    w: int

    @property
    def size(self) -> int:
        """Cells of the grid."""
        return self.t * self.h * self.w

    def merged(self, vision: VisionConfig) -> Grid:
        """The grid of the resampler's output: windows and groups of frames become one, an image keeps its frame."""
        side = vision.spatial_merge_size
        return Grid(1 if self.t == 1 else self.t // vision.temporal_merge_size, self.h // side, self.w // side)


def read_grids(grid_thw: Tensor, vision: VisionConfig) -> list[Grid]:
    """Check `grid_thw`, integer (M, 3) with M >= 1, and return its rows.

    Raises: ShapeError for another shape or dtype, and for a grid that does not divide into whole windows and whole
        groups of frames.
    """
    shape_fits = grid_thw.ndim == 2 and grid_thw.shape[1] == 3 and len(grid_thw) > 0
    if not shape_fits or grid_thw.dtype not in (torch.int64, torch.int32):
        raise ShapeError(
            f"grid_thw has shape {tuple(grid_thw.shape)} and dtype {grid_thw.dtype}, expected int64 (items, 3) with "
            "one row (frames, patch rows, patch columns) per image or video"
        )
    grids = [Grid(*row) for row in grid_thw.tolist()]
    side, group = vision.spatial_merge_size, vision.temporal_merge_size
    for item, (t, h, w) in enumerate(grids):
        if min(t, h, w) <= 0 or h % side or w % side:
            raise ShapeError(
                f"item {item} has a grid of {t} x {h} x {w} patches, expected one frame or more whose height and width "
                f"are positive multiples of {side}: resize it to multiples of {side * vision.patch_size} pixels"
            )
        if t > 1 and t % group:
            raise ShapeError(
                f"item {item} has {t} frames, expected 1 (an image) or a multiple of {group}: repeat the last frame"
            )
    return grids


def quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`."""
    return x * torch.sigmoid(1.702 * x)


def patch_angles(grids: Sequence[Grid], vision: VisionConfig, device: torch.device | None = None) -> Tensor:
    """Rotary angles of every patch, float32 (S, D / 2): the first half turns with the row, the second with the column.

    Dimension i of a head is paired with i + D / 2 (half-split, unlike the decoder). Frames share their angles.
    """
    head_dim, side = vision.hidden_size // vision.num_heads, vision.spatial_merge_size
    places = []
    for t, h, w in grids:
        rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
        place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        windows = place.reshape(h // side, side, w // side, side, 2).transpose(1, 2)
        places.append(windows.reshape(h * w, 2).repeat(t, 1))
    frequencies = rotary_frequencies(head_dim // 2, _ROTARY_THETA, device)
    return (torch.cat(places).float()[..., None] * frequencies).flatten(1)


class PatchEmbed(nn.Module):
    """The pixels of a patch, projected; no position embedding and no class token."""

    def __init__(self, vision: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.proj = nn.Linear(vision.patch_width, vision.hidden_size, bias=False, dtype=dtype)

    def forward(self, rows: Tensor) -> Tensor:
        """(S, channels * patch * patch) in any float dtype -> (S, C) in the weights' dtype."""
        out: Tensor = self.proj(rows.to(self.proj.weight.dtype))
        return out


class VisionAttention(nn.Module):
    """Attention without a mask inside each frame; patches of different frames never meet."""

    def __init__(self, vision: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        width = vision.hidden_size
        self.num_heads, self.head_dim = vision.num_heads, width // vision.num_heads
        self.qkv = nn.Linear(width, 3 * width, dtype=dtype)
        self.proj = nn.Linear(width, width, dtype=dtype)

    def forward(self, x_SC: Tensor, cos: Tensor, sin: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Args: cos, sin: of `patch_angles`, float32 (S, D / 2). Returns (S, C)."""
        qkv = self.qkv(x_SC).reshape(-1, 3, self.num_heads, self.head_dim)
        qk = _rotate_half_split(qkv[:, :2], cos[:, None, None], sin[:, None, None])
        qkv = torch.cat((qk, qkv[:, 2:]), dim=1)
        items = torch.split(qkv, [grid.size for grid in grids])
        frames = [self._within_frames(item, grid.t) for item, grid in zip(items, grids, strict=True)]
        out: Tensor = self.proj(torch.cat(frames).flatten(1))
        return out

    def _within_frames(self, qkv: Tensor, num_frames: int) -> Tensor:
        """One item, (patches, 3, N, D) -> (patches, N, D); its frames have one size and form the batch."""
        batch = qkv.reshape(num_frames, -1, 3, self.num_heads, self.head_dim)
        q, k, v = batch.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5)
        return out.transpose(1, 2).flatten(0, 1)


class VisionMlp(nn.Module):
    """The feed-forward part of an encoder block."""

    def __init__(self, vision: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision.hidden_size, vision.intermediate_size, dtype=dtype)
        self.fc2 = nn.Linear(vision.intermediate_size, vision.hidden_size, dtype=dtype)

    def forward(self, x_SC: Tensor) -> Tensor:
        """(S, C) -> (S, C)."""
        out: Tensor = self.fc2(quick_gelu(self.fc1(x_SC)))
        return out


class VisionBlock(nn.Module):
    """Attention and feed-forward, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, vision: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps, dtype=dtype)
        self.norm2 = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps, dtype=dtype)
        self.attn = VisionAttention(vision, dtype)
        self.mlp = VisionMlp(vision, dtype)

    def forward(self, x_SC: Tensor, cos: Tensor, sin: Tensor, grids: Sequence[Grid]) -> Tensor:
        """(S, C) -> (S, C)."""
        x_SC = x_SC + self.attn(self.norm1(x_SC), cos, sin, grids)
        out: Tensor = x_SC + self.mlp(self.norm2(x_SC))
        return out


class VisionEncoder(nn.Module):
    """The vision transformer."""

    def __init__(self, vision: VisionConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.vision = vision
        self.patch_embed = PatchEmbed(vision, dtype)
        self.blocks = nn.ModuleList(VisionBlock(vision, dtype) for _ in range(vision.depth))
        self.ln = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps, dtype=dtype)

    def forward(self, rows: Tensor, grid_thw: Tensor) -> Tensor:
        """Encode the patches of all images and videos of a step.

        Args: rows: normalised pixels, float (S, channels * patch * patch), each row in the order channel, y, x.
            grid_thw: int64 (M, 3).
        Returns: (S, C). Raises: ShapeError.
        """
        grids = read_grids(grid_thw, self.vision)
        _check_rows(rows, grids, self.vision.patch_width, "patch rows")
        # The angles are float32 whatever the weights' dtype, as in the decoder.
        angles = patch_angles(grids, self.vision, rows.device)
        cos, sin = angles.cos(), angles.sin()
        x_SC = self.patch_embed(rows)
        for block in self.blocks:
            x_SC = block(x_SC, cos, sin, grids)
        out: Tensor = self.ln(x_SC)
        return out


class Resampler(nn.Module):
    """Joins the patches of a window, then the frames of a pair, and projects to the width of the language network.

    An image passes the temporal stage as well, beside itself: it counts as two equal frames.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if config.vision is None:
            raise ConfigError("a resampler needs a config with a vision part: this one describes a text model")
        vision = config.vision
        self.vision = vision
        window = vision.hidden_size * vision.spatial_merge_size**2
        self.spatial_linear = _joining_mlp(window, window, vision.layer_norm_eps, dtype)
        self.temporal_linear = _joining_mlp(window * vision.temporal_merge_size, window, vision.layer_norm_eps, dtype)
        self.mlp = nn.Linear(window, config.hidden_size, dtype=dtype)
        self.after_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def forward(self, x_SC: Tensor, grid_thw: Tensor) -> Tensor:
        """Args: x_SC: the encoder's output. grid_thw: int64 (M, 3), in patches.

        Returns: (features, H), item after item, each in the order frame pair, window row, window column.
        Raises: ShapeError.
        """
        grids = read_grids(grid_thw, self.vision)
        _check_rows(x_SC, grids, self.vision.hidden_size, "encoded patches")
        window = self.vision.spatial_merge_size**2
        joined = self.spatial_linear(x_SC.reshape(-1, window * self.vision.hidden_size))
        items = torch.split(joined, [grid.size // window for grid in grids])
        groups = [self._beside_each_other(item, grid.t) for item, grid in zip(items, grids, strict=True)]
        out: Tensor = self.after_norm(self.mlp(self.temporal_linear(torch.cat(groups))))
        return out

    def _beside_each_other(self, windows: Tensor, num_frames: int) -> Tensor:
        """One item, (frames * windows, X) -> (groups * windows, X * frames of a group), the earlier frame first."""
        group, width = self.vision.temporal_merge_size, windows.shape[-1]
        if num_frames == 1:
            return windows.repeat(1, group)
        grouped = windows.reshape(num_frames // group, group, -1, width).transpose(1, 2)
        return grouped.reshape(-1, group * width)


def _joining_mlp(width_in: int, width_out: int, eps: float, dtype: torch.dtype) -> nn.Sequential:
    """The published files number these modules: 0 and 2 are the matrices, 3 is the norm; GELU is the exact one."""
    return nn.Sequential(
        nn.Linear(width_in, width_out, dtype=dtype),
        nn.GELU(),
        nn.Linear(width_out, width_out, dtype=dtype),
        nn.LayerNorm(width_out, eps=eps, dtype=dtype),
    )


def _rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def _check_rows(rows: Tensor, grids: Sequence[Grid], width: int, what: str) -> None:
    num_rows = sum(grid.size for grid in grids)
    if rows.shape != (num_rows, width) or not rows.is_floating_point():
        raise ShapeError(
            f"{what} have shape {tuple(rows.shape)} and dtype {rows.dtype}, expected float ({num_rows}, {width}): "
            f"the {len(grids)} grids hold {num_rows} patches, and bytes have to be normalised first"
        )
