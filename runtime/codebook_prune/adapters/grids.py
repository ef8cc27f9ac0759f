"""Layouts that families share: rasters, crops of one size, any-resolution images, pooled video frames. Pure functions.

A layout is [n, 4] long on the CPU, the columns (item, frame, row, column) of `VLMAdapter.layout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from codebook_prune.adapters.base import NOT_WHOLE
from codebook_prune.visual_tokens import EnteringTokens
from codebook_schemas import UserError

CLIP = "clip_vision_model"


@lru_cache(maxsize=64)
def raster(rows: int, columns: int) -> Tensor:
    """(row, column) of every cell of a grid in raster order: [rows * columns, 2]. Shared: not to be written to."""
    with torch.inference_mode(False):  # kept beyond the block it is first asked for in
        return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)


def tower_square(config: Any, *, with_cls: bool = False) -> Tensor:
    """(row, column) of a vision tower's tokens for one crop: [n, 2]; `with_cls`: a CLIP tower's [CLS], (-1, -1), in front."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    cells = raster(side, side)
    cls = with_cls and config.vision_config.model_type == CLIP
    return torch.cat([cells.new_full((1, 2), -1), cells]) if cls else cells


def repeated(cells: Tensor, total: int) -> Tensor:
    """Layout of `total` tokens in which every item is one grid of `cells` [n, 2].

    Raises:
        UserError: `total` is no multiple of n.
    """
    if total % len(cells):
        raise UserError(NOT_WHOLE)
    return grouped(cells, [1] * (total // len(cells)))


def grouped(cells: Tensor, frames: Sequence[int]) -> Tensor:
    """Layout of items that consist of so many `frames`, each a grid of `cells` [n, 2]."""
    parts = [item_frame(item, frame, cells) for item, count in enumerate(frames) for frame in range(count)]
    return torch.cat(parts)


def item_frame(item: int, frame: int, cells: Tensor) -> Tensor:
    """Layout of one grid whose tokens lie at `cells` [n, 2]."""
    return torch.cat([cells.new_tensor([[item, frame]]).expand(len(cells), -1), cells], 1)


def frames_in(lengths: Sequence[int], cells: int) -> list[int]:
    """How many grids of `cells` tokens items of these `lengths` hold.

    Raises:
        UserError: not a whole number of them.
    """
    if any(length % cells for length in lengths):
        raise UserError(NOT_WHOLE)
    return [length // cells for length in lengths]


def newline_places(entering: EnteringTokens, newline: Tensor) -> Tensor:
    """[n] bool on the CPU: which tokens are the learnt newline embedding [d], copied into the sequence bit for bit."""
    found: Tensor = (entering.embeddings == newline.to(entering.embeddings)).all(-1).cpu()
    return found


def any_resolution(newline: Tensor, overview: Tensor) -> Tensor:
    """Layout of images that each enter as an overview crop, then the rows of a finer grid, a newline behind each row.

    The overview is frame 0, the finer grid frame 1; an image of one crop is its overview and a newline. Image sizes need not
    be known: a finer row is far shorter than the overview, so a longer stretch without newline begins the next image.

    Args:
        newline: [n] bool, which tokens are newlines.
        overview: [k, 2], the cells of the overview crop.

    Raises:
        UserError: an image does not enter whole.
    """
    ends: list[int] = newline.nonzero().flatten().tolist()
    parts: list[Tensor] = []
    start = 0
    while start < len(newline):
        body = start + len(overview)
        close = next((end for end in ends if end >= start), -1)
        if close < body:
            raise UserError(NOT_WHOLE)
        columns, rows, stop = close - body, 1, close + 1
        while columns and stop + columns < len(newline) and int(newline[stop:].byte().argmax()) == columns:
            rows, stop = rows + 1, stop + columns + 1
        item = 0 if not parts else int(parts[-1][-1, 0]) + 1
        fine = raster(rows, columns + 1).clone()
        fine[fine[:, 1] == columns] = -1
        parts += [item_frame(item, 0, overview), item_frame(item, int(columns > 0), fine)]
        start = stop
    return torch.cat(parts)


def clip_cosine(config: Any, out: Any) -> Tensor | None:
    """Cosine of a CLIP tower's tokens to their crop's [CLS] at the feature layer: [crops, 1 + n], None for other towers.

    Args:
        config: the model's.
        out: what `get_image_features` returned.
    """
    layer = config.vision_feature_layer
    if config.vision_config.model_type != CLIP or not isinstance(layer, int) or out.hidden_states is None:
        return None
    hidden = out.hidden_states[layer].float()
    return torch.cosine_similarity(hidden, hidden[:, :1], dim=-1)
