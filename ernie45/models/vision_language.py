"""The vision-language network: the language network with two pools of experts, a vision encoder and a resampler.

    media rows --vision_model--> patches --resampler_model--> features --+
    ids ------------------------- embedding --------------------------- embed --> model (3 positions each) --> logits

A step of an engine or a trainer is four calls: `embed`, `mrope_positions`, `vision_mask` and `model(...)`; `forward` is
these four for one sequence. Module names follow the published files but for one rename: `model.resampler_model.*` is
`resampler_model.*` here, because the language network has no use for it.

Shape letters: B sequences, T tokens, S patch rows, M images and videos, H hidden, V vocabulary.
Source: architecture reference, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ernie45.config.model import ModelConfig
from ernie45.errors import ConfigError, ShapeError
from ernie45.layers.cache import AttentionView
from ernie45.models.mrope_positions import mrope_positions
from ernie45.models.text import CausalLM
from ernie45.models.vision import Resampler, VisionEncoder


class VisionLanguageModel(CausalLM):
    """A language model that takes images and videos as well."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        if config.vision is None:
            raise ConfigError("a vision-language model needs a config with a vision part: this one is a text model's")
        super().__init__(config, dtype)
        self.vision = config.vision
        self.vision_model = VisionEncoder(config.vision, dtype)
        self.resampler_model = Resampler(config, dtype)

    def forward(
        self,
        ids: Tensor,
        rows: Tensor | None = None,
        grid_thw: Tensor | None = None,
        *,
        spatial_advance: bool = False,
    ) -> Tensor:
        """Logits of every position of one sequence with its images and videos, or of rows of text without padding.

        A convenience for scoring and tests, as `CausalLM.forward` is.
        Args: ids: int64 (T,), or (B, T) without media. rows: patches of all media in the order of the sequence, float
            (S, channels * patch * patch). grid_thw: int64 (M, 3). spatial_advance: see `mrope_positions`.
        Returns: (T, V) or (B, T, V). Raises: ShapeError.
        """
        if ids.ndim not in (1, 2) or ids.is_floating_point() or not ids.numel():
            raise ShapeError(f"ids have shape {tuple(ids.shape)} and dtype {ids.dtype}, expected int64 (T,) or (B, T)")
        if (rows is None) != (grid_thw is None):
            raise ShapeError(f"{'rows' if rows is None else 'grid_thw'} is missing: the two come together")
        view = AttentionView(lengths=(ids.shape[-1],) * (ids.numel() // ids.shape[-1]))
        features, positions = None, view.positions(ids.device)
        if rows is not None and grid_thw is not None:
            if ids.ndim == 2:
                raise ShapeError(f"ids have shape {tuple(ids.shape)}, but media belong to one sequence: pass ids (T,)")
            positions, _ = mrope_positions(ids, grid_thw, self.vision, spatial_advance=spatial_advance)
            features = self.encode_images(rows, grid_thw)
        ids_T = ids.flatten()
        mask_T = self.vision_mask(ids_T)
        # Without a mask only the text pool runs: exactly the path of the text network.
        hidden_TH = self.model(self.embed(ids_T, features), positions, view, mask_T if bool(mask_T.any()) else None)
        return self.logits(hidden_TH).reshape(*ids.shape, -1)

    def encode_images(self, rows: Tensor, grid_thw: Tensor) -> Tensor:
        """Features of images and videos, one row per placeholder token.

        Args: rows: normalised pixels, float (S, channels * patch * patch). grid_thw: int64 (M, 3).
        Returns: (features, H): h * w / 4 for an image of h x w patches, t * h * w / 8 for a video of t frames.
        Raises: ShapeError.
        """
        out: Tensor = self.resampler_model(self.vision_model(rows, grid_thw), grid_thw)
        return out

    def embed(
        self, ids_T: Tensor, features: Tensor | None = None, placeholder_ids: tuple[int, ...] | None = None
    ) -> Tensor:
        """Embeddings of packed tokens, with the placeholders' rows replaced by `features` in order of appearance.

        A piece of a prompt takes the features of its own placeholders only. Generated tokens need no call of this: hand
        their ids to `model`.
        Args: ids_T: int64 (T,). features: (placeholders, H), from `encode_images`; None means there are none.
            placeholder_ids: the tokens to replace; None means both the one of the original format, which serves images
            and videos, and the separate one that transformers >= 5 has for videos.
        Returns: (T, H). Raises: ShapeError if the number of placeholders is not the number of features.
        """
        if placeholder_ids is None:
            placeholder_ids = (self.vision.im_patch_id, self.vision.video_patch_id)
        slots = torch.isin(ids_T, torch.tensor(placeholder_ids, device=ids_T.device)).nonzero().flatten()
        expected = (len(slots), self.config.hidden_size)
        received = (0, self.config.hidden_size) if features is None else tuple(features.shape)
        if received != expected:
            raise ShapeError(
                f"features have shape {received}, expected {expected}: {len(slots)} of {len(ids_T)} tokens are the "
                f"placeholders {placeholder_ids}, and each takes one row"
            )
        embedded_TH: Tensor = self.model.embed_tokens(ids_T)
        if features is None:
            return embedded_TH
        return embedded_TH.index_copy(0, slots, features.to(embedded_TH.dtype))

    def vision_mask(self, ids_T: Tensor) -> Tensor:
        """Which prompt tokens the vision experts serve, bool (T,): placeholders and the four delimiters around them.

        Generated tokens are text, whatever their id.
        """
        vision = self.vision
        ids = (
            vision.im_patch_id,
            vision.video_patch_id,
            vision.image_start_token_id,
            vision.image_end_token_id,
            vision.video_start_token_id,
            vision.video_end_token_id,
        )
        return torch.isin(ids_T, torch.tensor(ids, device=ids_T.device))
