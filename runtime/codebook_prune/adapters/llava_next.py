"""LLaVA-NeXT and LLaVA-NeXT-Video: images of any resolution as an overview and a finer grid; videos as pooled frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from codebook_prune.adapters.base import VLMAdapter
from codebook_prune.adapters.grids import (
    any_resolution,
    clip_cosine,
    frames_in,
    newline_places,
    tower_side,
    whole,
)
from codebook_prune.visual_tokens import EnteringTokens, Layout


class LlavaNextAdapter(VLMAdapter):
    """LlavaNextForConditionalGeneration, LlavaNextVideoForConditionalGeneration (Liu et al., LLaVA-NeXT, 2024)."""

    model_types: ClassVar[tuple[str, ...]] = ("llava_next", "llava_next_video")

    def image_layout(self, entering: EnteringTokens) -> list[Layout]:
        """See `VLMAdapter.image_layout`: overview, then what unpadding left of the crops, a newline behind every row."""
        newline = newline_places(entering, self.model.base_model.image_newline)
        return any_resolution(newline, tower_side(self.config))

    def video_layout(self, entering: EnteringTokens) -> list[Layout]:
        """See `VLMAdapter.video_layout`: frames one after the other, pooled, no newline."""
        config = self.config
        side = config.vision_config.image_size // config.vision_config.patch_size // config.spatial_pool_stride
        return [whole(side, side, frames) for frames in frames_in(entering.video_lengths(), side * side)]

    def cls_similarity(self, out: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """See `VLMAdapter.cls_similarity`: every token to its own crop's [CLS]; None if images differ in their crops."""
        cosine, sizes, crops = clip_cosine(self.config, out), inputs["image_sizes"], inputs["pixel_values"].shape[1]
        if cosine is None or len(cosine) != len(sizes) * crops:
            return None
        packed, _ = self.model.base_model.pack_image_features(
            torch.split(cosine[:, 1:, None], crops), sizes, "default", image_newline=cosine.new_zeros(1)
        )
        return torch.cat([image[:, 0] for image in packed])
