"""Idefics3 and SmolVLM: tiles with their row and column as text, the whole image last (arXiv 2408.12637, 2504.05299)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from codebook_prune.adapters.base import NOT_WHOLE, VLMAdapter
from codebook_prune.adapters.grids import whole
from codebook_prune.visual_tokens import EnteringTokens, Layout
from codebook_schemas import UserError


class Idefics3Adapter(VLMAdapter):
    """Idefics3ForConditionalGeneration, SmolVLMForConditionalGeneration. Each tile is a frame, the whole image the last one.

    The text in front of a tile names its row and column, or says that it is the whole image; that mark is what stands in front
    of a prompt's last tile. SmolVLM's processor gives a video as whole images with text between, so its frames count as images.
    """

    model_types: ClassVar[tuple[str, ...]] = ("idefics3", "smolvlm")

    @property
    def connector(self) -> nn.Module:
        """Pixel shuffle and projection."""
        module: nn.Module = self.model.base_model.connector
        return module

    def image_layout(self, entering: EnteringTokens) -> list[Layout]:
        """See `VLMAdapter.image_layout`: the tower's square, each side divided by the pixel shuffle."""
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size // self.config.scale_factor
        tiles = torch.arange(0, len(entering), side * side)
        if entering.runs() != [side * side] * len(tiles):
            raise UserError(NOT_WHOLE)
        row = entering.row[tiles]
        mark = entering.input_ids.cpu()[row, entering.column[tiles] - 1]
        last_in_row = torch.cat([row.diff() != 0, torch.ones(1, dtype=torch.bool)])
        closing = mark == mark[last_in_row][torch.searchsorted(row[last_in_row], row)]
        ends = torch.cat([torch.full((1,), -1), closing.nonzero().flatten()])
        return [whole(side, side, tiles) for tiles in ends.diff().tolist()]
