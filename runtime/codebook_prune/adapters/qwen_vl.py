"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: images and videos of any size, a 2 x 2 merger, M-RoPE, in the third DeepStack.

M-RoPE gives every token a position in time, height and width (Wang et al., arXiv 2409.12191). DeepStack adds features of
earlier vision layers to the visual tokens behind the first decoder layers (Meng et al., arXiv 2406.04334).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from codebook_prune.adapters.base import NOT_WHOLE, VLMAdapter
from codebook_prune.adapters.grids import raster, whole
from codebook_prune.visual_tokens import EnteringTokens, Layout
from codebook_schemas import UserError

Grid = tuple[int, int, int]


class QwenVLAdapter(VLMAdapter):
    """Qwen2VL-, Qwen2_5_VL- and Qwen3VLForConditionalGeneration: `visual` with its merger, a decoder with M-RoPE."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    numbers_in_line: ClassVar[bool] = False

    @property
    def connector(self) -> nn.Module:
        """The merger of the last vision layer."""
        module: nn.Module = self.model.base_model.visual.merger
        return module

    @property
    def whole_layers(self) -> int:
        """See `VLMAdapter.whole_layers`: those with DeepStack features behind them."""
        return len(getattr(self.config.vision_config, "deepstack_visual_indexes", ()))

    def image_layout(self, entering: EnteringTokens) -> list[Layout]:
        """See `VLMAdapter.image_layout`: one grid an image."""
        return [whole(rows, columns) for _, rows, columns in self._grids(entering, "image")]

    def video_layout(self, entering: EnteringTokens) -> list[Layout]:
        """See `VLMAdapter.video_layout`: one grid for every two frames, which the encoder takes together."""
        return [whole(rows, columns, frames) for frames, rows, columns in self._grids(entering, "video")]

    def _grids(self, entering: EnteringTokens, kind: str) -> list[Grid]:
        """(frames, rows, columns) of every image or video: told by the call, or read off the M-RoPE positions."""
        given, merge = entering.call.get(f"{kind}_grid_thw"), self.config.vision_config.spatial_merge_size
        if given is not None:
            grids = [(t, h // merge, w // merge) for t, h, w in given.tolist()]
        else:
            encoded = (entering.call.get("mm_encoder_outputs") or {}).get(kind)
            lengths = [] if encoded is None else [len(tokens) for tokens in encoded.pooler_output]
            positions = entering.position_ids
            if sum(lengths) != len(entering):
                raise UserError(NOT_WHOLE)
            if positions is None or positions.ndim != 3 or len(positions) < 3:
                raise UserError(NO_PLACES)
            height, width = positions[-2:, entering.row, entering.column].cpu()
            grids = [read_grid(h, w) for h, w in zip(height.split(lengths), width.split(lengths), strict=True)]
            if kind == "image" and any(frames > 1 for frames, _, _ in grids):
                raise UserError(NO_PLACES)
        if sum(frames * rows * columns for frames, rows, columns in grids) != len(entering):
            raise UserError(NOT_WHOLE)
        return grids

    def layer_features(self, out: Any) -> Tensor | None:
        """See `VLMAdapter.layer_features`: those of DeepStack."""
        features = getattr(out, "deepstack_features", None)
        return None if features is None else torch.stack([torch.cat(list(images)) for images in features], 1)

    def placed(self, place: Tensor, features: Tensor | None) -> dict[str, Any]:
        """See `VLMAdapter.placed`: M-RoPE positions, and DeepStack features for every token."""
        arguments: dict[str, Any] = {"position_ids": place.permute(2, 0, 1)}
        if features is not None:
            arguments["visual_pos_masks"] = torch.ones(place.shape[:2], dtype=torch.bool, device=place.device)
            arguments["deepstack_visual_embeds"] = list(features.flatten(0, 1).unbind(1))
        return arguments

    def shortened(self, arguments: Mapping[str, Any], keep: Tensor, index: Tensor, valid: Tensor) -> dict[str, Any]:
        """See `VLMAdapter.shortened`: the DeepStack features, and where they go."""
        visual = arguments.get("visual_pos_masks")
        if visual is None:
            return {}
        stay = keep[visual]
        return {
            "visual_pos_masks": visual.gather(1, index) & valid,
            "deepstack_visual_embeds": [features[stay] for features in arguments["deepstack_visual_embeds"]],
        }


NO_PLACES = "the positions of this call do not place its visual tokens on a grid: pass mm_token_type_ids and no position_ids"


def read_grid(h: Tensor, w: Tensor) -> Grid:
    """(frames, rows, columns) of one image or video, from where M-RoPE places its tokens.

    Args:
        h, w: [n] height and width of its tokens in the order they enter: every frame in raster order from a corner of its own.

    Raises:
        UserError: they are not in such an order.
    """
    count = torch.arange(len(h))
    columns = int(((h == h[0]) & (w == w[0] + count)).long().cumprod(0).sum())
    down, left = h[::columns], w[::columns]
    rows = int(((down == h[0] + count[: len(down)]) & (left == w[0])).long().cumprod(0).sum())
    frames, rest = divmod(len(h), rows * columns)
    if rest or (frames > 1 and rows * columns == 1):
        raise UserError(NO_PLACES)
    found = torch.stack([h, w], 1).view(frames, rows * columns, 2)
    if not torch.equal(found - found[:, :1], raster(rows, columns).expand(frames, -1, -1)):
        raise UserError(NO_PLACES)
    return frames, rows, columns
