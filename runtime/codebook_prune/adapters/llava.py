"""LLaVA-1.5 and its like: one square image, one fixed grid of tokens, a CLIP-style tower (Liu et al., arXiv 2310.03744)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from codebook_prune.adapters.base import Encoder, VLMAdapter
from codebook_prune.adapters.grids import clip_cosine, repeated, stacked, tower_square
from codebook_prune.visual_tokens import EnteringTokens, Layout


class LlavaAdapter(VLMAdapter):
    """LlavaForConditionalGeneration, VipLlava: `vision_tower` + `multi_modal_projector` + any decoder."""

    model_types: ClassVar[tuple[str, ...]] = ("llava", "vipllava")

    @property
    def encoder(self) -> Encoder | None:
        """See `VLMAdapter.encoder`: the feature layer, where it is one layer of a tower with a list of them."""
        tower, layer = self.model.base_model.vision_tower, self.config.vision_feature_layer
        layers = getattr(getattr(tower, "encoder", None), "layers", None)
        if layers is None or not isinstance(layer, int) or layer == 0:
            return None
        number = layer if layer < 0 else layer - 1  # among hidden states, the first of which is no layer's
        return Encoder(tower, layers[number], self.config.vision_config.model_type == "clip_vision_model")

    def image_layout(self, entering: EnteringTokens) -> list[Layout]:
        """See `VLMAdapter.image_layout`: every image is the vision tower's whole square, in raster order."""
        return repeated(self._square, len(entering))

    @cached_property
    def _square(self) -> Layout:
        strategy = getattr(self.config, "vision_feature_select_strategy", "default")
        return stacked(tower_square(self.config, with_cls=strategy == "full"))

    def cls_similarity(self, out: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """See `VLMAdapter.cls_similarity`; 1 for a [CLS] that enters itself."""
        cosine = clip_cosine(self.config, out)
        if cosine is None:
            return None
        return cosine.flatten() if self.config.vision_feature_select_strategy == "full" else cosine[:, 1:].flatten()
