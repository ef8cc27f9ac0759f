"""Video-LLaVA: images and videos of eight frames, a CLIP-style tower for each (Lin et al., arXiv 2311.10122)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from codebook_prune.adapters.base import VLMAdapter
from codebook_prune.adapters.grids import clip_cosine, frames_in, repeated, stacked, tower_square
from codebook_prune.visual_tokens import EnteringTokens, Layout


class VideoLlavaAdapter(VLMAdapter):
    """VideoLlavaForConditionalGeneration. The [CLS] of every video frame enters the LLM; it is never pruned."""

    model_types: ClassVar[tuple[str, ...]] = ("video_llava",)

    def image_layout(self, entering: EnteringTokens) -> list[Layout]:
        """See `VLMAdapter.image_layout`: every image is the vision tower's whole square."""
        return repeated(stacked(self._square("full")), len(entering))

    def video_layout(self, entering: EnteringTokens) -> list[Layout]:
        """See `VLMAdapter.video_layout`; a video is a stretch of frames with no text between them."""
        cells = self._square("default", "full")
        return [stacked(cells, frames) for frames in frames_in(entering.runs(), len(cells))]

    def cls_similarity(self, out: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """See `VLMAdapter.cls_similarity`; 1 for a [CLS] that enters itself."""
        cosine = clip_cosine(self.config, out)
        return None if cosine is None else cosine[:, -len(self._square("full")) :].flatten()

    def _square(self, *with_cls: str) -> Tensor:
        return tower_square(self.config, with_cls=self.config.vision_feature_select_strategy in with_cls)
