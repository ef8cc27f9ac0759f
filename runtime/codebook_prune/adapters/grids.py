"""Layouts that families share: rasters, crops of one size, any-resolution images, pooled video frames. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from codebook_prune.adapters.base import NOT_WHOLE
from codebook_prune.visual_tokens import EnteringTokens, Layout
from codebook_schemas import UserError

CLIP = "clip_vision_model"


@lru_cache(maxsize=64)
def raster(rows: int, columns: int) -> Tensor:
    """(row, column) of every cell of a grid in raster order: [rows * columns, 2]. Shared: not to be written to."""
    with torch.inference_mode(False):  # kept beyond the block it is first asked for in
        return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)


def tower_side(config: Any) -> int:
    """Rows, and columns, of the tokens that a vision tower makes of one crop."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def tower_square(config: Any, *, with_cls: bool = False) -> Tensor:
    """(row, column) of a vision tower's tokens for one crop: [n, 2]; `with_cls`: a CLIP tower's [CLS], (-1, -1), in front."""
    cells = raster(tower_side(config), tower_side(config))
    cls = with_cls and config.vision_config.model_type == CLIP
    return torch.cat([cells.new_full((1, 2), -1), cells]) if cls else cells


def stacked(cells: Tensor, frames: int = 1) -> Layout:
    """So many frames with a grid of `cells` [n, 2] each."""
    return Layout(torch.arange(frames).repeat_interleave(len(cells)), cells.repeat(frames, 1))


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def whole(rows: int, columns: int, frames: int = 1) -> Layout:
    """So many frames with a grid of rows x columns each, in raster order. Shared: not to be written to."""
    return stacked(raster(rows, columns), frames)


def repeated(layout: Layout, total: int) -> list[Layout]:
    """`total` tokens in items of one layout.

    Raises:
        UserError: `total` is no multiple of its tokens.
    """
    return [layout] * sum(frames_in([total], len(layout)))


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


def any_resolution(newline: Tensor, side: int) -> list[Layout]:
    """Layouts of images that each enter as an overview crop, then the rows of a finer grid, a newline behind each row.

    The overview is frame 0, the finer grid frame 1; an image of one crop is its overview and a newline. Image sizes need not
    be known: a finer row is far shorter than the overview, so a longer stretch without newline begins the next image.

    Args:
        newline: [n] bool, which tokens are newlines.
        side: rows, and columns, of the overview crop.

    Raises:
        UserError: an image does not enter whole.
    """
    ends: list[int] = newline.nonzero().flatten().tolist()
    found: list[Layout] = []
    start = 0
    while start < len(newline):
        body = start + side * side
        close = next((end for end in ends if end >= start), -1)
        if close < body:
            raise UserError(NOT_WHOLE)
        columns, rows, stop = close - body, 1, close + 1
        while columns and stop + columns < len(newline) and int(newline[stop:].byte().argmax()) == columns:
            rows, stop = rows + 1, stop + columns + 1
        found.append(with_overview(side, rows, columns))
        start = stop
    return found


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def with_overview(side: int, rows: int, columns: int) -> Layout:
    """An overview of side x side tokens, then rows x columns of a finer grid, a newline behind each row. Shared."""
    overview, fine = raster(side, side), raster(rows, columns + 1).clone()
    fine[fine[:, 1] == columns] = -1
    frame = torch.cat([torch.zeros(len(overview), dtype=torch.long), torch.full((len(fine),), int(columns > 0))])
    return Layout(frame, torch.cat([overview, fine]))


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
