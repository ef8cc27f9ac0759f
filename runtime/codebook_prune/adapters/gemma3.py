"""Gemma 3: pooled square images whose tokens see each other, text layers with sliding windows (arXiv 2503.19786)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from codebook_prune.adapters.base import VLMAdapter
from codebook_prune.adapters.grids import repeated, whole
from codebook_prune.adapters.loading import block_masks
from codebook_prune.visual_tokens import EnteringTokens, Layout


class Gemma3Adapter(VLMAdapter):
    """Gemma3ForConditionalGeneration. A further crop (pan and scan) enters between marks of its own and counts as an image.

    Windows count the tokens that are left: the model is run as if the dropped ones had never been there, which is what compact
    positions say; an image's kept tokens go on seeing each other.
    """

    model_types: ClassVar[tuple[str, ...]] = ("gemma3",)
    own_masks: ClassVar[bool] = True

    def image_layout(self, entering: EnteringTokens) -> list[Layout]:
        """See `VLMAdapter.image_layout`: one square a crop."""
        side = math.isqrt(self.config.mm_tokens_per_image)
        return repeated(whole(side, side), len(entering))

    def masks(self, arguments: Mapping[str, Any], types: Tensor | None) -> Any:
        """See `VLMAdapter.masks`; the decoder makes plain causal masks by itself."""
        return arguments["attention_mask"] if types is None else block_masks(self.decoder.config, arguments, types)
