"""LLaVA-1.5 and its like: one square image, one fixed grid of tokens, a CLIP-style tower (Liu et al., arXiv 2310.03744)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from codebook_prune.adapters.base import EnteringTokens, VLMAdapter
from codebook_prune.adapters.grids import clip_cosine, repeated, tower_square


class LlavaAdapter(VLMAdapter):
    """LlavaForConditionalGeneration, VipLlava: `vision_tower` + `multi_modal_projector` + any decoder."""

    model_types: ClassVar[tuple[str, ...]] = ("llava", "vipllava")

    @property
    def connector(self) -> nn.Module:
        """The projector."""
        module: nn.Module = self.model.base_model.multi_modal_projector
        return module

    def image_layout(self, entering: EnteringTokens) -> Tensor:
        """See `VLMAdapter.image_layout`: every image is the vision tower's whole square, in raster order."""
        strategy = getattr(self.config, "vision_feature_select_strategy", "default")
        return repeated(tower_square(self.config, with_cls=strategy == "full"), len(entering.ids))

    def cls_similarity(self, out: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """See `VLMAdapter.cls_similarity`; 1 for a [CLS] that enters itself."""
        cosine = clip_cosine(self.config, out)
        if cosine is None:
            return None
        return cosine.flatten() if self.config.vision_feature_select_strategy == "full" else cosine[:, 1:].flatten()
