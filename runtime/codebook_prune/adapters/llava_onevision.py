"""LLaVA-OneVision: one image at any resolution, several images as one crop each, videos as pooled frames (arXiv 2408.03326)."""

from __future__ import annotations

from typing import ClassVar

import torch

from codebook_prune.adapters.base import VLMAdapter
from codebook_prune.adapters.grids import any_resolution, frames_in, newline_places, tower_side, whole
from codebook_prune.visual_tokens import EnteringTokens, Layout


class LlavaOnevisionAdapter(VLMAdapter):
    """LlavaOnevisionForConditionalGeneration; its SigLIP tower has no [CLS]."""

    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)

    def image_layout(self, entering: EnteringTokens) -> list[Layout]:
        """See `VLMAdapter.image_layout`: overview, then the rows of the finer grid; of several images, the overview alone."""
        newline = newline_places(entering, self.model.base_model.image_newline)
        return any_resolution(newline, tower_side(self.config))

    def video_layout(self, entering: EnteringTokens) -> list[Layout]:
        """See `VLMAdapter.video_layout`: frames halved in height and width, one newline behind the last."""
        side = -(-self.config.vision_config.image_size // self.config.vision_config.patch_size // 2)
        frames = frames_in([length - 1 for length in entering.video_lengths()], side * side)
        videos = [whole(side, side, count) for count in frames]
        newline = torch.full((1, 2), -1)
        return [Layout(torch.cat([v.frame, v.frame[-1:]]), torch.cat([v.position, newline])) for v in videos]
