"""InternVL in transformers' own form: tiles and a thumbnail, 2 x 2 patches shuffled into one token (arXiv 2412.05271)."""

from __future__ import annotations

from typing import ClassVar

from codebook_prune.adapters.base import VLMAdapter
from codebook_prune.adapters.grids import frames_in, whole
from codebook_prune.visual_tokens import EnteringTokens, Layout


class InternVLAdapter(VLMAdapter):
    """InternVLForConditionalGeneration. Tiles enter one behind the other, the thumbnail last; each is a frame.

    An image is a stretch of tiles with no text between them (the template puts marks around it). The processor gives a video as
    such stretches, one a frame of the video, so its frames count as images.
    """

    model_types: ClassVar[tuple[str, ...]] = ("internvl",)

    def image_layout(self, entering: EnteringTokens) -> list[Layout]:
        """See `VLMAdapter.image_layout`: the tower's square, each side shortened by the pixel shuffle."""
        vision = self.config.vision_config
        rows, columns = (
            int(size // patch * self.config.downsample_ratio)
            for size, patch in zip(vision.image_size, vision.patch_size, strict=True)
        )
        return [whole(rows, columns, tiles) for tiles in frames_in(entering.runs(), rows * columns)]
