"""LLaVA-1.5 and its like: one square image, one fixed grid of tokens, a CLIP-style tower (Liu et al., arXiv 2310.03744)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from codebook_prune.adapters.base import VisualTokens, VLMAdapter
from codebook_schemas import UserError


class LlavaAdapter(VLMAdapter):
    """LlavaForConditionalGeneration, VipLlava: `vision_tower` + `multi_modal_projector` + any decoder."""

    model_types: ClassVar[tuple[str, ...]] = ("llava",)

    @property
    def connector(self) -> nn.Module:
        """The projector."""
        module: nn.Module = self.model.base_model.multi_modal_projector
        return module

    def image_lengths(self, total: int, call: Mapping[str, Any]) -> list[int]:
        """All images have the same length (or their encoder outputs say theirs)."""
        encoded = (call.get("mm_encoder_outputs") or {}).get("image")
        if encoded is not None:
            return [len(tokens) for tokens in encoded.pooler_output]
        pixels = call.get("pixel_values")
        images = len(pixels) if pixels is not None else 1
        return [total // images] * images

    def token_positions(self, lengths: Sequence[int]) -> torch.Tensor:
        """See `VLMAdapter.token_positions`: every image is the vision tower's whole square, in raster order."""
        vision, strategy = self.config.vision_config, self.config.vision_feature_select_strategy
        side = vision.image_size // vision.patch_size
        raster = torch.arange(side * side)
        position = torch.stack([raster // side, raster % side], 1)
        if strategy == "full" and vision.model_type == "clip_vision_model":  # [CLS] enters the LLM too
            position = torch.cat([position.new_full((1, 2), -1), position])
        for length in lengths:
            if length != len(position):
                raise UserError(
                    f"an image enters with {length} of its {len(position)} tokens: a prefill in chunks (prefill_chunk_size) "
                    "cannot be pruned, nor can images of other sizes"
                )
        return position.repeat(len(lengths), 1)

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, Any]) -> VisualTokens:
        """See `VLMAdapter.encode`; the grid is square-patch raster order, [CLS] similarity is taken at the feature layer."""
        base, config = self.model.base_model, self.config
        pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        out = base.get_image_features(
            pixel_values=pixels,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            return_dict=True,
        )
        embeddings = torch.stack(list(out.pooler_output))
        images, n, _ = embeddings.shape
        patch = config.vision_config.patch_size
        rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        raster = torch.arange(rows * columns, device=embeddings.device)
        position = torch.stack([raster // columns, raster % columns], 1)
        if n == rows * columns + 1:  # select strategy "full": [CLS] enters the LLM too
            position = torch.cat([position.new_full((1, 2), -1), position])
        return VisualTokens(
            embeddings.flatten(0, 1),
            torch.arange(images, device=embeddings.device).repeat_interleave(n),
            position.repeat(images, 1),
            self._cls_similarity(out, n),
        )

    def _cls_similarity(self, out: Any, tokens: int) -> torch.Tensor | None:
        layer = self.config.vision_feature_layer
        hidden = None if not isinstance(layer, int) or out.hidden_states is None else out.hidden_states[layer]
        if hidden is None or hidden.shape[1] not in (tokens, tokens + 1):
            return None
        patches = hidden[:, 1:] if hidden.shape[1] == tokens + 1 else hidden
        if self.config.vision_config.model_type != "clip_vision_model":
            return None
        return torch.cosine_similarity(patches.float(), hidden[:, :1].float(), dim=-1).flatten()
