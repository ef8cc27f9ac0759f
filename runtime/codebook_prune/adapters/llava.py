"""LLaVA-1.5 and its like: one square image, one fixed grid of tokens, a CLIP-style tower (Liu et al., arXiv 2310.03744)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from codebook_prune.adapters.base import NOT_WHOLE, EnteringTokens, VLMAdapter, framed, raster
from codebook_schemas import UserError


class LlavaAdapter(VLMAdapter):
    """LlavaForConditionalGeneration, VipLlava: `vision_tower` + `multi_modal_projector` + any decoder."""

    model_types: ClassVar[tuple[str, ...]] = ("llava", "vipllava")

    @property
    def connector(self) -> nn.Module:
        """The projector."""
        module: nn.Module = self.model.base_model.multi_modal_projector
        return module

    @property
    def square(self) -> Tensor:
        """[n, 2] (row, column) of the tower's tokens for one crop; a [CLS] that enters the LLM stands in front, at (-1, -1)."""
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        strategy = getattr(self.config, "vision_feature_select_strategy", "default")
        place = raster(side, side)
        return torch.cat([place.new_full((1, 2), -1), place]) if strategy == "full" and self.has_cls else place

    @property
    def has_cls(self) -> bool:
        """Whether the vision tower puts a [CLS] in front of its patches."""
        return bool(self.config.vision_config.model_type == "clip_vision_model")

    def image_layout(self, entering: EnteringTokens) -> Tensor:
        """See `VLMAdapter.image_layout`: every image is the vision tower's whole square, in raster order."""
        square = self.square
        images, rest = divmod(len(entering.ids), len(square))
        if rest:
            raise UserError(NOT_WHOLE)
        return torch.cat([framed(image, 0, square) for image in range(images)])

    def cls_similarity(self, out: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """See `VLMAdapter.cls_similarity`: at the feature layer, 1 for a [CLS] that enters itself."""
        cosine = self.cls_cosine(out)
        return None if cosine is None else cosine.flatten()

    def cls_cosine(self, out: Any) -> Tensor | None:
        """Cosine to [CLS] of every crop's tokens at the feature layer: [crops, n]."""
        layer = self.config.vision_feature_layer
        if not self.has_cls or not isinstance(layer, int) or out.hidden_states is None:
            return None
        hidden = out.hidden_states[layer].float()
        cosine = torch.cosine_similarity(hidden, hidden[:, :1], dim=-1)
        return cosine[:, -len(self.square) :]
